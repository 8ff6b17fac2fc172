// Products of small matrices in cache; included by foreach_isa.h's kernels after simd.h, once for each instruction set.
//
//   Computes  outer:  out[i,j] (+)= sum_k a(i,k) b[k,j]     lanes along j, a of any strides
//             inner:  out[i,j] (+)= sum_k f(a[i,k], b[j,k])  lanes along k
//   Layout    rows of b and out are contiguous; b is read in its storage type, sums are in A
//   Mapping   register tiles of 4 x 4 vectors (outer; rows left over 1 x 8), or of as many rows pairs as lanes (inner)
//   Traffic   a register tile reads its part of b once; b should lie in L1 or L2
//   Numerics  accumulation type A, float for pairs of bfloat16 (then k counts pairs); outer's chains have at most
//   kChain
//             terms, inner's length / lanes; the order depends on the sizes alone
namespace attnkern::cpu::ATTNKERN_ISA {

// What products of T multiply: pairs of adjacent terms of their sums, or the accumulation type.
template <class T>
constexpr bool kPaired = kPairs && std::is_same_v<T, BFloat16>;
template <class T>
using Term = std::conditional_t<kPaired<T>, Pair, Accumulator<T>>;
template <class T>
using Copied = std::conditional_t<kPaired<T>, T, Accumulator<T>>;  // what copies of their operands hold
template <class T>
constexpr int64_t steps(int64_t terms) {
  return kPaired<T> ? (terms + 1) / 2 : terms;
}

constexpr int64_t kChain = 256;  // terms that are summed in a register before they join the total

// How a vector is read and written: whole, or its first n lanes.
struct Whole {
  template <class T>
  ATTNKERN_INLINE auto read(const T* p) const {
    return load(p);
  }
  template <class T, class V>
  ATTNKERN_INLINE void write(T* p, V v) const {
    store(p, v);
  }
};
// Written past the caches, to addresses that whole vectors align; fence() when done.
struct Streamed : Whole {
  template <class T, class V>
  ATTNKERN_INLINE void write(T* p, V v) const {
    stream(p, v);
  }
};
struct Part {
  int64_t n;
  template <class T>
  ATTNKERN_INLINE auto read(const T* p) const {
    return load_n(p, n);
  }
  template <class T, class V>
  ATTNKERN_INLINE void write(T* p, V v) const {
    store_n(p, v, n);
  }
};

// f(i, access) for the vectors that cover n elements
template <class A, class F>
ATTNKERN_INLINE void each_vector(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) f(i, Whole{});
  if (i < n) f(i, Part{n - i});
}

// a(i,k) = p[i row + k column]
template <class A>
struct Strided {
  const A* p;
  int64_t row, column;
};

template <class P>
struct RowsAt {
  P* p;
  int64_t ld;
};
template <class P>
RowsAt(P*, int64_t) -> RowsAt<P>;

// ---- outer

template <int M, int N, class A, class B, class Out, class Access>
ATTNKERN_INLINE void outer_tile(const Strided<A>& a, const B* b, int64_t ld_b, const Accumulator<A>* init,
                                int64_t ld_init, Out* out, int64_t ld_out, int64_t inner, const Access& access) {
  constexpr int lanes = kLanes<A>;
  Vec<Accumulator<A>> sums[M][N] = {};
  for (int64_t k = 0; k < inner; ++k) {
    decltype(access.read(b)) v[N];
    for (int j = 0; j < N; ++j) v[j] = access.read(b + k * ld_b + j * lanes);
    const A* ak = a.p + k * a.column;
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
      for (int j = 0; j < N; ++j) multiply_add(sums[m][j], ak[m * a.row], v[j]);
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < N; ++j) {
      if (init) sums[m][j] += access.read(init + m * ld_init + j * lanes);
      access.write(out + m * ld_out + j * lanes, sums[m][j]);
    }
}

// Rows of one register tile, all columns.
template <int M, int N, class Full, class A, class B, class Out>
ATTNKERN_INLINE void outer_rows(const Strided<A>& a, RowsAt<const B> b, RowsAt<const Accumulator<A>> init,
                                RowsAt<Out> out, int64_t columns, int64_t inner) {
  constexpr int64_t lanes = kLanes<A>;
  const auto at = [&](int64_t j) { return init.p ? init.p + j : nullptr; };
  int64_t j = 0;
  for (; j + N * lanes <= columns; j += N * lanes)
    outer_tile<M, N>(a, b.p + j, b.ld, at(j), init.ld, out.p + j, out.ld, inner, Full{});
  for (; j + lanes <= columns; j += lanes)
    outer_tile<M, 1>(a, b.p + j, b.ld, at(j), init.ld, out.p + j, out.ld, inner, Full{});
  if (j < columns) outer_tile<M, 1>(a, b.p + j, b.ld, at(j), init.ld, out.p + j, out.ld, inner, Part{columns - j});
}

