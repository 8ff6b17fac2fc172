// Checks cpu/simd.h and cpu/math.simd.h for every instruction set of this processor; exits with the number that failed.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>

#include "cpu/isa.h"
#include "cpu/storage.h"

namespace attnkern::checks {

const char* isa = "";
int failures = 0;

void expect(bool holds, const char* what, double where) {
  if (holds) return;
  if (++failures <= 20) std::printf("%s: %s fails at %.9g\n", isa, what, where);
}

// The value of 16 bits by the definition of the format.
double value_of(cpu::BFloat16 h) {
  const int exponent = h.bits >> 7 & 0xff, fraction = h.bits & 0x7f;
  const double sign = h.bits >> 15 ? -1 : 1;
  if (exponent == 0xff) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(128 + fraction, exponent - 134) : std::ldexp(fraction, -133));
}

double value_of(cpu::Float16 h) {
  const int exponent = h.bits >> 10 & 0x1f, fraction = h.bits & 0x3ff;
  const double sign = h.bits >> 15 ? -1 : 1;
  if (exponent == 0x1f) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}

}  // namespace attnkern::checks

using attnkern::cpu::BFloat16, attnkern::cpu::Float16, attnkern::cpu::Pair;
#define ATTNKERN_KERNELS "simd_checks.simd.h"
#include "cpu/foreach_isa.h"

int main() {
  using namespace attnkern;
  using namespace attnkern::checks;
  int count = 0;
  for (const cpu::Isa supported : cpu::supported_isas()) {
    isa = cpu::name(supported);
    ATTNKERN_OF_ISA(supported, run)();
    ++count;
  }
  std::printf("checked %d instruction sets, %d failures\n", count, failures);
  return failures != 0;
}
