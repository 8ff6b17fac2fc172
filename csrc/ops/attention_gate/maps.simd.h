// What a tile of positions reads and writes of the maps: operands, patches, and the products with alpha.
//
//   Computes  an operand [terms, positions] of x or g;  y = alpha x;  dalpha = sum_c dy x;  dx = d + patches' gradients
//   Layout    a map's rows are contiguous: L positions of a channel, or C channels of a position (params.h)
//   Mapping   one call a tile of adjacent positions of one sample on one thread; a vector is adjacent elements of a row
//   Traffic   a tile comes from memory once: channels last it is read in place, channels first it is copied, for its
//             rows, 2^n bytes apart, would share a few sets of the caches
//   Numerics  16-bit maps widen as they are copied, but bfloat16 that is multiplied in pairs; dalpha adds channels by
//   fours, or lanes
namespace attnkern::attention_gate::ATTNKERN_ISA {

// Element (term c, position l) is p[c channel + l position]; one of the strides is 1.
template <class A>
struct Operand {
  const A* p;
  int64_t channel, position;
};

// Row `c` (channels first) or position `l` (channels last) of a map, from position l on.
template <class T, class Pointer>
ATTNKERN_INLINE T* element(const MapOf<Pointer>& map, int64_t b, int64_t c, int64_t l) {
  return static_cast<T*>(map.data) + b * map.stride_batch + c * map.stride_channel + l * map.stride_position;
}

template <class T>
ATTNKERN_INLINE bool whole_lines(const T* p, int64_t ld) {
  return (reinterpret_cast<uintptr_t>(p) | static_cast<uint64_t>(ld) * sizeof(T)) % 64 == 0;
}

// f(access) with how whole vectors of rows at p, ld elements apart, are written
template <class T, class F>
ATTNKERN_INLINE void visit_writes(bool streaming, const T* p, int64_t ld, const F& f) {
  streaming&& whole_lines(p, ld) ? f(Streamed{}) : f(Whole{});
}

template <class Full, class A, class F>
ATTNKERN_INLINE void each_vector_as(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) f(i, Full{});
  if (i < n) f(i, Part{n - i});
}

// Brings the lines of n elements nearer, to be read or to be written.
template <bool write, class T>
ATTNKERN_INLINE void prefetch(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(p + i, write);
}

template <class A>
ATTNKERN_INLINE void store_zeros(A* to, int64_t n) {
  std::memset(to, 0, n * sizeof(A));
}

// Runs of a tile along the grid's last dim: f(q1, q2, first q3, count, where in the tile).
template <class F>
ATTNKERN_INLINE void each_run(const Sizes& n, int64_t begin, int64_t count, const F& f) {
  const int64_t length = n.grid[2];
  for (int64_t done = 0; done < count;) {
    const int64_t row = (begin + done) / length, q3 = begin + done - row * length;
    const int64_t run = length - q3 < count - done ? length - q3 : count - done;
    f(row / n.grid[1], row % n.grid[1], q3, run, done);
    done += run;
  }
}

// ---- operands

// n positions from `begin`, in the map itself, channels last, or in `copy`, where `feed` brings them.
template <class T, class X>
Operand<X> operand(const ConstMap& map, bool last, int64_t b, int64_t begin, int64_t channels, X* copy, int64_t ld) {
  if constexpr (std::is_same_v<T, X>) {
    if (!copy) return {element<const T>(map, b, 0, begin), 1, map.stride_position};
  }
  return last ? Operand<X>{copy, 1, leading(channels)} : Operand<X>{copy, ld, 1};
}

// Whether the positions of a map channels last are rows of pairs.
template <class T>
bool in_pairs(const ConstMap& map, int64_t channels) {
  const int64_t odd = channels | map.stride_position | map.stride_batch;
  return odd % 2 == 0 && reinterpret_cast<uintptr_t>(map.data) % sizeof(cpu::Pair) == 0;
}