// out = init + a b; init's data may be null or out itself
template <class A, class B, class Out, class Full = Whole>
void outer(Strided<A> a, RowsAt<const B> b, RowsAt<const Accumulator<A>> init, RowsAt<Out> out, int64_t rows,
           int64_t columns, int64_t inner) {
  const auto piece = [&](int64_t k, int64_t n, RowsAt<const Accumulator<A>> from) {
    Strided<A> ai{a.p + k * a.column, a.row, a.column};
    const RowsAt<const B> bk{b.p + k * b.ld, b.ld};
    RowsAt<Out> to = out;
    int64_t i = 0;
    const auto advance = [&](int64_t by) {
      i += by;
      ai.p += by * a.row;
      to.p += by * out.ld;
      if (from.p) from.p += by * from.ld;
    };
    for (; i + 4 <= rows; advance(4)) outer_rows<4, ATTNKERN_BYTES == 64 ? 4 : 2, Full>(ai, bk, from, to, columns, n);
    for (; i < rows; advance(1)) outer_rows<1, 8, Full>(ai, bk, from, to, columns, n);
  };
  if constexpr (std::is_same_v<Accumulator<A>, Out>) {
    for (int64_t k = 0; k == 0 || k < inner; k += kChain)
      piece(k, inner - k < kChain ? inner - k : kChain, k ? RowsAt<const Out>{out.p, out.ld} : init);
  } else {
    piece(0, inner, init);
  }
}

// out (+)= a b, for b packed in panels of kPanel columns: [inner, kPanel] each, zero beyond b's columns
template <class A>
constexpr int64_t kPanel = 2 * kLanes<A>;

template <bool add = false, class A>
void panel_product(Strided<A> a, const A* panels, RowsAt<Accumulator<A>> out, int64_t rows, int64_t columns,
                   int64_t inner) {
  constexpr int M = ATTNKERN_BYTES == 64 ? 12 : ATTNKERN_BYTES == 32 ? 6 : 4;
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t k = 0; k < inner; k += kChain) {
    const int64_t n = inner - k < kChain ? inner - k : kChain;
    const auto block = [&](int64_t j, const A* b, auto width, auto access) ATTNKERN_INLINE_LAMBDA {
      const auto tile = [&](int64_t i, auto m) ATTNKERN_INLINE_LAMBDA {
        auto* to = out.p + i * out.ld + j;
        if (add)  // sums of a megabyte and more are not in L1, nor in order
          for (int r = 0; r < decltype(m)::value; ++r)
            for (int v = 0; v < decltype(width)::value; ++v) __builtin_prefetch(to + r * out.ld + v * lanes, 1);
        outer_tile<decltype(m)::value, decltype(width)::value>(
            Strided<A>{a.p + i * a.row + k * a.column, a.row, a.column}, b, kPanel<A>, add || k ? to : nullptr, out.ld,
            to, out.ld, n, access);
      };
      int64_t i = 0;
      for (; i + M <= rows; i += M) tile(i, std::integral_constant<int, M>{});
      for (; i < rows; ++i) tile(i, std::integral_constant<int, 1>{});
    };
    int64_t j = 0;
    const auto panel = [&] { return panels + j * inner + k * kPanel<A>; };
    for (; j + kPanel<A> <= columns; j += kPanel<A>) block(j, panel(), std::integral_constant<int, 2>{}, Whole{});
    for (const A* b = panel(); j < columns; j += lanes, b += lanes)
      block(j, b, std::integral_constant<int, 1>{}, Part{columns - j < lanes ? columns - j : lanes});
  }
}

#if defined(ATTNKERN_AVX512_BF16)
// 16 elements rounded to bfloat16, or as they are
template <class T>
ATTNKERN_INLINE Bits16 read_rounded(const T* p, const Whole&) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return load_bits(p);
  else
    return narrow(load(p), BFloat16{});
}
template <class T>
ATTNKERN_INLINE Bits16 read_rounded(const T* p, const Part& part) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return load_bits_n(p, part.n);
  else
    return narrow(load_n(p, part.n), BFloat16{});
}

