// The product that every step of a tile is, and the transposition between its layouts.
//
//   Computes  out[i,j] = finish(sum_k a(i,k) b[k,j]);  to[j,i] = from[i,j]
//   Layout    rows of b and out are contiguous, a has any strides: a map channels first is one channels last
//   transposed.
//             bfloat16 may come in pairs of adjacent terms k: then k counts pairs
//   Mapping   register tiles of 8 x 2 vectors (4 x 2 of narrow ones), columns by columns: b's two vectors stay in L1
//   Traffic   a once for two vectors of columns, b once for eight rows; 255 of 260 GFLOP/s on one core from L2
//   Numerics  accumulation type; one chain of `inner` terms, which callers keep at kChain where they can
namespace attnkern::attention_gate::ATTNKERN_ISA {

constexpr int kTileRows = ATTNKERN_BYTES == 64 ? 8 : 4;

template <int M, int N, class E, class Out, class Finish, class Access>
ATTNKERN_INLINE void product_tile(const Strided<E>& a, RowsAt<const E> b, RowsAt<Out> out, int64_t i, int64_t j,
                                  int64_t inner, const Finish& finish, const Access& access) {
  constexpr int lanes = kLanes<Accumulator<E>>;
  Vec<Accumulator<E>> sums[M][N] = {};
  const E *ak = a.p + i * a.row, *bk = b.p + j;
  for (int64_t k = 0; k < inner; ++k, ak += a.column, bk += b.ld) {
    decltype(access.read(bk)) v[N];
    for (int n = 0; n < N; ++n) v[n] = access.read(bk + n * lanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) multiply_add(sums[m][n], ak[m * a.row], v[n]);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      const int64_t column = j + n * lanes;
      access.write(out.p + (i + m) * out.ld + column, finish(sums[m][n], i + m, column, access));
    }
}

// ahead(i, j) of a product whose results lie in cache
struct Nothing {
  ATTNKERN_INLINE void operator()(int64_t, int64_t) const {}
};

// Full is Whole or Streamed, how whole vectors are written; finish(sum, i, j, access) makes a result of a sum; the feed
// hears of the multiplications as they are done; ahead(i, j) hears of each row of a register tile one tile before.
template <class Full = Whole, class E, class Out, class Finish, class Ahead = Nothing>
void product(Strided<E> a, RowsAt<const E> b, RowsAt<Out> out, int64_t rows, int64_t columns, int64_t inner,
             const Finish& finish, Feed& feed, const Ahead& ahead = {}) {
  constexpr int64_t lanes = kLanes<Accumulator<E>>;
  const auto column = [&](int64_t j, auto n, auto access) ATTNKERN_INLINE_LAMBDA {
    constexpr int N = decltype(n)::value;
    int64_t i = 0;
    for (; i + kTileRows <= rows; i += kTileRows) {
      const bool turn = i + 2 * kTileRows > rows;
      for (int64_t m = 0; m < kTileRows; ++m) ahead(turn ? m : i + kTileRows + m, turn ? j + N * lanes : j);
      product_tile<kTileRows, N>(a, b, out, i, j, inner, finish, access);
      feed.step(kTileRows * N * lanes * inner);
    }
    if (kTileRows == 8 && i + 4 <= rows) {
      product_tile<4, N>(a, b, out, i, j, inner, finish, access);
      i += 4;
    }
    for (; i < rows; ++i) product_tile<1, N>(a, b, out, i, j, inner, finish, access);
  };
  int64_t j = 0;
  for (; j + 2 * lanes <= columns; j += 2 * lanes) column(j, std::integral_constant<int, 2>{}, Full{});
  if (j + lanes <= columns) {
    column(j, std::integral_constant<int, 1>{}, Full{});
    j += lanes;
  }
  if (j < columns) column(j, std::integral_constant<int, 1>{}, Part{columns - j});
}

// finish of a plain product, and of one that is added to what out holds
struct Sum {
  template <class V, class Access>
  ATTNKERN_INLINE V operator()(V sum, int64_t, int64_t, const Access&) const {
    return sum;
  }
};
template <class A>
struct AddTo {
  RowsAt<const A> out;
  template <class Access>
  ATTNKERN_INLINE Vec<A> operator()(Vec<A> sum, int64_t i, int64_t j, const Access& access) const {
    return access.read(out.p + i * out.ld + j) + sum;
  }
};

// out (+)= a b in chains of kChain terms; out's columns are whole vectors
template <class E>
void accumulate(Strided<E> a, RowsAt<const E> b, RowsAt<Accumulator<E>> out, int64_t rows, int64_t columns,
                int64_t inner, bool add, Feed& feed) {
  using A = Accumulator<E>;
  for (int64_t k = 0; k == 0 || k < inner; k += kChain) {
    const Strided<E> ak{a.p + k * a.column, a.row, a.column};
    const RowsAt<const E> bk{b.p + k * b.ld, b.ld};
    const int64_t n = inner - k < kChain ? inner - k : kChain;
    if (k || add)
      product(ak, bk, out, rows, columns, n, AddTo<A>{{out.p, out.ld}}, feed);
    else
      product(ak, bk, out, rows, columns, n, Sum{}, feed);
  }
}

// ---- transposition

template <int width, int n, class V, size_t... i>
ATTNKERN_INLINE void exchange(V& a, V& b, std::index_sequence<i...>) {
  // blocks of `width` lanes: the odd ones of a for the even ones of b
  constexpr auto odd = [](size_t lane) { return lane / width % 2; };
  const V low = __builtin_shufflevector(a, b, (odd(i) ? static_cast<int>(i) - width + n : static_cast<int>(i))...);
  const V high = __builtin_shufflevector(a, b, (odd(i) ? static_cast<int>(i) + n : static_cast<int>(i) + width)...);
  a = low, b = high;
}

template <class A, int width = 1, int n>
ATTNKERN_INLINE void transpose_square(Vec<A> (&v)[n]) {
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i)
    if (i / width % 2 == 0) exchange<width, n>(v[i], v[i + width], std::make_index_sequence<n>{});
  if constexpr (2 * width < n) transpose_square<A, 2 * width>(v);
}

// from [rows, columns] -> to [columns, rows]
template <class A>
void transpose(RowsAt<const A> from, RowsAt<A> to, int64_t rows, int64_t columns) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t i = 0; i < rows; i += lanes)
    for (int64_t j = 0; j < columns; j += lanes) {
      const int64_t height = rows - i < lanes ? rows - i : lanes, width = columns - j < lanes ? columns - j : lanes;
      Vec<A> v[lanes];
      if (height == lanes && width == lanes) {
        for (int m = 0; m < lanes; ++m) v[m] = load(from.p + (i + m) * from.ld + j);
        transpose_square<A>(v);
        for (int m = 0; m < lanes; ++m) store(to.p + (j + m) * to.ld + i, v[m]);
        continue;
      }
      for (int64_t m = 0; m < lanes; ++m) {
        const A* row = from.p + (i + m) * from.ld + j;
        v[m] = m >= height ? Vec<A>{} : width == lanes ? load(row) : load_n(row, width);
      }
      transpose_square<A>(v);
      for (int64_t m = 0; m < width; ++m) {
        A* row = to.p + (j + m) * to.ld + i;
        height == lanes ? store(row, v[m]) : store_n(row, v[m], height);
      }
    }
}

}  // namespace attnkern::attention_gate::ATTNKERN_ISA
