// IEEE half and bfloat16 in software, rounded to nearest even; the types that kernels see in the emulator.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace attnkern::simt {

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(BFloat16 value) { return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

inline BFloat16 to_bfloat16(float value) {
  if (std::isnan(value)) return {0x7fff};
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline float to_float(Float16 value) {
  const int exponent = value.bits >> 10 & 31;
  const int fraction = value.bits & 1023;
  float magnitude;
  if (exponent == 31)
    magnitude = fraction ? NAN : INFINITY;
  else if (exponent == 0)
    magnitude = std::ldexp(static_cast<float>(fraction), -24);
  else
    magnitude = std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return value.bits & 0x8000 ? -magnitude : magnitude;
}

inline Float16 to_float16(float value) {
  if (std::isnan(value)) return {0x7fff};
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  // units of the last place: 2^-24 below 2^-14, else 2^(exponent - 10); nearbyint rounds to even
  int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
  auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  if (units >= 2048) {
    units /= 2;
    ++exponent;
  }
  const uint32_t biased = units < 1024 ? 0 : static_cast<uint32_t>(exponent + 15) << 10;
  return {static_cast<uint16_t>(sign | (biased + (units & 1023)))};
}

inline float __half2float(Float16 value) { return to_float(value); }
inline float __bfloat162float(BFloat16 value) { return to_float(value); }
inline Float16 __float2half_rn(float value) { return to_float16(value); }
inline BFloat16 __float2bfloat16_rn(float value) { return to_bfloat16(value); }

}  // namespace attnkern::simt

namespace attnkern::cuda {
using simt::__bfloat162float;
using simt::__float2bfloat16_rn;
using simt::__float2half_rn;
using simt::__half2float;
}  // namespace attnkern::cuda
