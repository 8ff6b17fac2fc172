// The gated scorer's gradients through its hidden layer: products with the chunk of da, db that backward.cu left.
#pragma once

#include "ops/softmax_pool/backward.cuh"

namespace attnkern::softmax_pool {

// Features of a block: what 8 blocks of 4 items leave of the threads, a pack each.
template <class T>
ATTNKERN_HOST_DEVICE constexpr int value_columns() {
  return kProductThreads / (kProductItems / kItemBlock) * pack_size<T>();
}

// Computes   dvalues = sum_m p dz + sum_k da V + db U
// Layout     p [rows, M], da and db [rows, 2, K]; V, U [K, D]; dvalues [B, 1, N, D] or [B, 1, D, N]
// Mapping    a block: 32 items of a unit, `value_columns` features; a thread 4 items and a pack. Panels of p, da, db of
//            64 columns in shared memory
// Traffic    the panels once a block of features, V and U once a block, from L2; dvalues once
// Numerics   float; panels in order
template <class T>
ATTNKERN_KERNEL(kProductThreads, 2)
softmax_pool_hidden_values_kernel(ATTNKERN_GRID_CONSTANT const BackwardParams p, ATTNKERN_GRID_CONSTANT const Plan plan,
                                  const Hidden hidden, int tiles, int columns) {
  constexpr int pack = pack_size<T>(), width = value_columns<T>();
  const Sizes& n = p.sizes;
  const int64_t first = int64_t{block_index() % columns} * width;
  const int64_t tile = block_index() / columns % tiles, unit = hidden.first + block_index() / columns / tiles;
  const Piece piece = piece_of(p, plan, unit);
  const int64_t item = piece.begin + tile * kProductItems, left = piece.end - item;
  if (left <= 0) return;
  const int count = static_cast<int>(left < kProductItems ? left : kProductItems);
  const int64_t row = (unit - hidden.first) * plan.length + tile * kProductItems;
  const int features = static_cast<int>(n.features - first < width ? n.features - first : width);

  SharedArena arena;
  const Tile<T> out = take_tile<T>(arena, kProductItems, width);
  const Shared<float> panel = arena.take<float>(kProductItems * kPanel);
  const int t = thread_index() / (width / pack) * kItemBlock, d = thread_index() % (width / pack) * pack;

  RowSum<T> sum;
  // += a w for a [rows, count of w], whose rows are `stride` apart
  const auto add = [&](const float* a, int64_t stride, Matrix<T> w) {
    const int all = w.count;
    for (int k = 0; k < all; k += kPanel) {
      w.count = all - k < kPanel ? all - k : kPanel;
      block_sync();
      for (int i = thread_index(); i < kProductItems * kPanel; i += block_size()) {
        const int r = i / kPanel, column = i % kPanel;
        panel.store(i, r < count && column < w.count ? load_global(a + (row + r) * stride + k + column) : 0.0f);
      }
      block_sync();
      sum.add(panel, kPanel, t, w, d);
      w.data += kPanel * w.stride;
    }
  };
  const auto part = [&](const T* w, int64_t rows) { return matrix<pack, T>(w + first, n.features, rows, features); };
  add(hidden.weights, n.queries, part(static_cast<const T*>(p.dz) + piece.sample * n.queries * n.features, n.queries));
  add(hidden.layer, 2 * n.hidden, part(static_cast<const T*>(p.V), n.hidden));
  if (p.U) add(hidden.layer + n.hidden, 2 * n.hidden, part(static_cast<const T*>(p.U), n.hidden));
  sum.store(out, t, d);
  block_sync();
  Span<T*> dvalues = span_of<T>(p.dvalues, items_batch(p, piece.sample), 0, n.features);
  dvalues.data += first * dvalues.feature;
  dvalues.features = features;
  put(out, dvalues, item, count);
}

// Computes   dV += sum_n da v, dU += sum_n db v, over the units of a split
// Layout     da and db [rows, 2, K]; values [B, 1, N, D] or [B, 1, D, N]; sums [splits, 2, K, D]
// Mapping    a block: a split, 64 hidden units of V or U, 128 features; tiles of 32 items, two stages
// Traffic    values once a block of hidden units, da and db once a block of features, from L2
// Numerics   float; tiles, units and chunks in order
template <class T>
ATTNKERN_KERNEL(kProductThreads, 2)
softmax_pool_hidden_weights_kernel(ATTNKERN_GRID_CONSTANT const BackwardParams p,
                                   ATTNKERN_GRID_CONSTANT const Plan plan, const Hidden hidden, float* sums, int splits,
                                   int matrices) {
  const Sizes& n = p.sizes;
  const int panels = static_cast<int>((n.hidden + kPanel - 1) / kPanel);
  const int columns = static_cast<int>((n.features + kProductColumns - 1) / kProductColumns);
  int64_t index = block_index();
  const int64_t first = index % columns * kProductColumns;
  index /= columns;
  const int64_t unit0 = index % panels * kPanel;
  index /= panels;
  const int64_t which = index % matrices, split = index / matrices;
  const int features = static_cast<int>(n.features - first < kProductColumns ? n.features - first : kProductColumns);
  const int units = static_cast<int>(n.hidden - unit0 < kPanel ? n.hidden - unit0 : kPanel);

  SharedArena arena;
  const Stages<T> tiles = take_stages<T>(arena, 2, kProductItems, kProductColumns);
  const Shared<float> panel = arena.take<float>(kProductItems * kPanel);
  Accumulator<T, 4> acc;
  acc.start(kPanel, kProductColumns);

  const int64_t share = (hidden.last - hidden.first + splits - 1) / splits;
  const int64_t begin = hidden.first + split * share, end = begin + share < hidden.last ? begin + share : hidden.last;
  for (int64_t u = begin; u < end; ++u) {
    const Piece piece = piece_of(p, plan, u);
    Span<const T*> values = span_of<T>(p.values, items_batch(p, piece.sample), 0, n.features);
    values.data += first * values.feature;
    values.features = features;
    const auto start_tile = [&](int64_t item, int stage) {
      const int64_t left = piece.end - item;
      if (left > 0) fetch(tiles[stage], values, item, static_cast<int>(left < kProductItems ? left : kProductItems));
      async_commit();
    };
    int stage = 0;
    block_sync();  // the unit before was read
    start_tile(piece.begin, 0);
    for (int64_t item = piece.begin; item < piece.end; item += kProductItems, stage ^= 1) {
      async_wait();
      block_sync();  // this tile is there, and the other stage and the panel were read
      start_tile(item + kProductItems, stage ^ 1);
      const int64_t row = (u - hidden.first) * plan.length + item - piece.begin;
      for (int i = thread_index(); i < kProductItems * kPanel; i += block_size()) {
        const int t = i / kPanel, k = i % kPanel;
        const float* const from = hidden.layer + ((row + t) * 2 + which) * n.hidden + unit0 + k;
        panel.store(i, item + t < piece.end && k < units ? load_global(from) : 0.0f);
      }
      block_sync();
      acc.add(tiles[stage], panel, kPanel, [](int) { return 1.0f; });
    }
    async_wait();
  }
  block_sync();
  acc.merge_groups(Shared<float>::at(0, acc.groups > 1 ? acc.slots * 4 * pack_size<T>() : 0));
  float* const out = sums + ((split * 2 + which) * n.hidden + unit0) * n.features + first;
  acc.each([&](int k, int d, float& value) {
    if (k < units && d < features) add_global(out + k * n.features + d, value);
  });
}

template <class T>
Status launch_hidden_values(const BackwardParams& p, const Plan& plan, const Hidden& hidden, void* stream) {
  const int tiles = static_cast<int>((plan.length + kProductItems - 1) / kProductItems);
  const int columns = static_cast<int>((p.sizes.features + value_columns<T>() - 1) / value_columns<T>());
  const int shared =
      shared_bytes<T>(kProductItems * tile_stride<T>(value_columns<T>())) + shared_bytes<float>(kProductItems * kPanel);
  return launch(softmax_pool_hidden_values_kernel<T>,
                {(hidden.last - hidden.first) * tiles * columns, kProductThreads, shared}, stream, p, plan, hidden,
                tiles, columns);
}

template <class T>
Status launch_hidden_weights(const BackwardParams& p, const Plan& plan, const Hidden& hidden, float* sums,
                             void* stream) {
  const int64_t panels = (p.sizes.hidden + kPanel - 1) / kPanel;
  const int64_t columns = (p.sizes.features + kProductColumns - 1) / kProductColumns;
  const int matrices = p.U ? 2 : 1, splits = plan.splits;
  const int tiles = shared_bytes<T>(2 * kProductItems * tile_stride<T>(kProductColumns)) +
                    shared_bytes<float>(kProductItems * kPanel);
  const int handed = shared_bytes<float>(kProductThreads * 4 * pack_size<T>());
  return launch(softmax_pool_hidden_weights_kernel<T>,
                {columns * panels * matrices * splits, kProductThreads, tiles > handed ? tiles : handed}, stream, p,
                plan, hidden, sums, splits, matrices);
}

}  // namespace attnkern::softmax_pool
