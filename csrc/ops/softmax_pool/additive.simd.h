// The additive scorer e[m,t] = w . act(k[t] + q[m]) + c[m] and its gradients.
//
//   Computes  dh = de w act'(k + q);  dk = sum_m dh,  dq = sum_t dh,  dw = sum_mt de act(k + q)
//   Layout    keys in place; lanes along their adjacent axis: features of rows, items of columns
//   Mapping   one call a tile; a key's vector is read once for all queries
//   Traffic   act(k + q) lives in registers; dk of a tile goes through the thread's scratch
//   Numerics  chains of at most a tile's items, or kChain features
namespace attnkern::softmax_pool::ATTNKERN_ISA {

template <HiddenAct act, class A>
struct WeighActivation {
  const A* w;
  template <class V, class Access>
  ATTNKERN_INLINE void operator()(V& sum, V q, V k, int64_t i, const Access& access) const {
    sum += access.read(w + i) * activation<act>(k + q);
  }
};

template <class T>
struct AdditiveScorer : Scorer<T> {
  using Scorer<T>::Scorer, Scorer<T>::p, Scorer<T>::u, Scorer<T>::s, Scorer<T>::n;
  using A = Accumulator<T>;
  const int64_t queries = p.sizes.queries, hidden = p.sizes.hidden;
  const A* q = this->rows();
  const A* w = static_cast<const A*>(p.w);

  void score(A* e) const {
    const auto x = this->keys();
    visit_act(p.act, [&](auto act) {
      if (x.columns)
        score_columns<act()>(x, e);
      else
        inner<false, A, T>({q, hidden}, {x.p, x.ld}, {e, s.tile}, queries, n, hidden, WeighActivation<act(), A>{w});
    });
    this->add_c(e);
  }

  template <HiddenAct act>
  void score_columns(Tile<const T> x, A* e) const {
    each_vector<A>(n, [&](int64_t t, auto access) {
      for (int64_t m = 0; m < queries; ++m) {
        Vec<A> total{};
        for (int64_t first = 0; first < hidden; first += kChain) {
          const int64_t last = hidden - first < kChain ? hidden : first + kChain;
          Vec<A> sums{};
          for (int64_t k = first; k < last; ++k)
            sums += w[k] * activation<act>(access.read(x.p + k * x.ld + t) + q[m * hidden + k]);
          total += sums;
        }
        access.write(e + m * s.tile + t, total);
      }
    });
  }

  // The keys' gradient in the values' place where they are the values; else none is left to do.
  Tile<A> backward(const BackwardParams& b, const A* de, const Sums& sums) const {
    const bool own = b.dkeys.data, values = !p.keys.data && b.dvalues.data;
    if (!own && !values && !sums.dquery && !sums.dw) return {};
    const auto x = this->keys();
    const Tile<A> dk{static_cast<A*>(s.items), x.columns ? s.tile : hidden, x.columns};
    visit_act(p.act, [&](auto act) {
      x.columns ? backward_columns<act()>(x, de, dk, sums) : backward_rows<act()>(x, de, dk, sums);
    });
    if (own) put_items(dk, tile_of<T>(b.dkeys, hidden, this->sample, u.h, this->begin), n, hidden);
    return values ? dk : Tile<A>{};
  }

  // One element of dh for every query; adds to dw and the queries' sums, returns dk.
  template <HiddenAct act, class De, class Q>
  ATTNKERN_INLINE Vec<A> backward_vector(Vec<A> k, Vec<A> wk, const De& de, const Q& query, Vec<A>& dw) const {
    Vec<A> dk{}, weight{};
    A* dq = static_cast<A*>(s.query_sums);
    for (int64_t m = 0; m < queries; ++m) {
      const Vec<A> h = k + query(m), a = activation<act>(h), d = de(m);
      const Vec<A> dh = d * wk * activation_grad<act>(h, a);
      weight += d * a;
      dk += dh;
      store(dq + m * kLanes<A>, load(dq + m * kLanes<A>) + dh);
    }
    dw += weight;
    return dk;
  }

  template <HiddenAct act>
  void backward_rows(Tile<const T> x, const A* de, Tile<A> dk, const Sums& sums) const {
    A* query_sums = static_cast<A*>(s.query_sums);
    each_vector<A>(hidden, [&](int64_t k, auto access) {
      std::memset(query_sums, 0, queries * sizeof(Vec<A>));
      Vec<A> dw{};
      const Vec<A> wk = access.read(w + k);
      for (int64_t t = 0; t < n; ++t) {
        const Vec<A> out = backward_vector<act>(
            access.read(x.p + t * x.ld + k), wk, [&](int64_t m) { return splat(de[m * s.tile + t]); },
            [&](int64_t m) { return access.read(q + m * hidden + k); }, dw);
        access.write(dk.p + t * dk.ld + k, out);
      }
      add_to(sums.dw, k, dw, access);
      for (int64_t m = 0; m < queries; ++m)
        add_to(sums.dquery, m * hidden + k, load(query_sums + m * kLanes<A>), access);
    });
  }

  template <HiddenAct act>
  void backward_columns(Tile<const T> x, const A* de, Tile<A> dk, const Sums& sums) const {
    A* query_sums = static_cast<A*>(s.query_sums);
    for (int64_t k = 0; k < hidden; ++k) {
      std::memset(query_sums, 0, queries * sizeof(Vec<A>));
      Vec<A> dw{};
      const Vec<A> wk = splat(w[k]);
      each_vector<A>(n, [&](int64_t t, auto access) {
        const Vec<A> out = backward_vector<act>(
            access.read(x.p + k * x.ld + t), wk, [&](int64_t m) { return access.read(de + m * s.tile + t); },
            [&](int64_t m) { return splat(q[m * hidden + k]); }, dw);
        access.write(dk.p + k * dk.ld + t, out);
      });
      add_to(sums.dw, k, splat(sum<A>(dw)), Part{1});
      for (int64_t m = 0; m < queries; ++m)
        add_to(sums.dquery, m * hidden + k, splat(sum<A>(load(query_sums + m * kLanes<A>))), Part{1});
    }
  }

  template <class Access>
  ATTNKERN_INLINE static void add_to(void* sums, int64_t i, Vec<A> v, const Access& access) {
    A* out = static_cast<A*>(sums) + i;
    if (sums) access.write(out, access.read(out) + v);
  }
};

}  // namespace attnkern::softmax_pool::ATTNKERN_ISA
