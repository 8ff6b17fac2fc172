// The scorers: raw scores e [M, tile] of a tile of items, and the way back from de.
//
// A scorer is made for one head of one sample. at(begin, n) moves it to a tile; values() is that tile for the weighted
// sum; score(e) writes its scores; backward(de, sums) adds the gradients of its parameters, writes those of its keys,
// and returns what it adds to those of the values, in scratch, or nothing. A joint scorer's items are the values and
// its scores their product with rows(): pool.simd.h then computes scores and gradients together with those of the
// weighted sum.
namespace attnkern::softmax_pool::ATTNKERN_ISA {

template <class T>
struct Scorer {
  using A = Accumulator<T>;
  const Inputs& p;
  const Unit& u;
  const Scratch& s;
  int64_t sample;  // whose items and logits these are: bags share one
  int64_t begin = 0, n = 0;

  Scorer(const Inputs& p, const Unit& u, const Scratch& s) : p(p), u(u), s(s), sample(p.offsets ? 0 : u.b) {}

  void at(int64_t first, int64_t count) { begin = first, n = count; }
  Tile<const T> values() const { return tile_of<const T>(p.values, p.sizes.features, sample, u.h, begin); }
  Tile<const T> keys() const {
    return p.keys.data ? tile_of<const T>(p.keys, p.sizes.hidden, sample, u.h, begin) : values();
  }
  static constexpr bool joint() { return false; }
  const A* rows() const { return row_of<const A>(p.query, u.b, u.h, 0); }

  void add_c(A* e) const {
    if (!p.c.data) return;
    for (int64_t m = 0; m < p.sizes.queries; ++m) {
      const A c = *row_of<const A>(p.c, u.b, u.h, m);
      A* row = e + m * s.tile;
      each_vector<A>(n, [&](int64_t i, auto access) { access.write(row + i, access.read(row + i) + c); });
    }
  }
};

template <class T>
struct GivenScorer : Scorer<T> {
  using Scorer<T>::Scorer, Scorer<T>::p, Scorer<T>::u, Scorer<T>::s;
  using A = Accumulator<T>;

  void score(A* e) const {
    for (int64_t m = 0; m < p.sizes.queries; ++m)
      std::memcpy(e + m * s.tile, row_of<const A>(p.scores, this->sample, u.h, m) + this->begin, this->n * sizeof(A));
  }
  Tile<A> backward(const BackwardParams&, const A*, const Sums&) const { return {}; }
};

template <class T>
struct DotScorer : Scorer<T> {
  using Scorer<T>::Scorer, Scorer<T>::p, Scorer<T>::u, Scorer<T>::s, Scorer<T>::n;
  using A = Accumulator<T>;

  bool joint() const { return !p.keys.data; }
  void score(A* e) const {
    dot_items(this->rows(), p.sizes.queries, this->keys(), n, p.sizes.hidden, e, s.tile);
    this->add_c(e);
  }
  Tile<A> backward(const BackwardParams& b, const A* de, const Sums& sums) const {
    if (sums.dquery)
      add_items(de, s.tile, p.sizes.queries, this->keys(), n, p.sizes.hidden, static_cast<A*>(sums.dquery));
    if (b.dkeys.data)
      make_items(de, s.tile, this->rows(), p.sizes.queries,
                 tile_of<T>(b.dkeys, p.sizes.hidden, this->sample, u.h, this->begin), n, p.sizes.hidden, false,
                 s.streaming);
    return {};
  }
};

}  // namespace attnkern::softmax_pool::ATTNKERN_ISA
