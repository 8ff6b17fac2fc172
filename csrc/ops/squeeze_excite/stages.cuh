// What forward and backward do with an element: the only difference between their sweeps.
//
//   sum sweep      forward: v = x, sums x                 backward: v = dy out_act'(u), sums v x and v
//   rescale sweep  forward: y = out_act(residual + a v + t)   backward: dx = a v + k, dresidual = v
#pragma once

#include "cuda/activation.cuh"
#include "ops/squeeze_excite/piece.cuh"

namespace attnkern::squeeze_excite {

// d gain of a sample.
ATTNKERN_DEVICE float branch_scale(const Inputs& p, int64_t sample) {
  const float gain = static_cast<float>(p.options.gain);
  return p.drop_path ? gain * load_global(static_cast<const float*>(p.drop_path) + sample) : gain;
}

// s and t of y = s x + t, before d gain, from the logits z of a channel (and its shift).
struct Scaling {
  float s, t;
};

ATTNKERN_DEVICE Scaling scaling(const Options& o, float z, float shift) {
  const float g = gate_value(o.gate, z, static_cast<float>(o.gate_slope), static_cast<float>(o.gate_offset));
  switch (o.apply) {
    case Apply::scale:
      return {g, 0.0f};
    case Apply::scale1p:
      return {1.0f + g, 0.0f};
    case Apply::scale_shift:
      return {g, shift};
    default:
      return {1.0f, g};
  }
}

// Values of V elements from a per-channel array: the row's channels first, the columns' channels last.
template <int V, bool last>
ATTNKERN_DEVICE Vec<float, V> per_element(const Shared<float>& values, const Position& at) {
  if constexpr (last) {
    return values.template load_vec<V>(static_cast<int>(at.column));
  } else {
    const float here = values.load(at.row), next = at.left < V ? values.load(at.row + 1) : here;
    Vec<float, V> out;
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = j < at.left ? here : next;
    return out;
  }
}

// u[j] = f(act, u[j]) for the output activations, with the choice outside the loop.
template <int V, class F>
ATTNKERN_DEVICE void each_element(Act act, Vec<float, V>& u, const F& f) {
  const auto all = [&](Act chosen) {
#pragma unroll
    for (int j = 0; j < V; ++j) u[j] = f(chosen, u[j]);
  };
  switch (act) {
    case Act::relu:
      return all(Act::relu);
    case Act::relu6:
      return all(Act::relu6);
    case Act::silu:
      return all(Act::silu);
    case Act::hardswish:
      return all(Act::hardswish);
    case Act::gelu:
      return all(Act::gelu);
    default:
      return all(Act::identity);
  }
}

template <class T, bool last>
struct Forward {
  using Params = ForwardParams;
  using Element = T;
  static constexpr bool kChannelsLast = last;
  static constexpr int kSums = 1;
  static constexpr int kUnroll = kForwardUnroll;
  static constexpr bool kBackward = false;

  const Params& p;
  const Arrays& s;
  cuda::Shared<T> data;  // the piece's elements, where they stay
  PieceMap<const T> x, residual;
  PieceMap<T> y;
  PieceMask mask;

  ATTNKERN_DEVICE Forward(const Params& p, const Plan& plan, const Piece& piece, const Arrays& s)
      : p(p),
        s(s),
        data(cuda::Shared<T>::at(0, plan.held_bytes / static_cast<int>(sizeof(T)))),
        x(p.x, piece),
        residual(p.residual, piece),
        y(p.y, piece),
        mask(p.mask, p, piece) {}

  template <int V>
  struct Loaded {
    Vec<T, V> x;
  };

  template <int V, Cache hint>
  ATTNKERN_DEVICE Loaded<V> load(const Position& at, bool /*sums*/) const {
    return {load_global_vec<V, hint>(x.at(at))};
  }

  template <int V>
  ATTNKERN_DEVICE Vec<T, V> value(const Loaded<V>& in, const Position&, Vec<float, V> (&terms)[kSums]) const {
    terms[0] = widen(in.x);
    return in.x;
  }

  ATTNKERN_DEVICE bool stores() const { return true; }
  ATTNKERN_DEVICE bool reads_beside() const { return residual.data != nullptr; }

  template <int V>
  ATTNKERN_DEVICE Vec<T, V> load_beside(const Position& at) const {
    return load_global_vec<V, Cache::streaming>(residual.at(at));
  }

