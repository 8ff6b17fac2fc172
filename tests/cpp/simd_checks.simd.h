// The checks of one instruction set; compiled by cpu/foreach_isa.h, hence no include guard.
#include "cpu/simd.h"

#include "cpu/math.simd.h"

namespace attnkern::checks::ATTNKERN_ISA {

using namespace cpu::ATTNKERN_ISA;

template <class T>
uint16_t narrowed(float x) {
  T out[kLanes<float>];
  store(out, splat(x));
  return out[0].bits;
}

template <class T>
void conversions() {
  constexpr int lanes = kLanes<float>;
  // every 16-bit value survives widening and narrowing; NaN stays NaN
  for (uint32_t first = 0; first < 65536; first += lanes) {
    T in[lanes], out[lanes];
    for (int i = 0; i < lanes; ++i) in[i].bits = static_cast<uint16_t>(first + i);
    const Vec<float> wide = load(in);
    store(out, wide);
    for (int i = 0; i < lanes; ++i) {
      const double exact = value_of(in[i]);
      if (std::isnan(exact))
        expect(std::isnan(wide[i]) && std::isnan(value_of(out[i])), "NaN is kept", first + i);
      else
        expect(wide[i] == exact && out[i].bits == in[i].bits, "a value round trips", first + i);
    }
  }
  // narrowing rounds to nearest even: between neighbours a < b lie a tie and values just beside it
  for (uint32_t bits = 0; bits < 65535; ++bits) {
    T a{static_cast<uint16_t>(bits)}, b{static_cast<uint16_t>(bits + 1)};
    const double low = value_of(a), high = value_of(b);
    if (!std::isfinite(low) || !std::isfinite(high) || (low < 0) != (high < 0)) continue;
    const float tie = static_cast<float>((low + high) / 2);
    const T even = bits % 2 ? b : a;
    expect(narrowed<T>(tie) == even.bits, "a tie goes to even", bits);
    expect(narrowed<T>(std::nextafter(tie, static_cast<float>(low))) == a.bits, "below a tie", bits);
    expect(narrowed<T>(std::nextafter(tie, static_cast<float>(high))) == b.bits, "above a tie", bits);
  }
  expect(std::isinf(value_of(T{narrowed<T>(3.4e38f)})), "overflow is infinite", 0);
}

template <class F, class G>
void function(const char* name, float low, float high, double limit, const F& f, const G& exact) {
  double worst = 0;
  for (int i = 0; i < 200000; ++i) {
    const float x = low + (high - low) * static_cast<float>(i) / 200000;
    const double want = exact(static_cast<double>(x)), got = f(splat(x))[0];
    worst = std::fmax(worst, std::fabs(got - want) / std::fmax(std::fabs(want), 1e-37));
  }
  expect(worst <= limit * 0x1p-23, name, worst * 0x1p23);
}

template <class A>
void vectors() {
  constexpr int lanes = kLanes<A>;
  A in[2 * lanes], out[2 * lanes];
  for (int i = 0; i < 2 * lanes; ++i) in[i] = static_cast<A>(i + 1);
  for (int n = 0; n < lanes; ++n) {
    for (A& value : out) value = -1;
    const Vec<A> part = load_n(in, n);
    store_n(out, load(in), n);
    for (int i = 0; i < lanes; ++i) {
      expect(part[i] == (i < n ? in[i] : 0), "load_n", n);
      expect(out[i] == (i < n ? in[i] : -1), "store_n", n);
    }
  }
  expect(sum<A>(load(in)) == lanes * (lanes + 1) / 2, "sum", lanes);
  for (uint32_t bits = 0; bits < (1u << lanes); bits += lanes > 8 ? 37 : 1)
    expect(to_bits<A>(from_bits<A>(bits)) == bits, "bits round trip", bits);
}

#if defined(ATTNKERN_AVX512_BF16)
// A product of pairs takes the first with the first and the second with the second, lane by lane, and adds both.
void pairs() {
  constexpr int lanes = kLanes<float>;
  BFloat16 even[lanes], odd[lanes];
  for (int i = 0; i < lanes; ++i) {
    store_n(even + i, splat(1.0f + i), 1);
    store_n(odd + i, splat(100.0f - 3 * i), 1);
  }
  const Bits32 rows = interleave(load_raw<Bits16>(even), load_raw<Bits16>(odd));
  const Pair a{0xc0000000u | 0x3f80u};  // 1 and -2
  Vec<float> sum = splat(0.5f);
  multiply_add(sum, a, rows);
  for (int i = 0; i < lanes; ++i)
    expect(sum[i] == 0.5 + value_of(even[i]) - 2 * value_of(odd[i]), "pairs are multiplied and added", i);
  Pair given[lanes];
  std::memcpy(given, &rows, sizeof rows);
  const Bits32 whole = load(given), part = load_n(given, 3);
  for (int i = 0; i < lanes; ++i)
    expect(whole[i] == rows[i] && part[i] == (i < 3 ? rows[i] : 0), "pairs are loaded", i);
}
#endif

void run() {
#if defined(ATTNKERN_AVX512_BF16)
  pairs();
#endif
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  vectors<float>();
  vectors<double>();
  conversions<BFloat16>();
  conversions<Float16>();
  const auto e = [](Vec<float> x) { return exp(x); };
  function("exp", -87, 88.7f, 2, e, [](double x) { return std::exp(x); });
  function("tanh", -12, 12, 3, [](Vec<float> x) { return tanh(x); }, [](double x) { return std::tanh(x); });
  function("erf", -5, 5, 3, [](Vec<float> x) { return erf(x); }, [](double x) { return std::erf(x); });
  expect(exp(splat(inf))[0] == inf && exp(splat(1000.0f))[0] == inf, "exp overflows", 0);
  expect(exp(splat(-inf))[0] == 0 && exp(splat(-1000.0f))[0] == 0, "exp underflows", 0);
  expect(tanh(splat(inf))[0] == 1 && tanh(splat(-inf))[0] == -1, "tanh saturates", 0);
  expect(erf(splat(inf))[0] == 1 && erf(splat(-inf))[0] == -1, "erf saturates", 0);
  expect(std::isnan(exp(splat(nan))[0]) && std::isnan(tanh(splat(nan))[0]) && std::isnan(erf(splat(nan))[0]), "NaN", 0);
}

}  // namespace attnkern::checks::ATTNKERN_ISA
