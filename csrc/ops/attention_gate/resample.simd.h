// A g that phi has already been applied to, between its positions, and the way back.
//
//   Computes  u[l,f] = sum over two taps a dim of their weights g[f, tap];  dg[f,tap] = the adjoint of du[l,f]
//   Layout    u and du [positions, leading(F)] rows; dg in slabs [positions of g, padded(F)], one a unit
//   Mapping   one call a tile; runs along the last dim first meet up to four rows of g, then two positions of their sum
//   Traffic   a row of g is read for each run that lies beside it, from cache; slabs meet at their edges alone
//   Numerics  units' slabs are added in their order: the same bits for any number of threads
namespace attnkern::attention_gate::ATTNKERN_ISA {

// The two positions of g that a position of the grid lies between along one dim, and how much of each. Where they are
// one it has the whole weight: the other's 0 times infinity would be NaN.
template <class A>
struct Tap {
  int64_t at[2], count;
  A weight[2];
  Tap(const Inputs& p, int dim, int64_t q) {
    for (int d = 0; d < dim; ++d) q += p.sizes.grid[d];
    const A* w = static_cast<const A*>(p.tap_weights) + 2 * q;
    for (int i = 0; i < 2; ++i) at[i] = p.taps[2 * q + i], weight[i] = w[i];
    count = at[0] == at[1] ? 1 : 2;
    if (count == 1) weight[0] += weight[1];
  }
};

// Rows of g along its last dim beside a run, and how much of each.
template <class A>
struct RowTaps {
  int64_t row[4], count = 0;
  A weight[4];
  RowTaps(const Inputs& p, int64_t q1, int64_t q2) {
    const Tap<A> a(p, 0, q1), b(p, 1, q2);
    for (int64_t i = 0; i < a.count; ++i)
      for (int64_t j = 0; j < b.count; ++j) {
        row[count] = a.at[i] * p.sizes.g[1] + b.at[j];
        weight[count++] = a.weight[i] * b.weight[j];
      }
  }
};

// to[j] = sum over taps of weight row(tap)[j], in whole vectors
template <class A, class F>
ATTNKERN_INLINE void mix(const RowTaps<A>& taps, const F& row, A* to, int64_t n) {
  each_vector<A>(n, [&](int64_t j, auto access) {
    Vec<A> sum = taps.weight[0] * access.read(row(taps.row[0]) + j);
    for (int64_t i = 1; i < taps.count; ++i) sum += taps.weight[i] * access.read(row(taps.row[i]) + j);
    store(to + j, sum);
  });
}

// u [n, leading(F)], zero from F on
template <class T, class A>
void resample(const Inputs& p, bool last, int64_t b, int64_t begin, int64_t n, const Scratch& s, A* u) {
  const int64_t hidden = p.sizes.hidden, ld = leading(hidden), width = padded(hidden);
  A *coarse = static_cast<A*>(s.coarse), *columns = static_cast<A*>(s.coarse_columns);
  each_run(p.sizes, begin, n, [&](int64_t q1, int64_t q2, int64_t q3, int64_t run, int64_t at) {
    const Range r = taps_of(p, 2, q3, q3 + run);
    const RowTaps<A> rows(p, q1, q2);
    const auto position = [&](int64_t row) { return row * p.sizes.g[2] + r.begin; };
    if (last) {
      for (int64_t i = 0; i < r.end - r.begin; ++i) {
        if (width != hidden) store_zeros(coarse + i * ld, width);
        mix(rows, [&](int64_t row) { return element<const T>(p.g, b, 0, position(row) + i); }, coarse + i * ld, hidden);
      }
    } else {
      for (int64_t f = 0; f < width; ++f)
        f < hidden ? mix(
                         rows, [&](int64_t row) { return element<const T>(p.g, b, f, position(row)); },
                         columns + f * s.coarse_ld, r.end - r.begin)
                   : store_zeros(columns + f * s.coarse_ld, r.end - r.begin);
      transpose<A>({columns, s.coarse_ld}, {coarse, ld}, width, r.end - r.begin);
    }
    for (int64_t l = 0; l < run; ++l) {
      const Tap<A> tap(p, 2, q3 + l);
      const A* c[2];
      for (int i = 0; i < 2; ++i) c[i] = coarse + (tap.at[i] - r.begin) * ld;
      A* to = u + (at + l) * ld;
      for (int64_t f = 0; f < width; f += kLanes<A>) {
        Vec<A> sum = tap.weight[0] * load(c[0] + f);
        if (tap.count == 2) sum += tap.weight[1] * load(c[1] + f);
        store(to + f, sum);
      }
    }
  });
}

// The slab += the adjoint of du [n, leading(F)].
template <class A>
void add_to_slab(const Inputs& p, int64_t begin, int64_t n, const Scratch& s, const A* du, const Slab& slab) {
  const int64_t ld = leading(p.sizes.hidden), width = padded(p.sizes.hidden);
  A* coarse = static_cast<A*>(s.coarse);
  each_run(p.sizes, begin, n, [&](int64_t q1, int64_t q2, int64_t q3, int64_t run, int64_t at) {
    const Range r = taps_of(p, 2, q3, q3 + run);
    const RowTaps<A> rows(p, q1, q2);
    for (int64_t i = 0; i < r.end - r.begin; ++i) store_zeros(coarse + i * ld, width);
    for (int64_t l = 0; l < run; ++l) {
      const Tap<A> tap(p, 2, q3 + l);
      for (int i = 0; i < tap.count; ++i) {
        A* to = coarse + (tap.at[i] - r.begin) * ld;
        for (int64_t f = 0; f < width; f += kLanes<A>)
          store(to + f, load(to + f) + tap.weight[i] * load(du + (at + l) * ld + f));
      }
    }
    for (int64_t j = 0; j < rows.count; ++j) {
      A* to = static_cast<A*>(slab.data) + (rows.row[j] * p.sizes.g[2] + r.begin - slab.positions.begin) * width;
      for (int64_t i = 0; i < r.end - r.begin; ++i)
        for (int64_t f = 0; f < width; f += kLanes<A>)
          store(to + i * width + f, load(to + i * width + f) + rows.weight[j] * load(coarse + i * ld + f));
    }
  });
}

template <class T>
void merge_slabs_of(const BackwardParams& p, int64_t b, Range positions, const Slab* slabs, int64_t count, void* rows,
                    void* columns) {
  using A = Accumulator<T>;
  const int64_t hidden = p.sizes.hidden, ld = leading(hidden), width = padded(hidden);
  const int64_t n = positions.end - positions.begin;
  A *sum = static_cast<A*>(rows), *across = static_cast<A*>(columns);
  for (int64_t l = 0; l < n; ++l) store_zeros(sum + l * ld, width);
  for (int64_t i = 0; i < count; ++i) {
    const Range own = slabs[i].positions;
    const int64_t from = own.begin > positions.begin ? own.begin : positions.begin;
    const int64_t to = own.end < positions.end ? own.end : positions.end;
    for (int64_t l = from; l < to; ++l) {
      const A* part = static_cast<const A*>(slabs[i].data) + (l - own.begin) * width;
      A* row = sum + (l - positions.begin) * ld;
      for (int64_t f = 0; f < width; f += kLanes<A>) store(row + f, load(row + f) + load(part + f));
    }
  }
  if (channels_last(p.x)) {
    for (int64_t l = 0; l < n; ++l) copy(sum + l * ld, element<T>(p.dg, b, 0, positions.begin + l), hidden);
    return;
  }
  transpose<A>({sum, ld}, {across, leading(n)}, n, width);
  for (int64_t f = 0; f < hidden; ++f) copy(across + f * leading(n), element<T>(p.dg, b, f, positions.begin), n);
}

}  // namespace attnkern::attention_gate::ATTNKERN_ISA
