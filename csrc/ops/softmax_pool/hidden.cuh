// The gated scorer's gradients through its hidden layer: products with the chunk of da, db that backward.cu left.
#pragma once

#include "cuda/mma.cuh"
#include "ops/softmax_pool/backward.cuh"

namespace attnkern::softmax_pool {

// d [128, 128] += a b over panels of 32, by a block of 256 threads: 16-bit elements on the tensor cores, a warp 32 rows
// and 64 columns; floats by multiply-adds, a thread 8 rows and 8 columns. a is a tile [128, 32], or [32, 128]
// transposed.
template <class T>
struct BlockProduct {
  static constexpr int size = 128, panel = 32;
  FragmentD sum[2][8] = {};  // two blocks of 16 rows, eight of 8 columns

  template <bool transposed>
  ATTNKERN_DEVICE void add(const Tile<T>& a, const Tile<T>& b) {
    const int row = warp_id() / 2 * 32, column = warp_id() % 2 * 64;
#pragma unroll
    for (int k = 0; k < panel; k += 16) {
      FragmentA rows[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        rows[i] = transposed ? load_a_transposed(a.data, k * a.stride + row + 16 * i, a.stride)
                             : load_a(a.data, (row + 16 * i) * a.stride + k, a.stride);
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        FragmentB columns[2];
        load_b(b.data, k * b.stride + column + 8 * j, b.stride, columns);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int h = 0; h < 2; ++h) multiply_add<T>(sum[i][j + h], rows[i], columns[h]);
      }
    }
  }
  // f(row, column, value) for this thread's sums.
  template <class F>
  ATTNKERN_DEVICE void each(const F& f) const {
    const int row = warp_id() / 2 * 32 + lane_id() / 4, column = warp_id() % 2 * 64 + lane_id() % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int v = 0; v < 4; ++v) f(row + 16 * i + v / 2 * 8, column + 8 * j + v % 2, sum[i][j].values[v]);
  }
};

template <>
struct BlockProduct<float> {
  static constexpr int size = 128, panel = 32;
  float sum[8][8] = {};

  template <bool transposed>
  ATTNKERN_DEVICE void add(const Tile<float>& a, const Tile<float>& b) {
    const int row = thread_index() / 16, column = thread_index() % 16 * 4;
#pragma unroll 4
    for (int k = 0; k < panel; ++k) {
      const Vec<float, 4> low = b.template load<4>(k, column), high = b.template load<4>(k, column + 64);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int m = row + 16 * i;
        const float weight = a.data.load(transposed ? k * a.stride + m : m * a.stride + k);
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          sum[i][v] += weight * low[v];
          sum[i][4 + v] += weight * high[v];
        }
      }
    }
  }
  template <class F>
  ATTNKERN_DEVICE void each(const F& f) const {
    const int row = thread_index() / 16, column = thread_index() % 16 * 4;
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int v = 0; v < 8; ++v) f(row + 16 * i, column + v / 4 * 64 + v % 4, sum[i][v]);
  }
};

// Rows of a matrix [rows, stride] as items to fetch: `features` of each.
template <class T>
ATTNKERN_DEVICE Span<const T*> rows_span(const void* data, int64_t at, int64_t stride, int64_t features) {
  const T* const from = static_cast<const T*>(data) + at;
  constexpr int pack = pack_size<T>();
  const bool vector = reinterpret_cast<uintptr_t>(from) % 16 == 0 && stride % pack == 0 && features % pack == 0;
  return {from, stride, 1, static_cast<int>(features), true, vector};
}

ATTNKERN_DEVICE int at_most(int64_t value, int limit) {
  return value < 0 ? 0 : value < limit ? static_cast<int>(value) : limit;
}