// *to(k, j) = a vector of pairs of rows 2k and 2k + 1 from column j; zero beyond rows and columns
template <class T, class To>
void pair_rows(RowsAt<const T> from, int64_t rows, int64_t columns, const To& to) {
  for (int64_t k = 0; 2 * k < rows; ++k)
    each_vector<float>(columns, [&](int64_t j, auto access) ATTNKERN_INLINE_LAMBDA {
      const T* row = from.p + 2 * k * from.ld + j;
      const Bits16 even = read_rounded(row, access);
      const Bits16 odd = 2 * k + 1 < rows ? read_rounded(row + from.ld, access) : Bits16{};
      const Bits32 pairs = interleave(even, odd);
      std::memcpy(to(k, j), &pairs, sizeof pairs);
    });
}
#endif

// ---- inner

template <class A, int width, size_t... i>
ATTNKERN_INLINE Vec<A> fold_pair(Vec<A> a, Vec<A> b, std::index_sequence<i...>) {
  // blocks of `width` lanes: the even ones of a and b added to their odd neighbours, a's results first in each pair
  constexpr int lanes = kLanes<A>;
  const Vec<A> low =
      __builtin_shufflevector(a, b,
                              (static_cast<int>(i) / width % 2 * lanes + static_cast<int>(i) / (2 * width) * 2 * width +
                               static_cast<int>(i) % width)...);
  const Vec<A> high =
      __builtin_shufflevector(a, b,
                              (static_cast<int>(i) / width % 2 * lanes + static_cast<int>(i) / (2 * width) * 2 * width +
                               width + static_cast<int>(i) % width)...);
  return low + high;
}

// Lane i of the result is the sum of the lanes of v[i].
template <class A, int width = kLanes<A> / 2, int n>
ATTNKERN_INLINE Vec<A> sum_each(const Vec<A> (&v)[n]) {
  Vec<A> folded[n / 2];
  for (int i = 0; i < n / 2; ++i)
    folded[i] = fold_pair<A, width>(v[i], v[i + n / 2], std::make_index_sequence<kLanes<A>>{});
  if constexpr (n == 2)
    return folded[0];
  else
    return sum_each<A, width / 2>(folded);
}

// f(sum, a, b, k, access) adds the terms of the vectors at k
template <int M, int N, class A, class B, class F>
ATTNKERN_INLINE Vec<A> inner_tile(RowsAt<const A> a, const B* const (&b)[N], int64_t length, const F& f) {
  Vec<A> sums[M * N] = {};
  each_vector<A>(length, [&](int64_t k, auto access) ATTNKERN_INLINE_LAMBDA {
    Vec<A> v[N];
    for (int j = 0; j < N; ++j) v[j] = access.read(b[j] + k);
    for (int m = 0; m < M; ++m) {
      const Vec<A> am = access.read(a.p + m * a.ld + k);
      for (int j = 0; j < N; ++j) f(sums[m * N + j], am, v[j], k, access);
    }
  });
  return sum_each<A>(sums);
}

struct MultiplyAdd {
  template <class V, class Access>
  ATTNKERN_INLINE void operator()(V& sum, V a, V b, int64_t, const Access&) const {
    sum += a * b;
  }
};

template <int M, bool add, class A, class B, class F>
ATTNKERN_INLINE void inner_rows(RowsAt<const A> a, RowsAt<const B> b, RowsAt<A> out, int64_t columns, int64_t length,
                                const F& f) {
  constexpr int N = kLanes<A> / M;
  for (int64_t j = 0; j < columns; j += N) {
    const int64_t n = columns - j < N ? columns - j : N;
    const B* rows[N];
    for (int i = 0; i < N; ++i) rows[i] = b.p + (j + (i < n ? i : 0)) * b.ld;
    const Vec<A> sums = inner_tile<M, N>(a, rows, length, f);
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < n; ++i) {
        A& o = out.p[m * out.ld + j + i];
        o = add ? o + sums[m * N + i] : sums[m * N + i];
      }
  }
}

// out[i,j] (+)= sum_k f(a[i,k], b[j,k])
template <bool add = false, class A, class B, class F = MultiplyAdd>
void inner(RowsAt<const A> a, RowsAt<const B> b, RowsAt<A> out, int64_t rows, int64_t columns, int64_t length,
           const F& f = {}) {
  constexpr int M = kLanes<A> < 4 ? kLanes<A> : 4;
  const auto at = [&](int64_t i, auto m) {
    inner_rows<decltype(m)::value, add>(RowsAt<const A>{a.p + i * a.ld, a.ld}, b, RowsAt<A>{out.p + i * out.ld, out.ld},
                                        columns, length, f);
  };
  int64_t i = 0;
  for (; i + M <= rows; i += M) at(i, std::integral_constant<int, M>{});
  for (; i < rows; ++i) at(i, std::integral_constant<int, 1>{});
}

}  // namespace attnkern::cpu::ATTNKERN_ISA