// The same positions, for a feed: in place they are only brought nearer, in pieces of 1 KB where they are adjacent.
template <class T, class X>
void feed_map(Feed& feed, const ConstMap& map, bool last, int64_t b, int64_t begin, int64_t n, int64_t channels,
              X* copy, int64_t ld) {
  const T* from = element<const T>(map, b, 0, begin);
  if (!last)
    feed.add(from, map.stride_channel, copy, ld, channels, n);
  else if (copy || map.stride_position != channels)
    feed.add(from, map.stride_position, copy, leading(channels), n, channels);
  else
    feed.add(from, 1024 / sizeof(T), copy, 0, (n * channels * sizeof(T) + 1023) / 1024, 1024 / sizeof(T));
}

// Where row i = (i1, i2) of the patches of row (q1, q2) begins in the map.
ATTNKERN_INLINE int64_t patch_row(const Sizes& n, int64_t q1, int64_t q2, int64_t q3, int64_t i) {
  const int64_t x1 = q1 * n.kernel[0] + i / n.kernel[1], x2 = q2 * n.kernel[1] + i % n.kernel[1];
  return (x1 * n.x[1] + x2) * n.x[2] + q3 * n.kernel[2];
}

// f(l, access, access to the first vector of 2 l, to the second) for the vectors that cover n pairs
template <class A, class F>
ATTNKERN_INLINE void each_pair(int64_t n, const F& f) {
  constexpr int64_t lanes = kLanes<A>;
  int64_t l = 0;
  for (; l + lanes <= n; l += lanes) f(l, Whole{}, Whole{}, Whole{});
  const int64_t left = n - l;
  if (2 * left >= lanes && left)
    f(l, Part{left}, Whole{}, Part{2 * left - lanes});
  else if (left)
    f(l, Part{left}, Part{2 * left}, Part{0});
}

template <class A, size_t... i>
ATTNKERN_INLINE void unzip(Vec<A>& a, Vec<A>& b, std::index_sequence<i...>) {
  const Vec<A> even = __builtin_shufflevector(a, b, (2 * static_cast<int>(i))...);
  b = __builtin_shufflevector(a, b, (2 * static_cast<int>(i) + 1)...);
  a = even;
}
template <class A, size_t... i>
ATTNKERN_INLINE void zip(Vec<A>& a, Vec<A>& b, std::index_sequence<i...>) {
  constexpr int n = sizeof...(i);
  const Vec<A> low = __builtin_shufflevector(a, b, (static_cast<int>(i) / 2 + static_cast<int>(i) % 2 * n)...);
  b = __builtin_shufflevector(a, b, (n / 2 + static_cast<int>(i) / 2 + static_cast<int>(i) % 2 * n)...);
  a = low;
}

// f(k) with the kernel's last size, as a constant where it is 2
template <class F>
ATTNKERN_INLINE void visit_kernel(int64_t k, const F& f) {
  k == 2 ? f(std::integral_constant<int64_t, 2>{}) : f(k);
}

// Channels of a row of patches that are asked for before they are copied: channels lie pages apart, out of sight of the
// processor's own prefetching.
constexpr int64_t kAheadRows = 8;

// every[i][l] = from[l k + i] by way of `line`, and every[i][l] -> line[l k + i]: k = 2 by vectors.
template <class T, class X, class K>
ATTNKERN_INLINE void deal(const T* from, X* line, RowsAt<X> every, int64_t n, K k) {
  using A = Accumulator<X>;
  if constexpr (std::is_same_v<K, int64_t>) {
    copy(from, line, n * k);
    for (int64_t i = 0; i < k; ++i)
      for (int64_t l = 0; l < n; ++l) every.p[i * every.ld + l] = line[l * k + i];
  } else {
    each_pair<A>(n, [&](int64_t l, auto access, auto first, auto second) ATTNKERN_INLINE_LAMBDA {
      Vec<A> low = first.read(from + 2 * l), high = second.read(from + 2 * l + kLanes<A>);
      unzip<A>(low, high, std::make_index_sequence<kLanes<A>>{});
      access.write(every.p + l, low);
      access.write(every.p + every.ld + l, high);
    });
  }
}
template <class A, class K>
ATTNKERN_INLINE void gather(RowsAt<const A> every, A* line, int64_t n, K k) {
  if constexpr (std::is_same_v<K, int64_t>) {
    for (int64_t i = 0; i < k; ++i)
      for (int64_t l = 0; l < n; ++l) line[l * k + i] = every.p[i * every.ld + l];
  } else {
    each_pair<A>(n, [&](int64_t l, auto access, auto first, auto second) ATTNKERN_INLINE_LAMBDA {
      Vec<A> low = access.read(every.p + l), high = access.read(every.p + every.ld + l);
      zip<A>(low, high, std::make_index_sequence<kLanes<A>>{});
      first.write(line + 2 * l, low);
      second.write(line + 2 * l + kLanes<A>, high);
    });
  }
}