// Computes   dvalues = sum_m p dz + sum_k da V + db U
// Layout     p [rows, M], da and db [rows, 2, K]; V, U [K, D]; dvalues [B, 1, N, D] or [B, 1, D, N]
// Mapping    a block: 128 items of a unit, 128 features; panels of 32 queries or hidden units, two stages
// Traffic    p, da, db once a block of features, dz, V, U once a block of items, from L2; dvalues once
// Numerics   float; panels in order
template <class T>
ATTNKERN_KERNEL(kProductThreads, 1)
softmax_pool_hidden_values_kernel(ATTNKERN_GRID_CONSTANT const BackwardParams p, ATTNKERN_GRID_CONSTANT const Plan plan,
                                  const Hidden hidden, int tiles, int columns) {
  using Product = BlockProduct<T>;
  constexpr int size = Product::size, panel = Product::panel;
  const Sizes& n = p.sizes;
  const int64_t first = int64_t{block_index() % columns} * size;
  const int64_t tile = block_index() / columns % tiles, unit = hidden.first + block_index() / columns / tiles;
  const Piece piece = piece_of(p, plan, unit);
  const int64_t item = piece.begin + tile * size, row = (unit - hidden.first) * plan.length + tile * size;
  if (item >= piece.end) return;
  const int count = at_most(piece.end - item, size), features = at_most(n.features - first, size);

  SharedArena arena;
  const Stages<T> a = take_stages<T>(arena, 2, size, panel), b = take_stages<T>(arena, 2, panel, size);
  // the terms one after another: p dz, da V, db U; each in panels
  const int query_panels = static_cast<int>((n.queries + panel - 1) / panel);
  const int hidden_panels = static_cast<int>((n.hidden + panel - 1) / panel);
  const int panels = query_panels + hidden_panels * (p.U ? 2 : 1);
  const auto start_panel = [&](int index, int stage) {
    if (index < query_panels) {
      const int64_t m = int64_t{index} * panel;
      const int own = at_most(n.queries - m, panel);
      fetch(a[stage], rows_span<T>(hidden.weights, row * n.queries + m, n.queries, own), 0, count);
      fetch(b[stage], rows_span<T>(p.dz, (piece.sample * n.queries + m) * n.features + first, n.features, features), 0,
            own);
    } else if (index < panels) {
      const int which = (index - query_panels) / hidden_panels;
      const int64_t k = int64_t{(index - query_panels) % hidden_panels} * panel;
      const int own = at_most(n.hidden - k, panel);
      fetch(a[stage], rows_span<T>(hidden.gradients, (row * 2 + which) * n.hidden + k, 2 * n.hidden, own), 0, count);
      fetch(b[stage], rows_span<T>(which ? p.U : p.V, k * n.features + first, n.features, features), 0, own);
    }
    async_commit();
  };
  Product product;
  start_panel(0, 0);
  for (int i = 0; i < panels; ++i) {
    async_wait();
    block_sync();  // this panel is there, and the other stage was read
    start_panel(i + 1, (i + 1) % 2);
    product.template add<false>(a[i % 2], b[i % 2]);
  }
  async_wait();
  block_sync();  // the result takes the panels' place
  SharedArena again;
  const Tile<T> out = take_tile<T>(again, size, size);
  product.each([&](int t, int d, float value) { out.data.store(t * out.stride + d, narrow<T>(value)); });
  block_sync();
  Span<T*> dvalues = span_of<T>(p.dvalues, items_batch(p, piece.sample), 0, n.features);
  dvalues.data += first * dvalues.feature;
  dvalues.vector = dvalues.vector && features % pack_size<T>() == 0;
  dvalues.features = features;
  put(out, dvalues, item, count);
}

