// The gate over the tiles of a unit, forward and backward, and the statistics of training norms.
//
//   Computes  q = psi . act(theta x + u + bias) + psi_bias, y = sigmoid(q) target, and the gradients of reference.py;
//             mean and squares of theta x;  sums of dh, dh t, dh u
//   Layout    maps in place (params.h); a tile's t, u and their gradients are rows [positions, leading(F)] in scratch
//   Mapping   one call a unit: some positions of one sample on one thread, tile by tile; lanes along F in all products
//             but theta^T dt of maps channels first, whose lanes are positions
//   Traffic   x, g and dy are read once, y, dx and dg written once; nothing of size [B, F, L] leaves the cache
//   Numerics  chains of kChain terms forward, of F backward; weights' gradients add a tile's chain to their group's
namespace attnkern::attention_gate::ATTNKERN_ISA {

// A tile of positions: its operands and its hidden layer.
template <class T>
struct TileOf {
  using A = Accumulator<T>;
  const Inputs& p;
  const Weights& w;
  const Scratch& s;
  const Sizes& z = p.sizes;
  bool last = channels_last(p.x), patched = volume(z.kernel) != 1;
  int64_t b, begin = 0, n = 0;
  int64_t ld = leading(z.hidden), width = padded(z.hidden);
  A *t = static_cast<A*>(s.t), *u = static_cast<A*>(s.u);
  Operand<A> x{}, g{};

  TileOf(const Inputs& p, const Weights& w, const Scratch& s, int64_t b) : p(p), w(w), s(s), b(b) {}

  void load_x(int64_t first, int64_t count) {
    begin = first, n = count;
    x = patched ? load_patches<T, A>(p, last, b, begin, n, s)
                : load_plain<T>(p.x, last, b, begin, n, z.channels, static_cast<A*>(s.x), s.ld);
  }
  void load_maps(int64_t first, int64_t count) {
    load_x(first, count);
    if (p.phi) g = load_plain<T>(p.g, last, b, begin, n, z.gating, static_cast<A*>(s.g), s.ld);
  }

