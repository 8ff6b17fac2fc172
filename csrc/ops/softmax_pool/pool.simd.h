// The pooling loop, forward and backward, over the tiles of a unit.
//
//   Computes  l = scale e + bias;  z = sum_n softmax(l) v;  p = softmax(l), dl = p (dz . v - dz . z + dlse),
//             de = scale dl + dscores, dv = sum_m p dz and the scorer's gradients
//   Layout    items in place, rows or columns (params.h); [M, tile] and [M, D] arrays in the thread's scratch
//   Mapping   one call a unit: some items of one head of one sample on one thread; lanes along items for the softmax
//   Traffic   a tile stays in cache from its scores to its weighted sum: items are read once, and written once backward
//   Numerics  online softmax with the running maximum; sums of a tile join the unit's, units' are merged in order
namespace attnkern::softmax_pool::ATTNKERN_ISA {

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

template <class A>
ATTNKERN_INLINE A largest_lane(Vec<A> v) {
  A largest = v[0];
  for (int i = 1; i < kLanes<A>; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
}

// scale e + bias; -inf where the bias is, whatever the score
template <class A>
struct Logits {
  const A* bias;
  A scale;
  template <class Access>
  ATTNKERN_INLINE Vec<A> at(const A* e, int64_t i, const Access& access) const {
    const Vec<A> l = scale * access.read(e + i);
    if (!bias) return l;
    const Vec<A> b = access.read(bias + i);
    return b == -kInfinity<A> ? b : l + b;
  }
};

template <class A>
ATTNKERN_INLINE Logits<A> logits_of(const Inputs& p, const Unit& u, int64_t sample, int64_t m, int64_t begin) {
  const A* bias = row_of<const A>(p.bias, sample, u.h, m);
  return {bias ? bias + begin : nullptr, static_cast<A>(p.scale)};
}

// ---- forward

// e becomes l
template <class A>
ATTNKERN_INLINE void to_logits(const Logits<A>& logits, A* e, int64_t n) {
  each_vector<A>(n,
                 [&](int64_t i, auto access) ATTNKERN_INLINE_LAMBDA { access.write(e + i, logits.at(e, i, access)); });
}

// l becomes exp(l - largest), 0 from n to a whole vector; returns what earlier sums are multiplied by.
template <class A>
ATTNKERN_INLINE A online_softmax(A* e, int64_t n, A& largest, A& total) {
  constexpr int64_t lanes = kLanes<A>;
  Vec<A> top = splat(-kInfinity<A>);
  for (int64_t i = n; i % lanes; ++i) e[i] = -kInfinity<A>;
  for (int64_t i = 0; i < n; i += lanes) {
    const Vec<A> l = load(e + i);
    top = l > top ? l : top;
  }
  const A before = largest, tile = largest_lane<A>(top);
  largest = tile > before ? tile : before;
  const A shift = largest == -kInfinity<A> ? A(0) : largest;
  Vec<A> sums{};
  for (int64_t i = 0; i < n; i += lanes) {
    const Vec<A> p = exp(load(e + i) - shift);
    sums += p;
    store(e + i, p);
  }
  const A rescale = before == largest || before == -kInfinity<A> ? A(1) : std::exp(before - shift);
  total = total * rescale + sum<A>(sums);
  return rescale;
}

// The logit of a row's peak becomes -inf, where it is one of these n from `begin` on; says which item it is.
template <class A>
void leave_out_peak(const ForwardParams& p, int64_t row, int64_t begin, A* l, int64_t n) {
  const int64_t rows = rows_of(p);
  if (!has_peak<A>(p.whole, rows, row)) return;
  const A largest = static_cast<const A*>(p.whole)[row], weight = static_cast<const A*>(p.whole)[rows + row];
  const A bound = largest + std::log(A(kPeak) / weight);
  for (int64_t i = 0; i < n; ++i)
    if (l[i] > bound) p.peaks[row] = begin + i, l[i] = -kInfinity<A>;
}

template <class A>
ATTNKERN_INLINE void multiply(A* row, int64_t n, A factor) {
  each_vector<A>(n, [&](int64_t i, auto access) { access.write(row + i, access.read(row + i) * factor); });
}

// z = sum / total, lse and top of one row
template <class A>
ATTNKERN_INLINE void finish(const ForwardParams& p, int64_t b, int64_t h, int64_t m, A largest, A total,
                            const A* sums) {
  const int64_t row = (b * p.sizes.heads + h) * p.sizes.queries + m;
  A* z = static_cast<A*>(p.z) + row * p.sizes.features;
  const bool none = total == 0;
  if (p.lse) static_cast<A*>(p.lse)[row] = none ? -kInfinity<A> : static_cast<A>(std::log(double{total}) + largest);
  A* top = static_cast<A*>(p.top) + row;
  top[0] = none ? A(0) : largest;
  top[rows_of(p)] = none ? A(0) : 1 / total;
  each_vector<A>(p.sizes.features,
                 [&](int64_t i, auto access) { access.write(z + i, none ? Vec<A>{} : access.read(sums + i) / total); });
}

template <class T, class Scorer>
void pool_unit(const ForwardParams& p, const Unit& u, const Scratch& s, const Partial* part) {
  using A = Accumulator<T>;
  const int64_t queries = p.sizes.queries, features = p.sizes.features;
  A* e = static_cast<A*>(s.scores);
  A* largest = static_cast<A*>(part ? part->largest : s.largest);
  A* total = static_cast<A*>(part ? part->total : s.total);
  A* z = static_cast<A*>(part ? part->z : s.rows);
  for (int64_t m = 0; m < queries; ++m) largest[m] = -kInfinity<A>, total[m] = 0;
  std::memset(z, 0, queries * features * sizeof(A));
  Scorer scorer(p, u, s);
  for (int64_t begin = u.begin; begin < u.end; begin += s.tile) {
    const int64_t n = u.end - begin < s.tile ? u.end - begin : s.tile;
    scorer.at(begin, n);
    scorer.score(e);
    for (int64_t m = 0; m < queries; ++m) {
      A* row = e + m * s.tile;
      if (p.scores_out) {
        const int64_t to = (scorer.sample * p.sizes.heads + u.h) * queries + m;
        std::memcpy(static_cast<A*>(p.scores_out) + to * p.sizes.items + begin, row, n * sizeof(A));
      }
      to_logits(logits_of<A>(p, u, scorer.sample, m, begin), row, n);
      if (p.whole) leave_out_peak(p, (u.b * p.sizes.heads + u.h) * queries + m, begin, row, n);
      const A rescale = online_softmax(row, n, largest[m], total[m]);
      if (rescale != 1) multiply(z + m * features, features, rescale);
    }
    add_items(e, s.tile, queries, scorer.values(), n, features, z);
  }
  if (part) return;
  for (int64_t m = 0; m < queries; ++m) finish<A>(p, u.b, u.h, m, largest[m], total[m], z + m * features);
}

template <class T>
void merge_parts(const ForwardParams& p, int64_t b, int64_t h, const Partial& first, int64_t stride, int64_t count) {
  using A = Accumulator<T>;
  const int64_t queries = p.sizes.queries, features = p.sizes.features;
  const A* largest_of = static_cast<const A*>(first.largest);
  const A* total_of = static_cast<const A*>(first.total);
  A* z = static_cast<A*>(first.z);  // of the first part, which becomes the sum
  for (int64_t m = 0; m < queries; ++m) {
    A largest = -kInfinity<A>, total = 0;
    for (int64_t j = 0; j < count; ++j) {
      const A l = largest_of[j * stride + m];
      largest = l > largest ? l : largest;
    }
    const A shift = largest == -kInfinity<A> ? A(0) : largest;
    A* sums = z + m * features;
    for (int64_t j = 0; j < count; ++j) {
      const A factor = std::exp(largest_of[j * stride + m] - shift);
      total += factor * total_of[j * stride + m];
      const A* zj = sums + j * stride;
      each_vector<A>(features, [&](int64_t i, auto access) {
        const Vec<A> term = factor * access.read(zj + i);
        access.write(sums + i, j ? access.read(sums + i) + term : term);
      });
    }
    finish<A>(p, b, h, m, largest, total, sums);
  }
}

// ---- backward

// dl = p (dz . v - delta) of a row's items, but p left of its peak.
template <class A>
struct Delta {
  A delta, left;
  int64_t peak;  // item, or -1
};

template <class T, class A>
ATTNKERN_INLINE Delta<A> delta_of(const BackwardParams& p, const Scratch& s, const Unit& u, int64_t m, const A* dz) {
  const int64_t features = p.sizes.features, rows = rows_of(p);
  const int64_t row = (u.b * p.sizes.heads + u.h) * p.sizes.queries + m;
  const A dlse = p.dlse ? static_cast<const A*>(p.dlse)[row] : A(0);
  const auto times = [&](const void* z) {
    A dot;
    dot_items(dz, 1, Tile<const A>{static_cast<const A*>(z) + row * features, features, false}, 1, features, &dot, 1);
    return dot;
  };
  const int64_t peak = s.peaks ? s.peaks[row] : -1;
  if (peak < 0) return {times(p.z) - dlse, A(0), -1};
  A dp, excess = 0;  // dz . v of the peak, and dz . z less that
  dot_items(dz, 1, tile_of<const T>(p.values, features, p.offsets ? 0 : u.b, u.h, peak), 1, features, &dp, 1);
  const A *top = static_cast<const A*>(p.top) + row, *rest = static_cast<const A*>(s.rest_top) + row;
  const A weight = rest[rows] == 0 ? A(0) : std::exp(rest[0] - top[0]) * top[rows] / rest[rows];
  if (!(weight < A(kAlone))) excess = weight * (times(s.rest_z) - dp);
  return {dp + excess - dlse, dp - dp - excess + dlse, peak};  // dp - dp: NaN where it is not finite, as eager's
}

// From e and dp = dz . v of a row: p, de and the gradient of the logits (which may be null).
template <class A>
ATTNKERN_INLINE void softmax_backward(const Logits<A>& logits, const A* e, const A* dp, int64_t begin, int64_t n,
                                      A largest, A weight, const Delta<A>& delta, A scale, const A* dscores, A* p,
                                      A* de, A* dlogits) {
  each_vector<A>(n, [&](int64_t i, auto access) ATTNKERN_INLINE_LAMBDA {
    const Vec<A> pi = exp(logits.at(e, i, access) - largest) * weight;
    const Vec<A> dl = pi * (access.read(dp + i) - delta.delta);
    access.write(p + i, pi);
    access.write(de + i, dscores ? scale * dl + access.read(dscores + i) : scale * dl);
    if (dlogits) access.write(dlogits + i, dl);
  });
  const int64_t i = delta.peak - begin;
  if (i < 0 || i >= n) return;
  p[i] = weight;  // however its logit was rounded this time
  const A dl = p[i] * delta.left;
  de[i] = dscores ? scale * dl + dscores[i] : scale * dl;
  if (dlogits) dlogits[i] = dl;
}

template <class T, class Scorer>
void unpool_unit(const BackwardParams& p, const Unit& u, const Scratch& s, const Sums& sums) {
  using A = Accumulator<T>;
  const int64_t queries = p.sizes.queries, features = p.sizes.features;
  const int64_t first_row = (u.b * p.sizes.heads + u.h) * queries;
  A *rows = static_cast<A*>(s.rows), *dp = static_cast<A*>(s.scores), *e = dp + queries * s.tile;
  A *weights = static_cast<A*>(s.coefficients), *de = weights + queries * s.tile;
  auto* deltas = static_cast<Delta<A>*>(s.deltas);
  Scorer scorer(p, u, s);
  const bool joint = scorer.joint();
  const T* dz = static_cast<const T*>(p.dz) + first_row * features;
  each_vector<A>(queries * features, [&](int64_t i, auto access) { access.write(rows + i, access.read(dz + i)); });
  if (joint) std::memcpy(rows + queries * features, scorer.rows(), queries * features * sizeof(A));
  const int64_t count = joint ? 2 * queries : queries;
  for (int64_t m = 0; m < queries; ++m) deltas[m] = delta_of<T>(p, s, u, m, rows + m * features);
  const A *largest = static_cast<const A*>(p.top) + first_row, *weight = largest + rows_of(p);
  for (int64_t begin = u.begin; begin < u.end; begin += s.tile) {
    const int64_t n = u.end - begin < s.tile ? u.end - begin : s.tile;
    scorer.at(begin, n);
    dot_items(rows, count, scorer.values(), n, features, dp, s.tile);
    joint ? scorer.add_c(e) : scorer.score(e);
    for (int64_t m = 0; m < queries; ++m) {
      const int64_t at = ((scorer.sample * p.sizes.heads + u.h) * queries + m) * p.sizes.items + begin;
      softmax_backward(logits_of<A>(p, u, scorer.sample, m, begin), e + m * s.tile, dp + m * s.tile, begin, n,
                       largest[m], weight[m], deltas[m], static_cast<A>(p.scale),
                       p.dscores ? static_cast<const A*>(p.dscores) + at : nullptr, weights + m * s.tile,
                       de + m * s.tile, p.dlogits ? static_cast<A*>(p.dlogits) + at : nullptr);
    }
    const Tile<A> through = scorer.backward(p, de, sums);
    if (!p.dvalues.data) continue;
    const Tile<T> dvalues = tile_of<T>(p.dvalues, features, scorer.sample, u.h, begin);
    if (through.p) {
      make_items(weights, s.tile, rows, count, through, n, features, true);
      put_items(through, dvalues, n, features);
    } else {
      make_items(weights, s.tile, rows, count, dvalues, n, features, false, s.streaming);
    }
  }
  if (s.streaming) fence();
}

// ---- dispatch

template <class F>
ATTNKERN_INLINE void visit_scorer(const Inputs& p, const F& f) {
  cpu::visit(p.dtype, [&](auto t) {
    using T = decltype(t);
    switch (p.scorer) {
      case softmax_pool::Scorer::given:
        return f(t, std::type_identity<GivenScorer<T>>{});
      case softmax_pool::Scorer::dot:
        return f(t, std::type_identity<DotScorer<T>>{});
      case softmax_pool::Scorer::additive:
        return f(t, std::type_identity<AdditiveScorer<T>>{});
      case softmax_pool::Scorer::gated:
        return f(t, std::type_identity<GatedScorer<T>>{});
    }
  });
}

void pool(const ForwardParams& p, const Unit& u, const Scratch& s, const Partial* part) {
  visit_scorer(p, [&](auto t, auto scorer) { pool_unit<decltype(t), typename decltype(scorer)::type>(p, u, s, part); });
}

void unpool(const BackwardParams& p, const Unit& u, const Scratch& s, const Sums& sums) {
  visit_scorer(p,
               [&](auto t, auto scorer) { unpool_unit<decltype(t), typename decltype(scorer)::type>(p, u, s, sums); });
}

void merge(const ForwardParams& p, int64_t b, int64_t h, const Partial& first, int64_t stride, int64_t count) {
  cpu::visit(p.dtype, [&](auto t) { merge_parts<decltype(t)>(p, b, h, first, stride, count); });
}

void pack(const Inputs& p, bool back, int64_t block, void* panels) {
  cpu::visit(p.dtype, [&](auto t) { pack_block<decltype(t)>(p, back, block, panels); });
}

void add(DType acc, const void* parts, int64_t stride, int64_t count, void* out, int64_t n) {
  const auto add_all = [&](auto zero) {
    using A = decltype(zero);
    const A* from = static_cast<const A*>(parts);
    each_vector<A>(n, [&](int64_t i, auto access) {
      Vec<A> sums{};
      for (int64_t j = 0; j < count; ++j) sums += access.read(from + j * stride + i);
      access.write(static_cast<A*>(out) + i, sums);
    });
  };
  acc == DType::float64 ? add_all(double{}) : add_all(float{});
}

}  // namespace attnkern::softmax_pool::ATTNKERN_ISA
