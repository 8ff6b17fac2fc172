// The gate over the tiles of a unit, forward and backward, and the statistics of training norms.
//
//   Computes  q = psi . act(theta x + u + bias) + psi_bias, y = sigmoid(q) target, and the gradients of reference.py;
//             mean and squares of theta x;  sums of dh, dh t, dh u
//   Layout    maps in place (params.h); a tile's t, u and their gradients are rows [positions, leading(F)] in scratch
//   Mapping   one call a unit: some positions of one sample on one thread, tile by tile; lanes along F in all products
//             but theta^T dt of maps channels first, whose lanes are positions
//   Traffic   x, g and dy are read once, the next tile's while this one's products run, y, dx and dg written once;
//             nothing of size [B, F, L] leaves the cache
//   Numerics  chains of kChain terms forward, of F backward; weights' gradients add a tile's chain to their group's
namespace attnkern::attention_gate::ATTNKERN_ISA {

// Some positions of one sample, of unit `index`; none after the last.
struct Place {
  int64_t index;
  Unit unit;
  int64_t begin, n;
};

ATTNKERN_INLINE Place place_at(const Units& units, int64_t tile, int64_t index, int64_t begin) {
  if (index == units.last) return {index, {}, 0, 0};
  const Unit unit = units.at(index);
  if (begin < 0) begin = unit.begin;
  return {index, unit, begin, unit.end - begin < tile ? unit.end - begin : tile};
}

ATTNKERN_INLINE Place place_after(const Units& units, int64_t tile, const Place& p) {
  const int64_t end = p.begin + p.n;
  return end < p.unit.end ? place_at(units, tile, p.index, end) : place_at(units, tile, p.index + 1, -1);
}

// A tile of positions: its operands and its hidden layer.
template <class T>
struct TileOf {
  using A = Accumulator<T>;
  using X = Copied<T>;
  const Inputs& p;
  const Weights& w;
  const Scratch& s;
  const ConstMap* with = nullptr;  // dy, on the grid
  int later = 0;                   // products with x and g after t and u, while which the next tile is fetched too
  const Sizes& z = p.sizes;
  bool last = channels_last(p.x), patched = volume(z.kernel) != 1, of_x = p.target == Target::x;
  int64_t target_channels = of_x ? z.channels : z.gating;
  int64_t ld = leading(z.hidden), width = padded(z.hidden);
  A *t = static_cast<A*>(s.t), *u = static_cast<A*>(s.u);
  int64_t b = 0, begin = 0, n = 0;
  Operand<X> x{}, g{}, d{};
  Feed feed{};

  // f(tile, unit index) for the tiles of some units
  template <class F>
  void each(const Units& units, const F& f) {
    Place now = place_at(units, s.tile, units.first, -1);
    int half = 0;
    fetch(now, half);
    feed.finish();
    for (; now.n; half = 1 - half) {
      const Place next = place_after(units, s.tile, now);
      b = now.unit.b, begin = now.begin, n = now.n;
      x = patched ? load_patches<T, X>(p, last, b, begin, n, s) : of(p.x, z.channels, x_copy(half));
      end_pairs(patched ? static_cast<X*>(s.x[0]) : x_copy(half), terms(z));
      if (p.phi) {
        g = of(p.g, z.gating, g_copy(half));
        end_pairs(g_copy(half), z.gating);
      }
      if (with) d = of(*with, target_channels, d_copy(half));
      fetch(next, 1 - half);
      f(now.index);
      feed.finish();
      now = next;
    }
  }

  // Where a map's tile is copied to; null where it is read in place.
  X* x_copy(int half) const { return copy_of(p.x, z.channels, s.x[half]); }
  X* g_copy(int half) const { return copy_of(p.g, z.gating, s.g[half]); }
  X* d_copy(int half) const { return kPaired<T> && last ? nullptr : static_cast<X*>(s.d[half]); }
  X* copy_of(const ConstMap& map, int64_t channels, void* copy) const {
    return kPaired<T> && last && in_pairs<T>(map, channels) ? nullptr : static_cast<X*>(copy);
  }
  // A copy's rows of odd length end in half a pair: the other half is 0.
  void end_pairs(X* copy, int64_t channels) const {
    if constexpr (kPaired<T>) {
      const int64_t rows = last ? n : channels, length = last ? channels : n;
      if (!copy || length % 2 == 0) return;
      for (int64_t i = 0; i < rows; ++i) copy[i * (last ? leading(channels) : s.ld) + length] = X{};
    }
  }

