// The hidden layer of a tile: h = t + u + bias, its dot with psi, and its gradients.
//
//   Computes  q = psi . act(h);  dh = dq psi act'(h), dt = dh or scale dh + k0 + k1 t, du alike;
//             sums over positions of dh, dq act(h), dh t, dh u;  mean and squares of t
//   Layout    rows [positions, leading(F)], lanes along F, zero beyond F: the same for both layouts of the maps
//   Mapping   one call a tile; a vector of F at a time over its positions, four sums side by side
//   Traffic   the rows lie in L1 or L2 from the product that made them to those that they enter
//   Numerics  a tile's sums are four chains of tile / 4 terms; they join their group's tile by tile
namespace attnkern::attention_gate::ATTNKERN_ISA {

template <class A>
ATTNKERN_INLINE const A* vector_of(const Weights& w, VectorOf which, int64_t hidden) {
  return static_cast<const A*>(w.vectors) + which * padded(hidden);
}

// h from its parts: t already has u in it, or stands beside it.
template <class A, bool split>
struct Hidden {
  RowsAt<A> t, u;
  const A *bias, *psi, *theta_scale, *phi_scale;
  A slope;
  Hidden(const Inputs& p, const Weights& w, const Scratch& s)
      : t{static_cast<A*>(s.t), leading(p.sizes.hidden)},
        u{static_cast<A*>(s.u), leading(p.sizes.hidden)},
        bias(vector_of<A>(w, kBias, p.sizes.hidden)),
        psi(vector_of<A>(w, kPsi, p.sizes.hidden)),
        theta_scale(vector_of<A>(w, kThetaScale, p.sizes.hidden)),
        phi_scale(vector_of<A>(w, kPhiScale, p.sizes.hidden)),
        slope(static_cast<A>(p.slope)) {}

