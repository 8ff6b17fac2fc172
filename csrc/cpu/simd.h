// Vectors of ATTNKERN_BYTES bytes; included by foreach_isa.h's kernels, once for each instruction set.
//
// Vec<A> is a GCC vector of float or double: arithmetic, comparison and ?: are the language's own. This header adds
// what is not: loads and stores of the storage types with their conversion (bfloat16 and float16 round to nearest
// even and keep NaN), partial vectors, non-temporal stores, bit masks and horizontal sums.
namespace attnkern::cpu::ATTNKERN_ISA {

#define ATTNKERN_INLINE inline __attribute__((always_inline))
#define ATTNKERN_INLINE_LAMBDA __attribute__((always_inline))  // after a lambda's parameters

template <class A>
using Vec __attribute__((vector_size(ATTNKERN_BYTES))) = A;
template <class A>
constexpr int kLanes = ATTNKERN_BYTES / sizeof(A);
template <class A>
using Int = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
template <class A>
using Mask = Vec<Int<A>>;  // a lane is 0 or -1, as comparisons return it

using Bits32 = uint32_t __attribute__((vector_size(ATTNKERN_BYTES)));
using Bits16 = uint16_t __attribute__((vector_size(ATTNKERN_BYTES / 2)));

template <class V, class P>
ATTNKERN_INLINE V load_raw(const P* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class To, class From>
ATTNKERN_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class A>
ATTNKERN_INLINE Vec<A> splat(A a) {
  return a - Vec<A>{};
}

template <class A>
ATTNKERN_INLINE Mask<A> lane_index() {
  Mask<A> index;
  for (int i = 0; i < kLanes<A>; ++i) index[i] = i;
  return index;
}

// ---- float16 and bfloat16 to float and back

ATTNKERN_INLINE Vec<float> widen(Bits16 h, BFloat16) {
#if defined(ATTNKERN_AVX512)  // gcc 12 would widen halves and join them: 1.3 times the time of a whole call on 7x7
  return bit_cast<Vec<float>>((Bits32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h) << 16);
#elif defined(ATTNKERN_AVX2)
  return bit_cast<Vec<float>>((Bits32)_mm256_cvtepu16_epi32((__m128i)h) << 16);
#else
  return bit_cast<Vec<float>>(__builtin_convertvector(h, Bits32) << 16);
#endif
}

ATTNKERN_INLINE Bits16 narrow(Vec<float> v, BFloat16) {
#if defined(ATTNKERN_AVX512_BF16)  // one instruction of nine, but to it subnormals are 0
  constexpr int kSubnormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)v, kSubnormal) == 0, 1))
    return bit_cast<Bits16>(_mm512_cvtneps_pbh((__m512)v));
#endif
  const Bits32 u = bit_cast<Bits32>(v);
  const Bits32 rounded = u + 0x7fffu + ((u >> 16) & 1u);
  const Bits32 quiet = u | 0x400000u;
  return __builtin_convertvector((v == v ? rounded : quiet) >> 16, Bits16);
}

ATTNKERN_INLINE Vec<float> widen(Bits16 h, Float16) {
#if defined(ATTNKERN_AVX512)
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h);
#elif defined(ATTNKERN_AVX2)
  return (Vec<float>)_mm256_cvtph_ps((__m128i)h);
#else
  const Bits32 u = __builtin_convertvector(h, Bits32);
  const Bits32 magnitude = (u & 0x7fffu) << 13;
  // 2^112 moves the exponent's bias from 15 to 127, subnormals included
  const Bits32 finite = bit_cast<Bits32>(bit_cast<Vec<float>>(magnitude) * 0x1p112f);
  const Bits32 special = magnitude | 0x7f800000u;
  return bit_cast<Vec<float>>(((u & 0x7c00u) == 0x7c00u ? special : finite) | ((u & 0x8000u) << 16));
#endif
}

