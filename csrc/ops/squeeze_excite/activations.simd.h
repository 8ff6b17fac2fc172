// Activations and gates on vectors, with torch's values at kinks, infinities and NaN.
namespace attnkern::squeeze_excite::ATTNKERN_ISA {

using namespace cpu::ATTNKERN_ISA;
using cpu::Accumulator;

template <class V>
ATTNKERN_INLINE V relu6(V h) {
  return h <= 0 ? V{} : h >= 6 ? V{} + 6 : h;
}

// mish = h n / (n + 2) with n = e^h (e^h + 2), tanh(softplus(h)) without cancellation; e^40 still squares in float
template <class V>
ATTNKERN_INLINE V tanh_softplus(V h) {
  const V e = exp(h > 20 ? V{} + 20 : h);
  const V n = e * (e + 2);
  return n / (n + 2);
}

// `slope` is leaky_relu's or prelu's.
template <class A>
ATTNKERN_INLINE Vec<A> activation(Act act, Vec<A> h, Vec<A> slope) {
  switch (act) {
    case Act::identity:
      return h;
    case Act::relu:
      return h <= 0 ? Vec<A>{} : h;
    case Act::relu6:
      return relu6(h);
    case Act::leaky_relu:
    case Act::prelu:
      return h > 0 ? h : slope * h;
    case Act::silu:
      return h * sigmoid(h);
    case Act::hardswish:
      return h * relu6(h + 3) / 6;
    case Act::gelu:
      return h * (A(0.5) * (1 + erf(h * A(0.7071067811865476))));
    case Act::mish:
      return h * tanh_softplus(h);
  }
  return h;
}

template <class A>
ATTNKERN_INLINE Vec<A> activation_grad(Act act, Vec<A> h, Vec<A> slope) {
  const Vec<A> zero{}, one = zero + 1;
  switch (act) {
    case Act::identity:
      return one;
    case Act::relu:
      return h <= 0 ? zero : one;
    case Act::relu6:
      return h <= 0 ? zero : h >= 6 ? zero : one;
    case Act::leaky_relu:
    case Act::prelu:
      return h > 0 ? one : slope;
    case Act::silu: {
      const Vec<A> sigma = sigmoid(h);
      return sigma * (1 + h * (1 - sigma));
    }
    case Act::hardswish:
      return h <= -3 ? zero : h >= 3 ? one : h / 3 + A(0.5);
    case Act::gelu: {
      const Vec<A> density = exp(A(-0.5) * h * h) * A(0.3989422804014327);  // 1 / sqrt(2 pi)
      return A(0.5) * (1 + erf(h * A(0.7071067811865476))) + h * density;
    }
    case Act::mish: {
      const Vec<A> t = tanh_softplus(h);
      return t + h * sigmoid(h) * (1 - t * t);
    }
  }
  return one;
}

// grad act'(h). Where the derivative of relu and its kin is 0 it selects, as torch's does: NaN and infinity stop there.
template <class A>
ATTNKERN_INLINE Vec<A> activation_backward(Act act, Vec<A> h, Vec<A> slope, Vec<A> grad) {
  const Vec<A> derivative = activation_grad<A>(act, h, slope);
  const bool selects = act == Act::relu || act == Act::relu6 || act == Act::hardswish;
  return selects ? (derivative == 0 ? Vec<A>{} : grad * derivative) : grad * derivative;
}

template <class A>
ATTNKERN_INLINE Vec<A> gate(const Options& o, Vec<A> z) {
  const Vec<A> zero{}, one = zero + 1;
  switch (o.gate) {
    case Gate::identity:
      return z;
    case Gate::sigmoid:
      return sigmoid(z);
    case Gate::relu:
      return z <= 0 ? zero : z;
    case Gate::tanh:
      return tanh(z);
    case Gate::hard_sigmoid: {
      const Vec<A> v = A(o.gate_slope) * z + A(o.gate_offset);
      return v <= 0 ? zero : v >= 1 ? one : v;
    }
  }
  return z;
}

template <class A>
ATTNKERN_INLINE Vec<A> gate_grad(const Options& o, Vec<A> z) {
  const Vec<A> zero{}, one = zero + 1;
  switch (o.gate) {
    case Gate::identity:
      return one;
    case Gate::relu:
      return z <= 0 ? zero : one;
    case Gate::sigmoid: {
      const Vec<A> g = sigmoid(z);
      return g * (1 - g);
    }
    case Gate::tanh: {
      const Vec<A> g = tanh(z);
      return 1 - g * g;
    }
    case Gate::hard_sigmoid: {
      const Vec<A> v = A(o.gate_slope) * z + A(o.gate_offset);
      return v > 0 ? (v < 1 ? zero + A(o.gate_slope) : zero) : zero;
    }
  }
  return one;
}

// grad gate'(z), selecting as activation_backward does.
template <class A>
ATTNKERN_INLINE Vec<A> gate_backward(const Options& o, Vec<A> z, Vec<A> grad) {
  const Vec<A> derivative = gate_grad<A>(o, z);
  const bool selects = o.gate == Gate::relu || o.gate == Gate::hard_sigmoid;
  return selects ? (derivative == 0 ? Vec<A>{} : grad * derivative) : grad * derivative;
}

}  // namespace attnkern::squeeze_excite::ATTNKERN_ISA