template <class T, class X>
Operand<X> load_patches(const Inputs& p, bool last, int64_t b, int64_t begin, int64_t n, const Scratch& s) {
  const Sizes& z = p.sizes;
  const int64_t channels = z.channels, k3 = z.kernel[2], rows = z.kernel[0] * z.kernel[1];
  X *to = static_cast<X*>(s.x[0]), *line = static_cast<X*>(s.line);
  const int64_t ld = last ? leading(terms(z)) : s.ld;
  each_run(z, begin, n, [&](int64_t q1, int64_t q2, int64_t q3, int64_t run, int64_t at) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t x = patch_row(z, q1, q2, q3, i);
      if (last) {
        for (int64_t l = 0; l < run * k3; ++l)
          copy(element<const T>(p.x, b, 0, x + l), to + (at + l / k3) * ld + (i * k3 + l % k3) * channels, channels);
        continue;
      }
      for (int64_t c = 0; c < channels; ++c) {
        if (c + kAheadRows < channels) prefetch<false>(element<const T>(p.x, b, c + kAheadRows, x), run * k3);
        visit_kernel(k3, [&](auto k) {
          deal(element<const T>(p.x, b, c, x), line, RowsAt<X>{to + (i * k * channels + c) * ld + at, channels * ld},
               run, k);
        });
      }
    }
  });
  return last ? Operand<X>{to, 1, ld} : Operand<X>{to, ld, 1};
}

// dx = d + the gradients of a tile's patches, in `from` as load_patches has them, and d where a row ends uncovered.
template <class T, class A>
void put_patches(const BackwardParams& p, bool last, int64_t b, int64_t begin, int64_t n, const Scratch& s,
                 bool with_d) {
  const Sizes& z = p.sizes;
  const int64_t channels = z.channels, k3 = z.kernel[2], rows = z.kernel[0] * z.kernel[1];
  const int64_t left = z.x[2] - z.grid[2] * k3, ld = last ? leading(terms(z)) : s.ld;
  A *from = static_cast<A*>(s.x[0]), *line = static_cast<A*>(s.line);
  const auto put = [&](const A* sums, int64_t c, int64_t l, int64_t count) ATTNKERN_INLINE_LAMBDA {
    T* to = element<T>(p.dx, b, c, l);
    const T* d = with_d ? element<const T>(p.d, b, c, l) : nullptr;
    each_vector<A>(count, [&](int64_t i, auto access) {
      const Vec<A> sum = sums ? access.read(sums + i) : Vec<A>{};
      access.write(to + i, d ? access.read(d + i) + sum : sum);
    });
  };
  each_run(z, begin, n, [&](int64_t q1, int64_t q2, int64_t q3, int64_t run, int64_t at) {
    const int64_t rest = q3 + run == z.grid[2] ? left : 0;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t x = patch_row(z, q1, q2, q3, i);
      if (last) {
        for (int64_t l = 0; l < run * k3; ++l)
          put(from + (at + l / k3) * ld + (i * k3 + l % k3) * channels, 0, x + l, channels);
        for (int64_t l = run * k3; l < run * k3 + rest; ++l) put(nullptr, 0, x + l, channels);
        continue;
      }
      for (int64_t c = 0; c < channels; ++c) {
        visit_kernel(k3, [&](auto k) {
          gather(RowsAt<const A>{from + (i * k * channels + c) * ld + at, channels * ld}, line, run, k);
        });
        put(line, c, x, run * k3);
        if (rest) put(nullptr, c, x + run * k3, rest);
      }
    }
  });
}