  Operand<X> of(const ConstMap& map, int64_t channels, X* copy) const {
    return operand<T>(map, last, b, begin, channels, copy, s.ld);
  }
  void fetch(const Place& to, int half) {
    feed = {};
    const auto add = [&](const ConstMap& map, int64_t channels, X* copy) {
      feed_map<T>(feed, map, last, to.unit.b, to.begin, to.n, channels, copy, s.ld);
    };
    if (to.n && !patched) add(p.x, z.channels, x_copy(half));
    if (to.n && p.phi) add(p.g, z.gating, g_copy(half));
    if (to.n && with) add(*with, target_channels, d_copy(half));
    feed.start(
        n * width *
        ((w.theta.parts + later) * steps<T>(terms(z)) + (p.phi ? (w.phi.parts + later) * steps<T>(z.gating) : 0)));
  }

  // A map's tile as the left side of a product that sums over channels, or over positions. Pairs along its rows are
  // read as they lie; across rows they are made, for this product alone.
  Strided<Term<T>> left(const Operand<X>& from, int64_t channels, bool over_channels) const {
    if constexpr (!kPaired<T>) {
      return over_channels ? Strided<A>{from.p, from.position, from.channel}
                           : Strided<A>{from.p, from.channel, from.position};
    } else {
      const int64_t rows = last ? n : channels, length = last ? channels : n;
      const int64_t ld_from = last ? from.position : from.channel, ld_to = leading(length);
      if (over_channels == last) return {reinterpret_cast<const cpu::Pair*>(from.p), ld_from / 2, 1};
      auto* to = static_cast<cpu::Pair*>(s.pairs);
      pair_rows<T>({from.p, ld_from}, rows, length, [=](int64_t k, int64_t j) { return to + k * ld_to + j; });
      return {to, 1, ld_to};
    }
  }

  void project(const Operand<X>& from, const Weight& weight, int64_t inner, A* to, bool add) {
    const Strided<Term<T>> a = left(from, inner, true);
    for (int part = 0; part < weight.parts; ++part)
      accumulate<Term<T>>(a, packed_rows<T>(weight.columns, ld, part), {to, ld}, n, width, steps<T>(inner), add || part,
                          feed);
    clear_beyond(to);
  }
  // no 0 times infinity in the hidden units that do not exist
  void clear_beyond(A* rows) const {
    if (const int64_t units = z.hidden; units < width)
      for (int64_t l = 0; l < n; ++l) std::fill(rows + l * ld + units, rows + l * ld + width, A(0));
  }
  void project_x(bool add) { project(x, w.theta, terms(z), t, add); }
  // t + u where u has no place of its own
  void hidden() {
    A* to = u ? u : t;
    if (p.phi)
      project(g, w.phi, z.gating, to, false);
    else
      resample<T>(p, last, b, begin, n, s, to);
    project_x(!u);
  }
};

template <class A>
ATTNKERN_INLINE void sigmoids(const A* q, int64_t n, A* alpha) {
  each_vector<A>(n, [&](int64_t i, auto access) { access.write(alpha + i, sigmoid(access.read(q + i))); });
}

template <class T>
void forward_units(const ForwardParams& p, const Weights& w, const Units& units, const Scratch& s) {
  using A = Accumulator<T>;
  TileOf<T> tile{.p = p, .w = w, .s = s};
  A* alpha = static_cast<A*>(s.alpha);
  tile.each(units, [&](int64_t) {
    A* q = static_cast<A*>(p.q) + tile.b * units.positions + tile.begin;
    tile.hidden();
    logits(p, w, s, tile.n, q);
    if (!p.apply) return;
    sigmoids(q, tile.n, alpha);
    scale_tile<T>(tile.of_x ? tile.x : tile.g, alpha, p.y, tile.last, tile.b, tile.begin, tile.n, tile.target_channels,
                  s.streaming);
  });
  if (s.streaming) fence();
}

// ---- backward

// dq = alpha (1 - alpha) sum_c dy target, plus the given one; alpha stays in scratch.
template <class T>
void logit_gradients(const BackwardParams& p, const TileOf<T>& tile, const Sums& sums) {
  using A = Accumulator<T>;
  const Scratch& s = tile.s;
  const int64_t at = tile.b * volume(p.sizes.grid) + tile.begin;
  const A* given = p.dq ? static_cast<const A*>(p.dq) + at : nullptr;
  A *dq = static_cast<A*>(s.dq), *alpha = static_cast<A*>(s.alpha), *dalpha = static_cast<A*>(s.dalpha);
  if (tile.with) {
    sigmoids(static_cast<const A*>(p.q) + at, tile.n, alpha);
    dot_channels(tile.d, tile.of_x ? tile.x : tile.g, tile.last, tile.n, tile.target_channels, dalpha);
  }
  Vec<A> total{};
  each_vector<A>(tile.n, [&](int64_t i, auto access) {
    Vec<A> v{};
    if (tile.with) {
      const Vec<A> a = access.read(alpha + i);
      v = a * (1 - a) * access.read(dalpha + i);
    }
    if (given) v += access.read(given + i);
    access.write(dq + i, v);
    total += v;
  });
  if (sums.psi_bias) *static_cast<A*>(sums.psi_bias) += sum<A>(total);
}

// The gradient of a tile's t or u as products take it; bfloat16 rounds it, as torch's does.
template <class T>
struct HiddenGradient {
  Strided<Term<T>> rows;            // (position, hidden unit)
  RowsAt<const Term<T>> positions;  // [n, padded(F)]