ATTNKERN_INLINE Bits16 narrow(Vec<float> v, Float16) {
#if defined(ATTNKERN_AVX512)
  return (Bits16)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(ATTNKERN_AVX2)
  return (Bits16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  const Bits32 u = bit_cast<Bits32>(v);
  const Bits32 magnitude = u & 0x7fffffffu;
  const Bits32 sign = (u >> 16) & 0x8000u;
  const Bits32 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // adding 1/2 leaves the subnormal's bits, rounded to nearest even, at the bottom of the significand
  const Bits32 subnormal = bit_cast<Bits32>(bit_cast<Vec<float>>(magnitude) + 0.5f) - 0x3f000000u;
  const Bits32 infinite = Bits32{} + 0x7c00u;
  const Bits32 nan = ((magnitude >> 13) & 0x3ffu) | 0x7e00u;
  Bits32 h = magnitude < 0x38800000u ? subnormal : normal;  // 2^-14
  h = magnitude >= 0x477ff000u ? infinite : h;              // 65520 rounds to infinity
  h = magnitude > 0x7f800000u ? nan : h;
  return __builtin_convertvector(h | sign, Bits16);
#endif
}

// ---- loads and stores: T in memory, Vec<Accumulator<T>> in registers

template <class T>
ATTNKERN_INLINE Vec<Accumulator<T>> load(const T* p) {
  if constexpr (sizeof(T) == 2)
    return widen(load_raw<Bits16>(p), T{});
  else
    return load_raw<Vec<T>>(p);
}

#if defined(ATTNKERN_AVX512_BF16)
constexpr bool kPairs = true;  // bfloat16 can be multiplied in pairs

ATTNKERN_INLINE Bits32 load(const Pair* p) { return load_raw<Bits32>(p); }
ATTNKERN_INLINE Bits16 load_bits(const BFloat16* p) { return load_raw<Bits16>(p); }

// sum += a.first b.first + a.second b.second: twice the terms of a multiplication of floats. Subnormals count as 0.
ATTNKERN_INLINE void multiply_add(Vec<float>& sum, Pair a, Bits32 b) {
  sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, bit_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a.bits))),
                                     bit_cast<__m512bh>(b));
}

// Pairs of what lies in two rows one under the other.
ATTNKERN_INLINE Bits32 interleave(Bits16 even, Bits16 odd) {
  const auto widened = [](Bits16 h) { return (Bits32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h); };
  return widened(even) | widened(odd) << 16;
}
#else
constexpr bool kPairs = false;
#endif

template <class V, class A>
ATTNKERN_INLINE void multiply_add(V& sum, A a, V b) {
  sum += a * b;
}

// Double accumulation reads float weights too.
template <class A, class T>
ATTNKERN_INLINE Vec<A> load_as(const T* p) {
  if constexpr (std::is_same_v<A, Accumulator<T>>) {
    return load(p);
  } else {
    Vec<A> v;
    for (int i = 0; i < kLanes<A>; ++i) v[i] = p[i];
    return v;
  }
}

template <class T>
ATTNKERN_INLINE auto pack(Vec<Accumulator<T>> v) {
  if constexpr (sizeof(T) == 2)
    return narrow(v, T{});
  else
    return v;
}

template <class T>
ATTNKERN_INLINE void store(T* p, Vec<Accumulator<T>> v) {
  const auto packed = pack<T>(v);
  std::memcpy(p, &packed, sizeof packed);
}

// Bypasses the caches; p must be aligned to the stored bytes. fence() before another thread reads.
template <class T>
ATTNKERN_INLINE void stream(T* p, Vec<Accumulator<T>> v) {
  const auto packed = pack<T>(v);
#if defined(__x86_64__)
  if constexpr (sizeof packed == 8)
    _mm_stream_si64(reinterpret_cast<long long*>(p), bit_cast<long long>(packed));
  else if constexpr (sizeof packed == 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), bit_cast<__m128i>(packed));
#if defined(ATTNKERN_AVX2)
  else if constexpr (sizeof packed == 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(packed));
