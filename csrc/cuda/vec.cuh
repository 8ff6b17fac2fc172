// Packs of elements and conversion to and from float.
#pragma once

#include "cuda/platform.cuh"

namespace attnkern::cuda {

// N elements moved by one access (of up to 16 bytes; longer packs by several).
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vec {
  static_assert((N & (N - 1)) == 0, "a pack holds a power of two of elements");
  T values[N];
  ATTNKERN_HOST_DEVICE T& operator[](int i) { return values[i]; }
  ATTNKERN_HOST_DEVICE const T& operator[](int i) const { return values[i]; }
};

// Elements of T in `bytes`: the widest pack of a single access by default.
template <class T>
ATTNKERN_HOST_DEVICE constexpr int pack_size(int bytes = 16) {
  return bytes / static_cast<int>(sizeof(T));
}

ATTNKERN_HOST_DEVICE float widen(float value) { return value; }
ATTNKERN_HOST_DEVICE float widen(float16 value) { return __half2float(value); }
ATTNKERN_HOST_DEVICE float widen(bfloat16 value) { return __bfloat162float(value); }

// To T, rounded to nearest even.
template <class T>
ATTNKERN_HOST_DEVICE T narrow(float value) {
  return value;
}
template <>
ATTNKERN_HOST_DEVICE float16 narrow<float16>(float value) {
  return __float2half_rn(value);
}
template <>
ATTNKERN_HOST_DEVICE bfloat16 narrow<bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

template <class T, int N>
ATTNKERN_DEVICE Vec<float, N> widen(const Vec<T, N>& pack) {
  Vec<float, N> wide;
#pragma unroll
  for (int i = 0; i < N; ++i) wide[i] = widen(pack[i]);
  return wide;
}

template <class T, int N>
ATTNKERN_DEVICE Vec<T, N> narrow(const Vec<float, N>& wide) {
  Vec<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack[i] = narrow<T>(wide[i]);
  return pack;
}

// w = high + low, both with w's sign and, unless w itself rounds to 0, not 0: an infinite x then meets infinities of
// one sign, and no 0.
template <class T>
ATTNKERN_DEVICE void split(float w, T& high, T& low) {
  high = narrow<T>(w);
  uint16_t bits;
  memcpy(&bits, &high, sizeof(T));
  const auto step_to_zero = [&] {
    --bits;
    memcpy(&high, &bits, sizeof(T));
  };
  const bool special = w != w || w - w != 0.0f;
  if (!special && fabsf(widen(high)) > fabsf(w)) step_to_zero();
  low = special ? high : narrow<T>(w - widen(high));
  if (widen(low) == 0.0f && widen(high) != 0.0f) {
    step_to_zero();
    low = narrow<T>(w - widen(high));
  }
}

}  // namespace attnkern::cuda
