// The gated scorer e[m,t] = w[m] . (act(V x[t] + b_V) * sigmoid(U x[t] + b_U)) + c[m] and its gradients.
//
//   Computes  h = act(a) sigmoid(b);  g = sum_m de w, da = g sigmoid(b) act'(a), db = g act(a) sigmoid'(b),
//             dx = V^T da + U^T db, dV = sum_t da x^T, dU = sum_t db x^T, dw = sum_t de h
//   Layout    a tile of items as rows; hidden rows [a | b], each half padded to 16; V and U packed in panels of columns
//   Mapping   one call a tile: a product over the panels, then the nonlinear part over its hidden rows in cache
//   Traffic   the weights' panels once a tile from L2 or L3; the hidden layer lives in the thread's scratch
//   Numerics  products in chains of kChain terms; the gradients' sums join their total tile by tile
namespace attnkern::softmax_pool::ATTNKERN_ISA {

// Column block `block` of [V | U]^T [D, columns], or of [V ; U] [columns, D], as panels.
template <class T>
void pack_block(const Inputs& p, bool back, int64_t block, void* panels) {
  using A = Accumulator<T>;
  constexpr int64_t width = kPanel<A>;
  const int64_t features = p.sizes.features, hidden = p.sizes.hidden, half = half_of(p);
  const int64_t inner = back ? hidden_columns(p) : features;
  const auto weight = [&](int64_t unit, int64_t feature) {
    const T* matrix = static_cast<const T*>(unit < half ? p.V : p.U);
    const int64_t row = unit < half ? unit : unit - half;
    return matrix && row < hidden && feature < features ? load_one<A>(matrix + row * features + feature) : A(0);
  };
  A* to = static_cast<A*>(panels) + block * kBlockColumns * inner;
  for (int64_t first = block * kBlockColumns; first < (block + 1) * kBlockColumns; first += width)
    for (int64_t k = 0; k < inner; ++k)
      for (int64_t i = 0; i < width; ++i) *to++ = back ? weight(k, first + i) : weight(first + i, k);
}

template <class T>
struct GatedScorer : Scorer<T> {
  using Scorer<T>::Scorer, Scorer<T>::p, Scorer<T>::u, Scorer<T>::s, Scorer<T>::n;
  using A = Accumulator<T>;
  const int64_t queries = p.sizes.queries, features = p.sizes.features, units = p.sizes.hidden;
  const int64_t half = half_of(p), columns = hidden_columns(p), ld = columns + 16;
  const A* w = static_cast<const A*>(p.w);
  A* hidden = static_cast<A*>(s.hidden);  // [tile, ld]: a and b
  Tile<const A> x{};

  // The tile as rows in the accumulation type: in place, or in scratch.
  void at(int64_t first, int64_t count) {
    Scorer<T>::at(first, count);
    const Tile<const T> in = Scorer<T>::values();
    if constexpr (std::is_same_v<T, A>) {
      if (!in.columns) return void(x = in);
    }
    const Tile<A> staged{static_cast<A*>(s.staged), features + 16, false};
    put_items(in, staged, n, features);
    x = {staged.p, staged.ld, false};
  }
  Tile<const A> values() const { return x; }

  void score(A* e) const {
    panel_product<A>({x.p, x.ld, 1}, static_cast<const A*>(s.panels), {hidden, ld}, n, columns, features);
    visit_act(p.act, [&](auto act) { p.U ? activate<act(), true>(e) : activate<act(), false>(e); });
    this->add_c(e);
  }

  // h from a and b; backward leaves dh/da and dh/db in their places.
  template <HiddenAct act, bool gate>
  void activate(A* e) const {
    constexpr int64_t kItems = 16;  // 32 KB of hidden rows of 256 units
    const A *b_V = static_cast<const A*>(p.b_V), *b_U = static_cast<const A*>(p.b_U);
    A* h = static_cast<A*>(s.products ? s.products : s.hidden);
    const int64_t ld_h = s.products ? half : ld;
    for (int64_t first = 0; first < n; first += kItems) {
      const int64_t count = n - first < kItems ? n - first : kItems;
      for (int64_t t = first; t < first + count; ++t) {
        A *a = hidden + t * ld, *b = a + half, *out = h + t * ld_h;
        each_vector<A>(units, [&](int64_t i, auto access) ATTNKERN_INLINE_LAMBDA {
          const Vec<A> ai = b_V ? access.read(a + i) + access.read(b_V + i) : access.read(a + i);
          const Vec<A> ti = activation<act>(ai);
          Vec<A> si = splat(A(1)), hi = ti;
          if constexpr (gate) {
            si = sigmoid(b_U ? access.read(b + i) + access.read(b_U + i) : access.read(b + i));
            hi = ti * si;
          }
          access.write(out + i, hi);
          if (!s.products) return;
          access.write(a + i, gate ? si * activation_grad<act>(ai, ti) : activation_grad<act>(ai, ti));
          if constexpr (gate) access.write(b + i, hi * (1 - si));
        });
      }
      inner<false, A, A>({w, units}, {h + first * ld_h, ld_h}, {e + first, s.tile}, queries, count, units);
    }
  }

  // The part of the values' gradient that comes through the scores.
  Tile<A> backward(const BackwardParams& b, const A* de, const Sums& sums) const {
    if (!b.dvalues.data && !sums.dw) return {};
    A* h = static_cast<A*>(s.products);
    if (sums.dw) {
      A* dw = static_cast<A*>(sums.dw);
      outer<A, A, A>({de, s.tile, 1}, {h, half}, {dw, units}, {dw, units}, queries, units, n);
    }
    outer<A, A, A>({de, 1, s.tile}, {w, units}, {nullptr, 0}, {h, half}, n, units, queries);  // g, in h's place
    for (int64_t t = 0; t < n; ++t)
      each_vector<A>(units, [&](int64_t i, auto access) ATTNKERN_INLINE_LAMBDA {
        const Vec<A> g = access.read(h + t * half + i);
        A* a = hidden + t * ld + i;
        access.write(a, access.read(a) * g);
        if (p.U) access.write(a + half, access.read(a + half) * g);
      });
    add_weights(hidden, sums.dV, sums.db_V);
    if (p.U) add_weights(hidden + half, sums.dU, sums.db_U);
    if (!b.dvalues.data) return {};
    const Tile<A> dx{static_cast<A*>(s.items), round_up(features, kBlockColumns) + 16, false};
    panel_product<A>({hidden, ld, 1}, static_cast<const A*>(s.panels_back), {dx.p, dx.ld}, n,
                     round_up(features, kBlockColumns), columns);
    return dx;
  }

  // dW += d^T x and db += sum_t d for d [n, units]
  void add_weights(const A* d, void* weight, void* bias) const {
    const A one = 1;
    A *dW = static_cast<A*>(weight), *db = static_cast<A*>(bias);
    if (dW) outer<A, A, A>({d, 1, ld}, {x.p, x.ld}, {dW, features}, {dW, features}, units, features, n);
    if (db) outer<A, A, A>({&one, 0, 0}, {d, ld}, {db, units}, {db, units}, 1, units, n);
  }
};

}  // namespace attnkern::softmax_pool::ATTNKERN_ISA