  // Stores V elements; returns their mask bits.
  template <int V>
  ATTNKERN_DEVICE uint32_t store(const Vec<T, V>& value, const Vec<T, V>& beside, const Position& at) const {
    const Vec<float, V> a = per_element<V, last>(s.a, at), t = per_element<V, last>(s.t, at);
    const Act act = p.options.out_act;
    uint32_t bits = 0;
    Vec<float, V> u;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      u[j] = a[j] * widen(value[j]) + t[j];
      if (residual.data) u[j] += widen(beside[j]);
      bits |= static_cast<uint32_t>(mask_bit(act, u[j])) << j;
    }
    each_element(act, u, [](Act act, float u) { return activation(act, u); });
    store_global_vec<Cache::normal>(y.at(at), narrow<T, V>(u));
    return bits;
  }
};

template <class T, bool last>
struct Backward {
  using Params = BackwardParams;
  using Element = T;
  static constexpr bool kChannelsLast = last;
  static constexpr int kSums = 2;
  static constexpr int kUnroll = kBackwardUnroll;
  static constexpr bool kBackward = true;

  const Params& p;
  const Arrays& s;
  cuda::Shared<T> data;  // the piece's elements, where they stay
  PieceMap<const T> x, dy, residual;
  PieceMap<T> dx, dresidual;
  PieceMask mask;

  ATTNKERN_DEVICE Backward(const Params& p, const Plan& plan, const Piece& piece, const Arrays& s)
      : p(p),
        s(s),
        data(cuda::Shared<T>::at(0, plan.held_bytes / static_cast<int>(sizeof(T)))),
        x(p.x, piece),
        dy(p.dy, piece),
        residual(p.residual, piece),
        dx(p.dx, piece),
        dresidual(p.dresidual, piece),
        mask(p.mask, p, piece) {}

  template <int V>
  struct Loaded {
    Vec<T, V> dy, x;
    uint32_t bits;
  };

  // out_act' needs u, not a bit.
  ATTNKERN_DEVICE bool recomputes() const { return p.options.out_act != Act::identity && !mask.data; }

  // x enters the sums; v itself needs it only where out_act' does.
  template <int V, Cache hint>
  ATTNKERN_DEVICE Loaded<V> load(const Position& at, bool sums) const {
    Loaded<V> in;
    in.dy = load_global_vec<V, hint>(dy.at(at));
    in.x = sums || recomputes() ? load_global_vec<V, hint>(x.at(at)) : Vec<T, V>{};
    in.bits = mask.data ? mask.template bits<V>(at) : ~0u;
    return in;
  }

  template <int V>
  ATTNKERN_DEVICE Vec<T, V> value(const Loaded<V>& in, const Position& at, Vec<float, V> (&terms)[kSums]) const {
    Vec<float, V> v = widen(in.dy);
    if (recomputes()) {
      const Vec<float, V> a = per_element<V, last>(s.a, at), t = per_element<V, last>(s.t, at);
      Vec<float, V> u{};
      if (residual.data) u = widen(load_global_vec<V>(residual.at(at)));
#pragma unroll
      for (int j = 0; j < V; ++j) u[j] += a[j] * widen(in.x[j]) + t[j];
      each_element(p.options.out_act, u, [](Act act, float u) { return activation_grad(act, u); });
#pragma unroll
      for (int j = 0; j < V; ++j) v[j] *= u[j];
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) v[j] = in.bits >> j & 1 ? v[j] : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < V; ++j) terms[0][j] = v[j] * widen(in.x[j]);
    terms[1] = v;
    return narrow<T, V>(v);
  }

  ATTNKERN_DEVICE bool stores() const { return dx.data || dresidual.data; }
  ATTNKERN_DEVICE bool reads_beside() const { return false; }

  template <int V>
  ATTNKERN_DEVICE Vec<T, V> load_beside(const Position&) const {
    return {};
  }

  template <int V>
  ATTNKERN_DEVICE uint32_t store(const Vec<T, V>& value, const Vec<T, V>&, const Position& at) const {
    if (dresidual.data) store_global_vec<Cache::normal>(dresidual.at(at), value);
    if (!dx.data) return 0;
    const Vec<float, V> a = per_element<V, last>(s.a, at), k = per_element<V, last>(s.k, at);
    Vec<T, V> out;
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = narrow<T>(a[j] * widen(value[j]) + k[j]);
    store_global_vec<Cache::normal>(dx.at(at), out);
    return 0;
  }
};

}  // namespace attnkern::squeeze_excite
