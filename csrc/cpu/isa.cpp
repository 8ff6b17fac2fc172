#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace attnkern::cpu {

const char* name(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "scalar";
  }
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> isas;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    if (__builtin_cpu_supports("avx512bf16")) isas.push_back(Isa::avx512_bf16);
    isas.push_back(Isa::avx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    isas.push_back(Isa::avx2);
#endif
  isas.push_back(Isa::scalar);
  return isas;
}

namespace {

struct Choice {
  Isa isa;
  std::string error;
};

const Choice& choice() {
  static const Choice made = []() -> Choice {
    const std::vector<Isa> isas = supported_isas();
    const char* wanted = std::getenv("ATTNKERN_CPU_ISA");
    if (wanted == nullptr || *wanted == '\0') return {isas.front(), ""};
    std::string names;
    for (const Isa isa : isas) {
      if (std::string(wanted) == name(isa)) return {isa, ""};
      names += std::string(names.empty() ? "" : ", ") + name(isa);
    }
    return {Isa::scalar, "ATTNKERN_CPU_ISA must be one of " + names + " on this processor, got '" + wanted + "'"};
  }();
  return made;
}

}  // namespace

const char* isa_error() { return choice().error.empty() ? nullptr : choice().error.c_str(); }

Isa active_isa() {
  if (const char* error = isa_error()) throw std::invalid_argument(std::string("attnkern: ") + error);
  return choice().isa;
}

}  // namespace attnkern::cpu
