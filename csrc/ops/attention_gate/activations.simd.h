// Activations of the hidden channels on vectors, with torch's values at kinks.
namespace attnkern::attention_gate::ATTNKERN_ISA {

using namespace cpu::ATTNKERN_ISA;
using cpu::Accumulator;

// log(1 + y) of 0 <= y <= 1 as 2 atanh(s), s = y / (2 + y) <= 1/3: nine terms of the series leave 2e-9
ATTNKERN_INLINE Vec<float> log_of_one_and(Vec<float> y) {
  static constexpr float c[] = {1.0f,      1 / 3.0f,  1 / 5.0f,  1 / 7.0f, 1 / 9.0f,
                                1 / 11.0f, 1 / 13.0f, 1 / 15.0f, 1 / 17.0f};
  const Vec<float> s = y / (2.0f + y);
  return 2.0f * s * polynomial(s * s, c);
}
ATTNKERN_INLINE Vec<double> log_of_one_and(Vec<double> y) {
  return each_lane<double>(y, [](double v) { return std::log1p(v); });
}

template <HiddenAct act, class V, class A>
ATTNKERN_INLINE V activation(V h, A slope) {
  if constexpr (act == HiddenAct::relu) return h <= 0 ? V{} : h;
  if constexpr (act == HiddenAct::leaky_relu) return h > 0 ? h : slope * h;
  if constexpr (act == HiddenAct::softplus) {
    const V magnitude = h < 0 ? -h : h, above = h <= 0 ? V{} : h;
    return h > 20 ? h : above + log_of_one_and(exp(-magnitude));
  }
}

// grad act'(h); where relu's derivative is 0 it selects, as torch's does: NaN and infinity stop there.
template <HiddenAct act, class V, class A>
ATTNKERN_INLINE V activation_backward(V h, A slope, V grad) {
  if constexpr (act == HiddenAct::relu) return h <= 0 ? V{} : grad;
  if constexpr (act == HiddenAct::leaky_relu) return h > 0 ? grad : grad * slope;
  if constexpr (act == HiddenAct::softplus) return h > 20 ? grad : grad * sigmoid(h);
}

// f(std::integral_constant<HiddenAct, act>)
template <class F>
ATTNKERN_INLINE void visit_act(HiddenAct act, const F& f) {
  switch (act) {
    case HiddenAct::relu:
      return f(std::integral_constant<HiddenAct, HiddenAct::relu>{});
    case HiddenAct::leaky_relu:
      return f(std::integral_constant<HiddenAct, HiddenAct::leaky_relu>{});
    case HiddenAct::softplus:
      return f(std::integral_constant<HiddenAct, HiddenAct::softplus>{});
  }
}

}  // namespace attnkern::attention_gate::ATTNKERN_ISA
