// Elementwise functions on vectors; included by foreach_isa.h's kernels after simd.h, once for each instruction set.
//
// float: polynomials fitted for this file at Chebyshev nodes, within 2 ulp of the exact value (erf: of 1).
// double: the C library, lane by lane; it serves gradient checks, not speed.
namespace attnkern::cpu::ATTNKERN_ISA {

template <class A, class F>
ATTNKERN_INLINE Vec<A> each_lane(Vec<A> v, const F& f) {
  for (int i = 0; i < kLanes<A>; ++i) v[i] = f(v[i]);
  return v;
}

// c[0] + c[1] x + c[2] x^2 + ...
template <size_t n>
ATTNKERN_INLINE Vec<float> polynomial(Vec<float> x, const float (&c)[n]) {
  Vec<float> p = splat(c[n - 1]);
  for (int i = static_cast<int>(n) - 2; i >= 0; --i) p = p * x + c[i];
  return p;
}

// e^x = 2^n e^r, |r| <= ln(2) / 2: Taylor's polynomial of degree 7 leaves 5e-9
ATTNKERN_INLINE Vec<float> exp(Vec<float> x) {
  constexpr float kShifter = 0x1.8p23f;  // adding it rounds to the nearest integer, found in the low bits
  x = x > 90.0f ? splat(90.0f) : x;
  x = x < -105.0f ? splat(-105.0f) : x;
  const Vec<float> shifted = x * 1.44269504f + kShifter;
  const Vec<float> n = shifted - kShifter;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  static constexpr float c[] = {1.0f, 1.0f, 1 / 2.0f, 1 / 6.0f, 1 / 24.0f, 1 / 120.0f, 1 / 720.0f, 1 / 5040.0f};
  const Vec<float> p = polynomial(r, c);
  // 2^n in two factors: n reaches 130 and -152
  const Mask<float> whole = bit_cast<Mask<float>>(shifted) - 0x4b400000;
  const Mask<float> half = whole >> 1;
  return p * bit_cast<Vec<float>>((half + 127) << 23) * bit_cast<Vec<float>>((whole - half + 127) << 23);
}

ATTNKERN_INLINE Vec<float> tanh(Vec<float> x) {
  static constexpr float c[] = {-0.333333289f, 0.133327698f, -0.0538509096f, 0.0209971790f, -0.00609671417f};
  const Vec<float> t = x * x;
  const Vec<float> small = x + x * t * polynomial(t, c);
  const Vec<float> magnitude = x < 0.0f ? -x : x;
  const Vec<float> large = 1.0f - 2.0f / (exp(2.0f * magnitude) + 1.0f);
  return magnitude < 0.625f ? small : x < 0.0f ? -large : large;
}

ATTNKERN_INLINE Vec<float> erf(Vec<float> x) {
  static constexpr float c[] = {1.12837917f,    -0.376126267f,    0.112835947f,   -0.0268542120f,
                                0.00518908742f, -0.000801686429f, 7.87587506e-05f};
  static constexpr float log_erfc[] = {0.000320138050f, -1.13023343f,     -0.631826052f,
                                       -0.110080083f,   0.0264211360f,    -0.00475959629f,
                                       0.000596805626f, -4.60580447e-05f, 1.63715141e-06f};
  const Vec<float> small = x * polynomial(x * x, c);
  const Vec<float> magnitude = x < 0.0f ? -x : x;
  const Vec<float> bounded = magnitude > 4.0f ? splat(4.0f) : magnitude;  // 1 - erf(4) = 1.5e-8
  const Vec<float> large = 1.0f - exp(polynomial(bounded, log_erfc));
  return magnitude < 1.0f ? small : x < 0.0f ? -large : large;
}

ATTNKERN_INLINE Vec<double> exp(Vec<double> x) {
  return each_lane<double>(x, [](double v) { return std::exp(v); });
}
ATTNKERN_INLINE Vec<double> tanh(Vec<double> x) {
  return each_lane<double>(x, [](double v) { return std::tanh(v); });
}
ATTNKERN_INLINE Vec<double> erf(Vec<double> x) {
  return each_lane<double>(x, [](double v) { return std::erf(v); });
}

template <class V>
ATTNKERN_INLINE V sigmoid(V x) {
  return 1 / (1 + exp(-x));
}

}  // namespace attnkern::cpu::ATTNKERN_ISA
