#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace attnkern::cpu {

const char* name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "scalar";
  }
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> isas;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    isas.push_back(Isa::avx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) isas.push_back(Isa::avx2);
#endif
  isas.push_back(Isa::scalar);
  return isas;
}

Isa active_isa() {
  static const Isa isa = [] {
    const std::vector<Isa> isas = supported_isas();
    const char* wanted = std::getenv("ATTNKERN_CPU_ISA");
    if (wanted == nullptr || *wanted == '\0') return isas.front();
    std::string choices;
    for (const Isa candidate : isas) {
      if (std::string(wanted) == name(candidate)) return candidate;
      choices += std::string(choices.empty() ? "" : ", ") + name(candidate);
    }
    throw std::invalid_argument(
        "attnkern: ATTNKERN_CPU_ISA must be one of " + choices + " on this processor, got '" + wanted + "'");
  }();
  return isa;
}

}  // namespace attnkern::cpu