#endif
#if defined(ATTNKERN_AVX512)
  else
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_cast<__m512i>(packed));
#endif
#else
  std::memcpy(p, &packed, sizeof packed);
#endif
}

ATTNKERN_INLINE void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

#if defined(ATTNKERN_AVX512_BF16)
ATTNKERN_INLINE Bits32 load_n(const Pair* p, int64_t n) {
  return (Bits32)_mm512_maskz_loadu_epi32(static_cast<uint16_t>((1u << n) - 1), p);
}
ATTNKERN_INLINE Bits16 load_bits_n(const BFloat16* p, int64_t n) {
  return (Bits16)_mm256_maskz_loadu_epi16(static_cast<uint16_t>((1u << n) - 1), p);
}
#endif

// The first n < lanes elements; the other lanes are zero.
template <class T>
ATTNKERN_INLINE Vec<Accumulator<T>> load_n(const T* p, int64_t n) {
#if defined(ATTNKERN_AVX512)
  const auto lanes = static_cast<uint16_t>((1u << n) - 1);
  if constexpr (sizeof(T) == 8) return (Vec<double>)_mm512_maskz_loadu_pd(static_cast<uint8_t>(lanes), p);
  if constexpr (sizeof(T) == 4) return (Vec<float>)_mm512_maskz_loadu_ps(lanes, p);
  if constexpr (sizeof(T) == 2) return widen((Bits16)_mm256_maskz_loadu_epi16(lanes, p), T{});
#else
  T all[kLanes<Accumulator<T>>] = {};
  for (int64_t i = 0; i < n; ++i) all[i] = p[i];
  return load(all);
#endif
}

template <class T>
ATTNKERN_INLINE void store_n(T* p, Vec<Accumulator<T>> v, int64_t n) {
#if defined(ATTNKERN_AVX512)
  const auto lanes = static_cast<uint16_t>((1u << n) - 1);
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(p, static_cast<uint8_t>(lanes), (__m512d)v);
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, lanes, (__m512)v);
  if constexpr (sizeof(T) == 2) _mm256_mask_storeu_epi16(p, lanes, (__m256i)narrow(v, T{}));
#else
  T all[kLanes<Accumulator<T>>];
  store(all, v);
  for (int64_t i = 0; i < n; ++i) p[i] = all[i];
#endif
}

// ---- bit masks: lane i is bit i

template <class A>
ATTNKERN_INLINE uint32_t to_bits(Mask<A> m) {
#if defined(ATTNKERN_AVX512)
  if constexpr (sizeof(A) == 4)
    return _mm512_movepi32_mask((__m512i)m);
  else
    return _mm512_movepi64_mask((__m512i)m);
#elif defined(ATTNKERN_AVX2)
  if constexpr (sizeof(A) == 4)
    return _mm256_movemask_ps((__m256)m);
  else
    return _mm256_movemask_pd((__m256d)m);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<A>; ++i) bits |= (m[i] & 1u) << i;
  return bits;
#endif
}

template <class A>
ATTNKERN_INLINE Mask<A> from_bits(uint32_t bits) {
  Mask<A> select;
  for (int i = 0; i < kLanes<A>; ++i) select[i] = Int<A>{1} << i;
  return ((static_cast<Int<A>>(bits) - Mask<A>{}) & select) != 0;
}

// ---- horizontal sum, by halves

template <class A, int n>
using VecN __attribute__((vector_size(n * sizeof(A)))) = A;

template <class A, int n>
ATTNKERN_INLINE A sum_halves(VecN<A, n> v) {
  if constexpr (n == 2) {
    return v[0] + v[1];
  } else {
    struct {
      VecN<A, n / 2> low, high;
    } halves;
    std::memcpy(&halves, &v, sizeof v);
    return sum_halves<A, n / 2>(halves.low + halves.high);
  }
}

template <class A>
ATTNKERN_INLINE A sum(Vec<A> v) {
  return sum_halves<A, kLanes<A>>(v);
}

}  // namespace attnkern::cpu::ATTNKERN_ISA