template <class T>
void put_uncovered(const BackwardParams& p, int64_t b) {
  const Sizes& z = p.sizes;
  const bool last = channels_last(p.x), with_d = p.d.data && p.target == Target::x;
  const int64_t rows = last ? z.x[2] : z.channels, length = last ? z.channels : z.x[2];
  for (int64_t x1 = 0; x1 < z.x[0]; ++x1)
    for (int64_t x2 = x1 < z.grid[0] * z.kernel[0] ? z.grid[1] * z.kernel[1] : 0; x2 < z.x[1]; ++x2)
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t c = last ? 0 : i, l = (x1 * z.x[1] + x2) * z.x[2] + (last ? i : 0);
        T* to = element<T>(p.dx, b, c, l);
        with_d ? void(std::memcpy(to, element<const T>(p.d, b, c, l), length * sizeof(T)))
               : void(std::memset(to, 0, length * sizeof(T)));
      }
}

// ---- products with alpha

// y = alpha x over n positions from `begin`; x is a map's tile in either type.
template <class T, class S, class A>
void scale_tile(Operand<S> x, const A* alpha, const Map& y, bool last, int64_t b, int64_t begin, int64_t n,
                int64_t channels, bool streaming) {
  T* first = element<T>(y, b, 0, begin);
  const int64_t rows = last ? n : channels, length = last ? channels : n;
  const int64_t ld_x = last ? x.position : x.channel, ld_y = last ? y.stride_position : y.stride_channel;
  visit_writes(streaming, first, ld_y, [&](auto full) {
    for (int64_t i = 0; i < rows; ++i) {
      const S* from = x.p + i * ld_x;
      T* to = first + i * ld_y;
      if (std::is_same_v<decltype(full), Whole> && i + 2 < rows) prefetch<true>(to + 2 * ld_y, length);
      if (last) {
        const A factor = alpha[i];
        each_vector_as<decltype(full), A>(
            length, [&](int64_t j, auto access) { access.write(to + j, factor * access.read(from + j)); });
      } else {
        each_vector_as<decltype(full), A>(length, [&](int64_t j, auto access) {
          access.write(to + j, access.read(alpha + j) * access.read(from + j));
        });
      }
    }
  });
}

// sums[l] = sum_c dy x
template <class S, class A>
void dot_channels(Operand<S> dy, Operand<S> x, bool last, int64_t n, int64_t channels, A* sums) {
  constexpr int lanes = kLanes<A>;
  if (last) {
    for (int64_t l = 0; l < n; l += lanes) {
      const int64_t count = n - l < lanes ? n - l : lanes;
      Vec<A> v[lanes] = {};
      for (int64_t i = 0; i < count; ++i) {
        const S* a = dy.p + (l + i) * dy.position;
        const S* c = x.p + (l + i) * x.position;
        Vec<A> sum{};
        each_vector<A>(channels, [&](int64_t j, auto access) { sum += access.read(a + j) * access.read(c + j); });
        v[i] = sum;
      }
      const Vec<A> all = sum_each<A>(v);
      count == lanes ? store(sums + l, all) : store_n(sums + l, all, count);
    }
    return;
  }
  const auto add = [&](int64_t c, auto rows) ATTNKERN_INLINE_LAMBDA {
    constexpr int R = decltype(rows)::value;
    each_vector<A>(n, [&](int64_t l, auto access) ATTNKERN_INLINE_LAMBDA {
      Vec<A> products[R];
      for (int i = 0; i < R; ++i)
        products[i] = access.read(dy.p + (c + i) * dy.channel + l) * access.read(x.p + (c + i) * x.channel + l);
      Vec<A> sum = products[0];
      if constexpr (R == 4) sum = (products[0] + products[1]) + (products[2] + products[3]);
      access.write(sums + l, c ? access.read(sums + l) + sum : sum);
    });
  };
  int64_t c = 0;
  for (; c + 4 <= channels; c += 4) add(c, std::integral_constant<int, 4>{});
  for (; c < channels; ++c) add(c, std::integral_constant<int, 1>{});
}

}  // namespace attnkern::attention_gate::ATTNKERN_ISA