  HiddenGradient(const TileOf<T>& tile, Accumulator<T>* dt, void* rounded) {
    const int64_t n = tile.n, ld = tile.ld;
    if constexpr (kPaired<T>) {
      tile.clear_beyond(dt);
      T* to = static_cast<T*>(rounded);
      for (int64_t l = 0; l < n; ++l) copy(dt + l * ld, to + l * ld, tile.width);
      auto* pairs = reinterpret_cast<cpu::Pair*>(to + tile.s.tile * ld);
      pair_rows<T>({to, ld}, n, tile.width, [=](int64_t k, int64_t j) { return pairs + k * ld + j; });
      rows = {reinterpret_cast<const cpu::Pair*>(to), ld / 2, 1};
      positions = {pairs, ld};
    } else {
      rows = {dt, ld, 1};
      positions = {dt, ld};
    }
  }
};

// weight^T dt of a tile, plus what the map's gradient begins with: alpha dy, d or nothing.
template <class T, class Out>
void put_gradient(const BackwardParams& p, TileOf<T>& tile, const HiddenGradient<T>& dt, const Weight& w,
                  int64_t channels, RowsAt<Out> out, bool of_target) {
  using A = Accumulator<T>;
  const Scratch& s = tile.s;
  const int64_t inner = steps<T>(p.sizes.hidden);
  const RowsAt<const Term<T>> weight = packed_rows<T>(w.rows, leading(channels));
  const RowsAt<const Term<T>> columns{static_cast<const Term<T>*>(s.columns), s.ld};  // [F, n]
  const A* alpha = static_cast<const A*>(s.alpha);
  const bool plain = of_target && p.d.data && !tile.with;
  const T* d = plain ? element<const T>(p.d, tile.b, 0, tile.begin) : nullptr;
  const int64_t ld_d = tile.last ? p.d.stride_position : p.d.stride_channel;
  const auto multiply = [&](auto full, const auto& finish) {
    // one register tile before them, d and out are asked for: 0.9 of 3.5 ms of a backward went into waiting for them
    const auto ahead = [=](int64_t i, int64_t j) ATTNKERN_INLINE_LAMBDA {
      if constexpr (std::is_same_v<decltype(full), Whole>) prefetch<true>(out.p + i * out.ld + j, 2 * kLanes<A>);
      if (d) prefetch<false>(d + i * ld_d + j, 2 * kLanes<A>);
    };
    if (tile.last)
      product<decltype(full)>(dt.rows, weight, out, tile.n, channels, inner, finish, tile.feed, ahead);
    else
      product<decltype(full)>(Strided<Term<T>>{weight.p, 1, weight.ld}, columns, out, channels, tile.n, inner, finish,
                              tile.feed, ahead);
  };
  visit_writes(s.streaming, out.p, out.ld, [&](auto full) {
    if (!of_target || !p.d.data) {
      multiply(full, Sum{});
    } else if (plain) {
      multiply(full, [=](Vec<A> sum, int64_t i, int64_t j, const auto& access)
                         ATTNKERN_INLINE_LAMBDA { return access.read(d + i * ld_d + j) + sum; });
    } else if (tile.last) {
      multiply(full, [=, dy = tile.d.p, ld = tile.d.position](Vec<A> sum, int64_t i, int64_t j, const auto& access)
                         ATTNKERN_INLINE_LAMBDA { return alpha[i] * access.read(dy + i * ld + j) + sum; });
    } else {
      multiply(full,
               [=, dy = tile.d.p, ld = tile.d.channel](Vec<A> sum, int64_t i, int64_t j, const auto& access)
                   ATTNKERN_INLINE_LAMBDA { return access.read(alpha + j) * access.read(dy + i * ld + j) + sum; });
    }
  });
}

template <class T>
void backward_units(const BackwardParams& p, const Weights& w, const Units& units, const Scratch& s, const Sums& sums,
                    const Slab* slabs) {
  using A = Accumulator<T>;
  const Sizes& z = p.sizes;
  TileOf<T> tile{.p = p, .w = w, .s = s, .with = p.apply && p.d.data ? &p.d : nullptr, .later = 2};
  const bool last = tile.last;
  for (int64_t i = units.first; slabs && i < units.last; ++i)
    store_zeros(static_cast<A*>(slabs[i].data), (slabs[i].positions.end - slabs[i].positions.begin) * tile.width);
  const auto add_weight = [&](void* to, const Operand<Copied<T>>& from, const HiddenGradient<T>& dt, int64_t count) {
    if (to)
      accumulate(tile.left(from, count, false), dt.positions, {static_cast<A*>(to), tile.width}, count, tile.width,
                 steps<T>(tile.n), true, tile.feed);
  };
  const auto turn = [&](const HiddenGradient<T>& dt) {
    if (!last)  // pairs move as floats do
      transpose<A>({reinterpret_cast<const A*>(dt.rows.p), dt.rows.row}, {static_cast<A*>(s.columns), s.ld}, tile.n,
                   steps<T>(tile.width));
  };
  const auto place_in = [&](const Map& map) {
    return RowsAt<T>{element<T>(map, tile.b, 0, tile.begin), last ? map.stride_position : map.stride_channel};
  };
  tile.each(units, [&](int64_t index) {
    logit_gradients(p, tile, sums);
    tile.hidden();
    s.u ? hidden_backward<A, true>(p, w, s, tile.n, sums) : hidden_backward<A, false>(p, w, s, tile.n, sums);
    const HiddenGradient<T> dt(tile, tile.t, s.rounded[0]);
    const HiddenGradient<T> du = s.u ? HiddenGradient<T>(tile, tile.u, s.rounded[1]) : dt;
    add_weight(sums.theta, tile.x, dt, terms(z));
    add_weight(sums.phi, tile.g, du, z.gating);
    if (p.dx.data) {
      turn(dt);
      if (tile.patched) {  // x's tile is not read again
        A* to = static_cast<A*>(s.x[0]);
        put_gradient<T>(p, tile, dt, w.theta, terms(z), RowsAt<A>{to, last ? leading(terms(z)) : s.ld}, false);
        put_patches<T, A>(p, last, tile.b, tile.begin, tile.n, s, tile.of_x && p.d.data);
      } else {
        put_gradient<T>(p, tile, dt, w.theta, z.channels, place_in(p.dx), tile.of_x);
      }
    }
    if (slabs) add_to_slab<A>(p, tile.begin, tile.n, s, s.u ? tile.u : tile.t, slabs[index]);
    if (p.dg.data && p.phi) {
      if (s.u || !p.dx.data) turn(du);
      put_gradient<T>(p, tile, du, w.phi, z.gating, place_in(p.dg), !tile.of_x);
    }
  });
  if (s.streaming) fence();
}

// ---- statistics

template <class T>
void sums_units(const SumsParams& p, const Weights& w, const Units& units, const Scratch& s, const Sums& sums) {
  using A = Accumulator<T>;
  TileOf<T> tile{.p = p, .w = w, .s = s};
  tile.each(units, [&](int64_t) {
    tile.hidden();
    hidden_sums<A>(p, w, s, tile.n, static_cast<const A*>(p.dq) + tile.b * units.positions + tile.begin, sums);
  });
}

template <class T>
void moments_units(const Inputs& p, const Weights& w, const Units& units, const Scratch& s, void* parts) {
  using A = Accumulator<T>;
  TileOf<T> tile{.p = p, .w = w, .s = s};
  store_zeros(static_cast<A*>(parts) + 2 * units.first * tile.width, 2 * (units.last - units.first) * tile.width);
  tile.each(units, [&](int64_t index) {
    A* mean = static_cast<A*>(parts) + 2 * index * tile.width;
    tile.project_x(false);
    add_moments<A>({tile.t, tile.ld}, tile.n, tile.begin - units.at(index).begin, tile.width, mean, mean + tile.width);
  });
}

template <class A>
void merge_moments_of(const MomentsParams& p, const A* parts, const Units& units) {
  for (int64_t f = 0; f < p.sizes.hidden; ++f) {
    A mean = 0, squares = 0;
    int64_t before = 0;
    for (int64_t i = units.first; i < units.last; ++i) {
      const A* part = parts + 2 * i * padded(p.sizes.hidden) + f;
      const Unit unit = units.at(i);
      join(mean, squares, static_cast<A>(before), part[0], part[padded(p.sizes.hidden)],
           static_cast<A>(unit.end - unit.begin));
      before += unit.end - unit.begin;
    }
    static_cast<A*>(p.mean)[f] = before ? mean : std::numeric_limits<A>::quiet_NaN();
    static_cast<A*>(p.var)[f] = squares / static_cast<A>(before);
  }
}

// ---- a gate of its own

template <class T>
void apply_unit(const ApplyParams& p, const Unit& unit, bool streaming) {
  using A = Accumulator<T>;
  const A* alpha = static_cast<const A*>(p.alpha) + unit.b * p.length;
  const Operand<const T> x{element<const T>(p.x, unit.b, 0, unit.begin), p.x.stride_channel, p.x.stride_position};
  scale_tile<T>(x, alpha + unit.begin, p.y, channels_last(p.x), unit.b, unit.begin, unit.end - unit.begin, p.channels,
                streaming);
  if (streaming) fence();
}

template <class T>
void apply_backward_unit(const ApplyBackwardParams& p, const Unit& unit, bool streaming) {
  using A = Accumulator<T>;
  const bool last = channels_last(p.x);
  const A* alpha = static_cast<const A*>(p.alpha) + unit.b * p.length;
  A* dalpha = static_cast<A*>(p.dalpha) + unit.b * p.length;
  constexpr int64_t kTile = 256;  // dy stays in L1 or L2 between its two uses
  for (int64_t begin = unit.begin; begin < unit.end; begin += kTile) {
    const int64_t n = unit.end - begin < kTile ? unit.end - begin : kTile;
    const auto at = [&](const ConstMap& map) {
      return Operand<const T>{element<const T>(map, unit.b, 0, begin), map.stride_channel, map.stride_position};
    };
    dot_channels(at(p.dy), at(p.x), last, n, p.channels, dalpha + begin);
    scale_tile<T>(at(p.dy), alpha + begin, p.dx, last, unit.b, begin, n, p.channels, streaming);
  }
  if (streaming) fence();
}

}  // namespace attnkern::attention_gate::ATTNKERN_ISA