  ATTNKERN_INLINE Vec<A> at(int64_t l, int64_t f) const {
    if constexpr (split)
      return load(theta_scale + f) * load(t.p + l * t.ld + f) + load(phi_scale + f) * load(u.p + l * u.ld + f) +
             load(bias + f);
    else
      return load(t.p + l * t.ld + f) + load(bias + f);
  }
};

// q[l] = psi . act(h[l]) + psi_bias
template <class A>
void logits(const Inputs& p, const Weights& w, const Scratch& s, int64_t n, A* q) {
  const Hidden<A, false> h(p, w, s);
  const int64_t width = padded(p.sizes.hidden);
  const A shift = p.psi_bias ? *static_cast<const A*>(p.psi_bias) : A(0);
  constexpr int lanes = kLanes<A>;
  visit_act(p.act, [&](auto act) {
    for (int64_t l = 0; l < n; l += lanes) {
      const int64_t count = n - l < lanes ? n - l : lanes;
      Vec<A> v[lanes] = {};
      for (int64_t i = 0; i < count; ++i)
        for (int64_t f = 0; f < width; f += lanes) v[i] += load(h.psi + f) * activation<act()>(h.at(l + i, f), h.slope);
      const Vec<A> all = sum_each<A>(v) + shift;
      count == lanes ? store(q + l, all) : store_n(q + l, all, count);
    }
  });
}

// out[i] = the sum of term i over n positions, in four chains; add(l, sums) adds the terms of position l.
template <class A, int count, class F>
ATTNKERN_INLINE void sum_positions(int64_t n, Vec<A> (&out)[count], const F& add) {
  Vec<A> sums[4][count] = {};
  int64_t l = 0;
  for (; l + 4 <= n; l += 4)
    for (int i = 0; i < 4; ++i) add(l + i, sums[i]);
  for (; l < n; ++l) add(l, sums[0]);
  for (int i = 0; i < count; ++i) out[i] = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
}

template <class A>
ATTNKERN_INLINE void add_vector(void* to, int64_t f, Vec<A> v) {
  A* p = static_cast<A*>(to) + f;
  if (to) store(p, load(p) + v);
}

// t, and u where it stands beside, become their gradients.
template <class A, bool split>
void hidden_backward(const BackwardParams& p, const Weights& w, const Scratch& s, int64_t n, const Sums& sums) {
  const Hidden<A, split> h(p, w, s);
  const int64_t hidden = p.sizes.hidden;
  const A* dq = static_cast<const A*>(s.dq);
  const auto branch = [&](Vec<A> dh, Vec<A> t, const Branch& own, VectorOf scale, int64_t f) ATTNKERN_INLINE_LAMBDA {
    const auto at = [&](int i) { return load(vector_of<A>(w, static_cast<VectorOf>(scale + i), hidden) + f); };
    return own.scale ? at(0) * dh + at(1) + at(2) * t : dh;
  };
  visit_act(p.act, [&](auto act) {
    for (int64_t f = 0; f < padded(hidden); f += kLanes<A>) {
      Vec<A> total[2];
      sum_positions<A>(n, total, [&](int64_t l, Vec<A>(&sum)[2]) ATTNKERN_INLINE_LAMBDA {
        const Vec<A> hi = h.at(l, f);
        const Vec<A> dh = activation_backward<act()>(hi, h.slope, dq[l] * load(h.psi + f));
        sum[0] += dh;
        sum[1] += dq[l] * activation<act()>(hi, h.slope);
        A* t = h.t.p + l * h.t.ld + f;
        if constexpr (split) {
          A* u = h.u.p + l * h.u.ld + f;
          store(t, branch(dh, load(t), p.theta_branch, kThetaScale, f));
          store(u, branch(dh, load(u), p.phi_branch, kPhiScale, f));
        } else {
          store(t, dh);
        }
      });
      add_vector<A>(sums.bias, f, total[0]);
      add_vector<A>(sums.psi, f, total[1]);
    }
  });
}

template <class A>
void hidden_sums(const SumsParams& p, const Weights& w, const Scratch& s, int64_t n, const A* dq, const Sums& sums) {
  const Hidden<A, true> h(p, w, s);
  visit_act(p.act, [&](auto act) {
    for (int64_t f = 0; f < padded(p.sizes.hidden); f += kLanes<A>) {
      Vec<A> total[3];
      sum_positions<A>(n, total, [&](int64_t l, Vec<A>(&sum)[3]) ATTNKERN_INLINE_LAMBDA {
        const Vec<A> dh = activation_backward<act()>(h.at(l, f), h.slope, dq[l] * load(h.psi + f));
        sum[0] += dh;
        sum[1] += dh * load(h.t.p + l * h.t.ld + f);
        sum[2] += dh * load(h.u.p + l * h.u.ld + f);
      });
      add_vector<A>(sums.dh, f, total[0]);
      add_vector<A>(sums.dht, f, total[1]);
      add_vector<A>(sums.dhu, f, total[2]);
    }
  });
}

// ---- moments: mean and M2, the sum of squares about it, of sets that are joined (Chan et al. 1979)

// (mean, M2) of `count` values join those of `before`.
template <class V, class A>
ATTNKERN_INLINE void join(V& mean, V& squares, A before, V other_mean, V other_squares, A count) {
  const A part = count / (before + count);
  const V apart = other_mean - mean;
  mean += apart * part;
  squares += other_squares + apart * apart * (before * part);
}

// t's n rows join mean and squares, of `before` values.
template <class A>
void add_moments(RowsAt<const A> t, int64_t n, int64_t before, int64_t width, A* mean, A* squares) {
  for (int64_t f = 0; f < width; f += kLanes<A>) {
    const auto at = [&](int64_t l) ATTNKERN_INLINE_LAMBDA { return load(t.p + l * t.ld + f); };
    Vec<A> total[1], apart[1];
    sum_positions<A>(n, total, [&](int64_t l, Vec<A>(&sum)[1]) ATTNKERN_INLINE_LAMBDA { sum[0] += at(l); });
    const Vec<A> own = total[0] / static_cast<A>(n);
    sum_positions<A>(
        n, apart, [&](int64_t l, Vec<A>(&sum)[1]) ATTNKERN_INLINE_LAMBDA { sum[0] += (at(l) - own) * (at(l) - own); });
    Vec<A> m = load(mean + f), q = load(squares + f);
    join(m, q, static_cast<A>(before), own, apart[0], static_cast<A>(n));
    store(mean + f, m);
    store(squares + f, q);
  }
}

}  // namespace attnkern::attention_gate::ATTNKERN_ISA