// Computes   dV += sum_n da v, dU += sum_n db v, over the units of a split
// Layout     da and db [rows, 2, K]; values [B, 1, N, D] or [B, 1, D, N]; sums [splits, 2, K, D]
// Mapping    a block: a split, 128 hidden units of V or U, 128 features; panels of 32 items, two stages
// Traffic    values once a block of hidden units, da and db once a block of features, from L2
// Numerics   float; panels, units and chunks in order
template <class T>
ATTNKERN_KERNEL(kProductThreads, 1)
softmax_pool_hidden_weights_kernel(ATTNKERN_GRID_CONSTANT const BackwardParams p,
                                   ATTNKERN_GRID_CONSTANT const Plan plan, const Hidden hidden, float* sums,
                                   int matrices) {
  using Product = BlockProduct<T>;
  constexpr int size = Product::size, panel = Product::panel;
  const Sizes& n = p.sizes;
  const int64_t columns = (n.features + size - 1) / size, blocks = (n.hidden + size - 1) / size;
  int64_t index = block_index();
  const int64_t first = index % columns * size;
  index /= columns;
  const int64_t k0 = index % blocks * size;
  index /= blocks;
  const int64_t which = index % matrices, split = index / matrices;
  const int features = at_most(n.features - first, size), units = at_most(n.hidden - k0, size);

  SharedArena arena;
  const Stages<T> a = take_stages<T>(arena, 2, panel, size), b = take_stages<T>(arena, 2, panel, size);
  Product product;
  const int64_t share = (hidden.last - hidden.first + plan.splits - 1) / plan.splits;
  const int64_t begin = hidden.first + split * share, end = begin + share < hidden.last ? begin + share : hidden.last;
  for (int64_t u = begin; u < end; ++u) {
    const Piece piece = piece_of(p, plan, u);
    Span<const T*> values = span_of<T>(p.values, items_batch(p, piece.sample), 0, n.features);
    values.data += first * values.feature;
    values.vector = values.vector && features % pack_size<T>() == 0;
    values.features = features;
    const int64_t row = (u - hidden.first) * plan.length - piece.begin;
    const Span<const T*> gradients =
        rows_span<T>(hidden.gradients, (row * 2 + which) * n.hidden + k0, 2 * n.hidden, units);
    const auto start_panel = [&](int64_t item, int stage) {
      if (item < piece.end) {
        const int count = at_most(piece.end - item, panel);
        fetch(a[stage], gradients, item, count);
        fetch(b[stage], values, item, count);
      }
      async_commit();
    };
    int stage = 0;
    block_sync();  // the unit before was read
    start_panel(piece.begin, 0);
    for (int64_t item = piece.begin; item < piece.end; item += panel, stage ^= 1) {
      async_wait();
      block_sync();  // this panel is there, and the other stage was read
      start_panel(item + panel, stage ^ 1);
      product.template add<true>(a[stage], b[stage]);
    }
    async_wait();
  }
  float* const out = sums + ((split * 2 + which) * n.hidden + k0) * n.features + first;
  product.each([&](int k, int d, float value) {
    if (k < units && d < features) add_global(out + k * n.features + d, value);
  });
}

template <class T>
Status launch_hidden_values(const BackwardParams& p, const Plan& plan, const Hidden& hidden, void* stream) {
  constexpr int size = BlockProduct<T>::size, panel = BlockProduct<T>::panel;
  const int tiles = static_cast<int>((plan.length + size - 1) / size);
  const int columns = static_cast<int>((p.sizes.features + size - 1) / size);
  const int panels =
      shared_bytes<T>(2 * size * tile_stride<T>(panel)) + shared_bytes<T>(2 * panel * tile_stride<T>(size));
  const int out = shared_bytes<T>(size * tile_stride<T>(size));
  return launch(softmax_pool_hidden_values_kernel<T>,
                {(hidden.last - hidden.first) * tiles * columns, kProductThreads, panels > out ? panels : out}, stream,
                p, plan, hidden, tiles, columns);
}

template <class T>
Status launch_hidden_weights(const BackwardParams& p, const Plan& plan, const Hidden& hidden, float* sums,
                             void* stream) {
  constexpr int size = BlockProduct<T>::size, panel = BlockProduct<T>::panel;
  const int64_t blocks = (p.sizes.hidden + size - 1) / size, columns = (p.sizes.features + size - 1) / size;
  const int matrices = p.U ? 2 : 1;
  return launch(softmax_pool_hidden_weights_kernel<T>,
                {columns * blocks * matrices * plan.splits, kProductThreads,
                 2 * shared_bytes<T>(2 * panel * tile_stride<T>(size))},
                stream, p, plan, hidden, sums, matrices);
}

}  // namespace attnkern::softmax_pool