  void project(const Operand<A>& from, const void* weight, int64_t inner, A* to, bool add) const {
    accumulate<A>({from.p, from.position, from.channel}, {static_cast<const A*>(weight), ld}, {to, ld}, n, width, inner,
                  add);
  }
  void project_x(bool add) const { project(x, w.theta, terms(z), t, add); }
  // t + u where u has no place of its own
  void hidden() const {
    A* to = u ? u : t;
    if (p.phi)
      project(g, w.phi, z.gating, to, false);
    else
      resample<T>(p, last, b, begin, n, s, to);
    project_x(!u);
  }
};

// f(tile) for the tiles of a unit
template <class F>
ATTNKERN_INLINE void each_tile(const Unit& unit, int64_t tile, const F& f) {
  for (int64_t begin = unit.begin; begin < unit.end; begin += tile)
    f(begin, unit.end - begin < tile ? unit.end - begin : tile);
}

template <class A>
ATTNKERN_INLINE void sigmoids(const A* q, int64_t n, A* alpha) {
  each_vector<A>(n, [&](int64_t i, auto access) { access.write(alpha + i, sigmoid(access.read(q + i))); });
}

template <class T>
void forward_unit(const ForwardParams& p, const Weights& w, const Unit& unit, const Scratch& s) {
  using A = Accumulator<T>;
  TileOf<T> tile(p, w, s, unit.b);
  A *q = static_cast<A*>(p.q) + unit.b * volume(p.sizes.grid), *alpha = static_cast<A*>(s.alpha);
  const bool of_x = p.target == Target::x;
  const int64_t channels = of_x ? p.sizes.channels : p.sizes.gating;
  each_tile(unit, s.tile, [&](int64_t begin, int64_t n) {
    tile.load_maps(begin, n);
    tile.hidden();
    logits(p, w, s, n, q + begin);
    if (!p.apply) return;
    sigmoids(q + begin, n, alpha);
    const ConstMap& map = of_x ? p.x : p.g;
    if (tile.last)
      scale_tile<T>(Operand<const T>{element<const T>(map, unit.b, 0, begin), 1, map.stride_position}, alpha, p.y, true,
                    unit.b, begin, n, channels, s.streaming);
    else
      scale_tile<T>(of_x ? tile.x : tile.g, alpha, p.y, false, unit.b, begin, n, channels, s.streaming);
  });
  if (s.streaming) fence();
}

// ---- backward

// dq = alpha (1 - alpha) sum_c dy target, plus the given one; alpha and, channels first, dy stay in scratch.
template <class T>
void logit_gradients(const BackwardParams& p, const TileOf<T>& tile, const Sums& sums) {
  using A = Accumulator<T>;
  const Scratch& s = tile.s;
  const int64_t at = tile.b * volume(p.sizes.grid) + tile.begin;
  const A* given = p.dq ? static_cast<const A*>(p.dq) + at : nullptr;
  A *dq = static_cast<A*>(s.dq), *alpha = static_cast<A*>(s.alpha), *dalpha = static_cast<A*>(s.dalpha);
  const bool through = p.apply && p.d.data;
  if (through) {
    sigmoids(static_cast<const A*>(p.q) + at, tile.n, alpha);
    const bool of_x = p.target == Target::x;
    const int64_t channels = of_x ? p.sizes.channels : p.sizes.gating;
    const Operand<const T> dy{element<const T>(p.d, tile.b, 0, tile.begin), p.d.stride_channel, p.d.stride_position};
    dot_channels<T>(dy, of_x ? tile.x : tile.g, tile.last, tile.n, channels, dalpha, static_cast<A*>(s.d), s.ld);
  }
  Vec<A> total{};
  each_vector<A>(tile.n, [&](int64_t i, auto access) {
    Vec<A> v{};
    if (through) {
      const Vec<A> a = access.read(alpha + i);
      v = a * (1 - a) * access.read(dalpha + i);
    }
    if (given) v += access.read(given + i);
    access.write(dq + i, v);
    total += v;
  });
  if (sums.psi_bias) *static_cast<A*>(sums.psi_bias) += sum<A>(total);
}

// weight^T dt of a tile, plus what the map's gradient begins with: alpha d, d or nothing. `rows` is the weight.
template <class T, class Out>
void put_gradient(const BackwardParams& p, const TileOf<T>& tile, const Accumulator<T>* dt, const void* rows,
                  int64_t channels, RowsAt<Out> out, bool with_d) {
  using A = Accumulator<T>;
  const Scratch& s = tile.s;
  const int64_t hidden = p.sizes.hidden, ld_rows = leading(channels);
  const A* weight = static_cast<const A*>(rows);
  const A *alpha = static_cast<const A*>(s.alpha), *copied = static_cast<const A*>(s.d);
  const T* d = with_d ? element<const T>(p.d, tile.b, 0, tile.begin) : nullptr;
  const int64_t ld_d = tile.last ? p.d.stride_position : p.d.stride_channel;
  const auto multiply = [&](auto full, const auto& finish) {
    if (tile.last)
      product<decltype(full)>(Strided<A>{dt, tile.ld, 1}, RowsAt<const A>{weight, ld_rows}, out, tile.n, channels,
                              hidden, finish);
    else
      product<decltype(full)>(Strided<A>{weight, 1, ld_rows}, RowsAt<const A>{static_cast<const A*>(s.columns), s.ld},
                              out, channels, tile.n, hidden, finish);
  };
  visit_writes(s.streaming, out.p, out.ld, [&](auto full) {
    if (!with_d)
      multiply(full, Sum{});
    else if (!p.apply)
      multiply(full, [=](Vec<A> sum, int64_t i, int64_t j, const auto& access)
                         ATTNKERN_INLINE_LAMBDA { return access.read(d + i * ld_d + j) + sum; });
    else if (tile.last)
      multiply(full, [=](Vec<A> sum, int64_t i, int64_t j, const auto& access)
                         ATTNKERN_INLINE_LAMBDA { return alpha[i] * access.read(d + i * ld_d + j) + sum; });
    else
      multiply(full, [=, ld = s.ld](Vec<A> sum, int64_t i, int64_t j, const auto& access) ATTNKERN_INLINE_LAMBDA {
        return access.read(alpha + j) * access.read(copied + i * ld + j) + sum;
      });
  });
}

template <class T>
void backward_unit(const BackwardParams& p, const Weights& w, const Unit& unit, const Scratch& s, const Sums& sums,
                   const Slab& slab) {
  using A = Accumulator<T>;
  const Sizes& z = p.sizes;
  TileOf<T> tile(p, w, s, unit.b);
  const bool of_x = p.target == Target::x, last = tile.last;
  if (slab.data) store_zeros(static_cast<A*>(slab.data), (slab.positions.end - slab.positions.begin) * tile.width);
  const auto add_weight = [&](void* to, const Operand<A>& from, const A* dt, int64_t count) {
    if (to)
      accumulate<A>({from.p, from.channel, from.position}, {dt, tile.ld}, {static_cast<A*>(to), tile.width}, count,
                    tile.width, tile.n, true);
  };
  const auto turn = [&](const A* dt) {
    if (!last) transpose<A>({dt, tile.ld}, {static_cast<A*>(s.columns), s.ld}, tile.n, tile.width);
  };
  const auto in_place = [&](const Map& map, int64_t begin) {
    return RowsAt<T>{element<T>(map, unit.b, 0, begin), last ? map.stride_position : map.stride_channel};
  };
  each_tile(unit, s.tile, [&](int64_t begin, int64_t n) {
    tile.load_maps(begin, n);
    logit_gradients(p, tile, sums);
    tile.hidden();
    s.u ? hidden_backward<A, true>(p, w, s, n, sums) : hidden_backward<A, false>(p, w, s, n, sums);
    const A *dt = tile.t, *du = s.u ? tile.u : tile.t;
    add_weight(sums.theta, tile.x, dt, terms(z));
    add_weight(sums.phi, tile.g, du, z.gating);
    if (p.dx.data) {
      turn(dt);
      const bool with_d = of_x && p.d.data;
      if (tile.patched) {  // x's tile is not read again
        A* to = static_cast<A*>(s.x);
        put_gradient<T>(p, tile, dt, w.theta_rows, terms(z), RowsAt<A>{to, last ? leading(terms(z)) : s.ld}, false);
        put_patches<T, A>(p, last, unit.b, begin, n, s, with_d);
      } else {
        put_gradient<T>(p, tile, dt, w.theta_rows, z.channels, in_place(p.dx, begin), with_d);
      }
    }
    if (slab.data) add_to_slab<A>(p, begin, n, s, du, slab);
    if (p.dg.data && p.phi) {
      if (du != dt || !p.dx.data) turn(du);
      put_gradient<T>(p, tile, du, w.phi_rows, z.gating, in_place(p.dg, begin), !of_x && p.d.data);
    }
  });
  if (s.streaming) fence();
}

// ---- statistics

template <class T>
void sums_unit(const SumsParams& p, const Weights& w, const Unit& unit, const Scratch& s, const Sums& sums) {
  using A = Accumulator<T>;
  TileOf<T> tile(p, w, s, unit.b);
  const A* dq = static_cast<const A*>(p.dq) + unit.b * volume(p.sizes.grid);
  each_tile(unit, s.tile, [&](int64_t begin, int64_t n) {
    tile.load_maps(begin, n);
    tile.hidden();
    hidden_sums<A>(p, w, s, n, dq + begin, sums);
  });
}

template <class T>
void moments_unit(const Inputs& p, const Weights& w, const Unit& unit, const Scratch& s, void* out) {
  using A = Accumulator<T>;
  TileOf<T> tile(p, w, s, unit.b);
  A *mean = static_cast<A*>(out), *squares = mean + tile.width;
  store_zeros(mean, 2 * tile.width);
  each_tile(unit, s.tile, [&](int64_t begin, int64_t n) {
    tile.load_x(begin, n);
    tile.project_x(false);
    add_moments<A>({tile.t, tile.ld}, n, begin - unit.begin, tile.width, mean, squares);
  });
}

template <class A>
void merge_moments_of(const MomentsParams& p, const A* parts, const Unit* units, int64_t count) {
  for (int64_t f = 0; f < p.sizes.hidden; ++f) {
    A mean = 0, squares = 0;
    int64_t before = 0;
    for (int64_t i = 0; i < count; ++i) {
      const A* part = parts + 2 * i * padded(p.sizes.hidden) + f;
      const int64_t own = units[i].end - units[i].begin;
      join(mean, squares, static_cast<A>(before), part[0], part[padded(p.sizes.hidden)], static_cast<A>(own));
      before += own;
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
  each_tile(unit, kTile, [&](int64_t begin, int64_t n) {
    const auto at = [&](const ConstMap& map) {
      return Operand<const T>{element<const T>(map, unit.b, 0, begin), map.stride_channel, map.stride_position};
    };
    dot_channels<T>(at(p.dy), at(p.x), last, n, p.channels, dalpha + begin, static_cast<A*>(nullptr), 0);
    scale_tile<T>(at(p.dy), alpha + begin, p.dx, last, unit.b, begin, n, p.channels, streaming);
  });
  if (streaming) fence();
}

}  // namespace attnkern::attention_gate::ATTNKERN_ISA
