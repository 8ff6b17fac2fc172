// The gated scorer e[m,t] = w[m] . (act(V x[t] + b_V) * sigmoid(U x[t] + b_U)) + c[m] and its gradients.
//
//   Computes  h = act(a) sigmoid(b);  g = sum_m de w, da = g sigmoid(b) act'(a), db = g act(a) sigmoid'(b),
//             dx = V^T da + U^T db, dV = sum_t da x^T, dU = sum_t db x^T, dw = sum_t de h
//   Layout    a tile of items as rows; hidden rows [a | b], each half padded to 16; V and U packed in panels of columns
//   Mapping   one call a tile: a product over the panels, then the nonlinear part over its hidden rows in cache
//   Traffic   the weights' panels once a tile from L2 or L3; the hidden layer lives in the thread's scratch
//   Numerics  products in chains of kChain terms; the gradients' sums join their total tile by tile. bfloat16 is
//             multiplied in pairs where the processor can: da and db are rounded to it, as torch's are
namespace attnkern::softmax_pool::ATTNKERN_ISA {

// Column block `block` of [V | U]^T [D, columns], or of [V ; U] [columns, D], as panels.
template <class T>
void pack_block(const Inputs& p, bool back, int64_t block, void* panels) {
  using A = Accumulator<T>;
  constexpr int64_t width = kPanel<A>;
  const int64_t features = p.sizes.features, hidden = p.sizes.hidden, half = half_of(p);
  const int64_t inner = steps<T>(back ? hidden_columns(p) : features);
  const auto weight = [&](int64_t column, int64_t k) {
    const int64_t unit = back ? k : column, feature = back ? column : k;
    const T* matrix = static_cast<const T*>(unit < half ? p.V : p.U);
    const int64_t row = unit < half ? unit : unit - half;
    return matrix && row < hidden && feature < features ? matrix[row * features + feature] : T{};
  };
  Term<T>* to = static_cast<Term<T>*>(panels) + block * kBlockColumns * inner;
  for (int64_t first = block * kBlockColumns; first < (block + 1) * kBlockColumns; first += width)
    for (int64_t k = 0; k < inner; ++k)
      for (int64_t i = first; i < first + width; ++i, ++to) {
        if constexpr (kPaired<T>) {
          to->bits = weight(i, 2 * k).bits | static_cast<uint32_t>(weight(i, 2 * k + 1).bits) << 16;
        } else {
          const T one = weight(i, k);
          *to = load_one<A>(&one);
        }
      }
}

template <class T>
struct GatedScorer : Scorer<T> {
  using Scorer<T>::Scorer, Scorer<T>::p, Scorer<T>::u, Scorer<T>::s, Scorer<T>::n;
  using A = Accumulator<T>;
  const int64_t queries = p.sizes.queries, features = p.sizes.features, units = p.sizes.hidden;
  const int64_t half = half_of(p), columns = hidden_columns(p), ld = columns + 16;
  const A* w = static_cast<const A*>(p.w);
  A* hidden = static_cast<A*>(s.hidden);  // [tile, ld]: a and b
  using X = Copied<T>;
  Tile<const X> x{};

  // The tile as rows of what the products read: in place, or in scratch.
  void at(int64_t first, int64_t count) {
    Scorer<T>::at(first, count);
    const Tile<const T> in = Scorer<T>::values();
    if constexpr (std::is_same_v<T, X>) {
      const bool whole =
          !kPaired<T> || (features % 2 == 0 && in.ld % 2 == 0 && reinterpret_cast<uintptr_t>(in.p) % 4 == 0);
      if (!in.columns && whole) return void(x = in);
    }
    const Tile<X> staged{static_cast<X*>(s.staged), round_up(features, 2) + 16, false};
    put_items(in, staged, n, features);
    if constexpr (kPaired<T>) {
      if (features % 2)
        for (int64_t t = 0; t < n; ++t) staged.p[t * staged.ld + features] = T{};
    }
    x = {staged.p, staged.ld, false};
  }
  Tile<const X> values() const { return x; }

  // rows [n, length] of X as the left side of a product
  static Strided<Term<T>> rows_of(const X* rows, int64_t ld_rows) {
    return {reinterpret_cast<const Term<T>*>(rows), steps<T>(ld_rows), 1};
  }

  void score(A* e) const {
    panel_product(rows_of(x.p, x.ld), static_cast<const Term<T>*>(s.panels), {hidden, ld}, n, columns,
                  steps<T>(features));
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
    const Operands d = operands(sums.dV);
    add_weights(d, 0, sums.dV, sums.db_V);
    if (p.U) add_weights(d, half, sums.dU, sums.db_U);
    if (!b.dvalues.data) return {};
    const Tile<A> dx{static_cast<A*>(s.items), round_up(features, kBlockColumns) + 16, false};
    panel_product(rows_of(d.rows, ld), static_cast<const Term<T>*>(s.panels_back), {dx.p, dx.ld}, n,
                  round_up(features, kBlockColumns), steps<T>(columns));
    return dx;
  }

  // The tile's da, db and items as the backward products take them.
  struct Operands {
    const X* rows;          // [n, ld] da and db
    const Term<T>* hidden;  // [terms(n), ld] the same, for sums over items
    const Term<T>* items;   // for those, panels of pairs, or the rows of x
  };
  Operands operands(bool sum_items) const {
    if constexpr (!kPaired<T>) {
      return {hidden, hidden, x.p};
    } else {
      const Tile<T> rows{static_cast<T*>(s.rounded), ld, false};
      put_items(Tile<const A>{hidden, ld, false}, rows, n, columns);
      auto* pairs = reinterpret_cast<cpu::Pair*>(rows.p + s.tile * ld);
      auto* items = pairs + steps<T>(s.tile) * ld;
      if (sum_items) {
        pair_rows<T>({rows.p, ld}, n, columns, [&](int64_t k, int64_t j) { return pairs + k * ld + j; });
        pair_rows<T>({x.p, x.ld}, n, features, [&](int64_t k, int64_t j) {
          return items + (j / kPanel<A> * steps<T>(n) + k) * kPanel<A> + j % kPanel<A>;
        });
      }
      return {rows.p, pairs, items};
    }
  }

  // dW += d^T x and db += sum_t d for d [n, units]
  void add_weights(const Operands& d, int64_t first, void* weight, void* bias) const {
    const A one = 1;
    A *dW = static_cast<A*>(weight), *db = static_cast<A*>(bias);
    const Strided<Term<T>> transposed{d.hidden + first, 1, ld};
    if constexpr (kPaired<T>) {
      if (dW) panel_product<true>(transposed, d.items, {dW, features}, units, features, steps<T>(n));
    } else {
      if (dW) outer<A, A, A>(transposed, {d.items, x.ld}, {dW, features}, {dW, features}, units, features, n);
    }
    if (db) outer<A, A, A>({&one, 0, 0}, {hidden + first, ld}, {db, units}, {db, units}, 1, units, n);
  }
};

}  // namespace attnkern::softmax_pool::ATTNKERN_ISA
