// Activations of the hidden layer on vectors, with torch's values at kinks.
namespace attnkern::softmax_pool::ATTNKERN_ISA {

using namespace cpu::ATTNKERN_ISA;
using cpu::Accumulator;

template <HiddenAct act, class V>
ATTNKERN_INLINE V activation(V h) {
  using A = std::remove_cvref_t<decltype(h[0])>;
  if constexpr (act == HiddenAct::tanh) return tanh(h);
  if constexpr (act == HiddenAct::relu) return h <= 0 ? V{} : h;
  if constexpr (act == HiddenAct::gelu) return h * (A(0.5) * (1 + erf(h * A(0.7071067811865476))));
}

// act'(h), given a = act(h)
template <HiddenAct act, class V>
ATTNKERN_INLINE V activation_grad(V h, V a) {
  using A = std::remove_cvref_t<decltype(h[0])>;
  if constexpr (act == HiddenAct::tanh) return (1 - a) * (1 + a);
  if constexpr (act == HiddenAct::relu) return h <= 0 ? V{} : V{} + 1;
  if constexpr (act == HiddenAct::gelu) {
    const V density = exp(A(-0.5) * h * h) * A(0.3989422804014327);  // 1 / sqrt(2 pi)
    return A(0.5) * (1 + erf(h * A(0.7071067811865476))) + h * density;
  }
}

// f(std::integral_constant<HiddenAct, act>)
template <class F>
ATTNKERN_INLINE void visit_act(HiddenAct act, const F& f) {
  switch (act) {
    case HiddenAct::tanh:
      return f(std::integral_constant<HiddenAct, HiddenAct::tanh>{});
    case HiddenAct::relu:
      return f(std::integral_constant<HiddenAct, HiddenAct::relu>{});
    case HiddenAct::gelu:
      return f(std::integral_constant<HiddenAct, HiddenAct::gelu>{});
  }
}

}  // namespace attnkern::softmax_pool::ATTNKERN_ISA
