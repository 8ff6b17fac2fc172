// The three sums over a tile x [items, features]: over its features, over its items, over the rows of a matrix.
#pragma once

#include "cuda/reduce.cuh"
#include "ops/softmax_pool/tile.cuh"

namespace attnkern::softmax_pool {

constexpr int kItemBlock = 4;  // items that share what is read of a matrix

template <int Width = kWarpSize>
ATTNKERN_DEVICE float group_max(float value) {
#pragma unroll
  for (int mask = Width / 2; mask > 0; mask /= 2) {
    const float other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

// The warp's sum of values[lane * N / 32]: each step halves what a lane still has to add up.
template <int N, int Mask = kWarpSize / 2>
ATTNKERN_DEVICE float scattered_sum(const float (&values)[N]) {
  if constexpr (N == 1) {
    return group_sum<2 * Mask>(values[0]);
  } else {
    const bool upper = lane_id() & Mask;
    float half[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float sent = upper ? values[i] : values[i + N / 2];
      half[i] = (upper ? values[i + N / 2] : values[i]) + shuffle_xor(sent, Mask);
    }
    return scattered_sum<N / 2, Mask / 2>(half);
  }
}

// Rows of a small matrix in global memory, [count, features]; zero beyond.
template <class W>
struct Matrix {
  const W* data;
  int64_t stride;  // between rows
  int count, features;
  bool vector;

  template <int N>
  ATTNKERN_DEVICE Vec<float, N> load(int row, int d) const {
    const W* from = data + row * stride + d;
    if (row < count && vector && d + N <= features) return widen(load_global_vec<N>(from));
    Vec<float, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack[i] = row < count && d + i < features ? widen(load_global(from + i)) : 0.0f;
    return pack;
  }
};

// Packs of N elements of every row are aligned.
template <int N, class W>
ATTNKERN_DEVICE Matrix<W> matrix(const void* data, int64_t stride, int64_t count, int64_t features) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  return {static_cast<const W*>(data), stride, static_cast<int>(count), static_cast<int>(features),
          address % 16 == 0 && stride % N == 0 && features % N == 0};
}

// This lane's one of the sums sum_d x[t + i, d] w[row + r, d] of 4 items and `Rows` rows: sum_index says
// which. Lanes run along the features.
template <int Rows, class T, class W>
ATTNKERN_DEVICE float features_sum(const Tile<T>& x, int t, const Matrix<W>& w, int row) {
  constexpr int pack = 4;  // 8 elements of 4 rows spill
  float sum[kItemBlock * Rows] = {};
  for (int d = lane_id() * pack; d < x.width; d += kWarpSize * pack) {
    Vec<float, pack> weights[Rows];
#pragma unroll
    for (int r = 0; r < Rows; ++r) weights[r] = w.template load<pack>(row + r, d);
#pragma unroll
    for (int i = 0; i < kItemBlock; ++i) {
      const Vec<float, pack> item = widen(x.template load<pack>(t + i, d));
#pragma unroll
      for (int r = 0; r < Rows; ++r)
#pragma unroll
        for (int v = 0; v < pack; ++v) sum[i * Rows + r] += item[v] * weights[r][v];
    }
  }
  return scattered_sum(sum);
}

// The item and row of this lane's sum; `first` of the lanes that have the same one.
struct SumIndex {
  int item, row;
  bool first;
};
template <int Rows>
ATTNKERN_DEVICE SumIndex sum_index() {
  constexpr int lanes = kWarpSize / (kItemBlock * Rows);
  const int index = lane_id() / lanes;
  return {index / Rows, index % Rows, lane_id() % lanes == 0};
}

// emit(t, r, sum_d x[t, d] w[r, d]) by one lane, for every item of the tile and every row of w.
template <int Rows, class T, class W, class Emit>
ATTNKERN_DEVICE void sum_features(const Tile<T>& x, const Matrix<W>& w, const Emit& emit) {
  const SumIndex own = sum_index<Rows>();
  for (int t = warp_id() * kItemBlock; t < x.items; t += warp_count() * kItemBlock)
    for (int row = 0; row < w.count; row += Rows) {
      const float sum = features_sum<Rows>(x, t, w, row);
      if (own.first && row + own.row < w.count) emit(t + own.item, row + own.row, sum);
    }
}

// out[q, d] = sum_t a[t, q] x[t, d], over tiles: in registers. A thread owns slots, each a pack of features of Queries
// queries; where threads are left over, groups of them share the items.
template <class T, int Queries>
struct Accumulator {
  static constexpr int pack = pack_size<T>();
  static constexpr int rounds = kAccumulators / (Queries * pack);  // slots of a thread

  float value[rounds][Queries][pack];
  int packs, slots, groups, group, first;

  // Queries a block can hold, in multiples of Queries.
  ATTNKERN_DEVICE static int capacity(int width) { return block_size() * rounds / (width / pack) * Queries; }

  ATTNKERN_DEVICE void start(int queries, int width, bool grouped = true) {
    packs = width / pack;
    slots = queries / Queries * packs;
    groups = grouped && slots < block_size() ? block_size() / slots : 1;
    group = groups > 1 ? thread_index() / slots : 0;
    first = groups > 1 ? thread_index() % slots : thread_index();
    each([](int, int, float& v) { v = 0.0f; }, true);
  }

  // f(q, d, value) for this thread's sums.
  template <class F>
  ATTNKERN_DEVICE void each(const F& f, bool every_group = false) {
#pragma unroll
    for (int r = 0; r < rounds; ++r) {
      const int slot = first + r * block_size();
      if (slot >= slots || (group > 0 && !every_group)) break;
      const int q = slot / packs * Queries, d = slot % packs * pack;
#pragma unroll
      for (int i = 0; i < Queries; ++i)
#pragma unroll
        for (int v = 0; v < pack; ++v) f(q + i, d + v, value[r][i][v]);
    }
  }

  // value = value scale(q) + the tile's sum. a is [items, stride]; the tile's sum is made apart, so that no chain of
  // additions is longer than a tile or the number of tiles.
  template <class Scale>
  ATTNKERN_DEVICE void add(const Tile<T>& x, const Shared<float>& a, int stride, const Scale& scale) {
    if (group >= groups) return;
#pragma unroll
    for (int r = 0; r < rounds; ++r) {
      const int slot = first + r * block_size();
      if (slot >= slots) break;
      const int q = slot / packs * Queries, d = slot % packs * pack;
      float sum[Queries][pack] = {};
#pragma unroll 4
      for (int t = group; t < x.items; t += groups) {
        const Vec<float, Queries> weight = a.template load_vec<Queries>(t * stride + q);
        const Vec<float, pack> item = widen(x.template load<pack>(t, d));
#pragma unroll
        for (int i = 0; i < Queries; ++i)
#pragma unroll
          for (int v = 0; v < pack; ++v) sum[i][v] += weight[i] * item[v];
      }
#pragma unroll
      for (int i = 0; i < Queries; ++i) {
        const float factor = scale(q + i);
#pragma unroll
        for (int v = 0; v < pack; ++v) value[r][i][v] = value[r][i][v] * factor + sum[i][v];
      }
    }
  }

  // The groups' sums into group 0's, in order; `scratch` has Queries * pack floats a thread. Every thread calls it.
  ATTNKERN_DEVICE void merge_groups(const Shared<float>& scratch) {
    for (int g = 1; g < groups; ++g) {
      block_sync();
      if (group == g) each_plain([&](int i, float& v) { scratch.store(first * Queries * pack + i, v); });
      block_sync();
      if (group == 0 && first < slots)
        each_plain([&](int i, float& v) { v += scratch.load(first * Queries * pack + i); });
    }
  }
  template <class F>
  ATTNKERN_DEVICE void each_plain(const F& f) {
#pragma unroll
    for (int i = 0; i < Queries; ++i)
#pragma unroll
      for (int v = 0; v < pack; ++v) f(i * pack + v, value[0][i][v]);
  }
};

// The sums of rows of w for a tile: out[t, d] = sum_r a[t, r] w[r, d] of kItemBlock items from t on, a pack from d on.
template <class T>
struct RowSum {
  static constexpr int pack = pack_size<T>();
  float sum[kItemBlock][pack] = {};

  template <class W>
  ATTNKERN_DEVICE void add(const Shared<float>& a, int stride, int t, const Matrix<W>& w, int d) {
#pragma unroll 1
    for (int r = 0; r < w.count; ++r) {  // more rows at once spill
      const Vec<float, pack> row = w.template load<pack>(r, d);
#pragma unroll
      for (int i = 0; i < kItemBlock; ++i) {
        const float weight = a.load((t + i) * stride + r);
#pragma unroll
        for (int v = 0; v < pack; ++v) sum[i][v] += weight * row[v];
      }
    }
  }
  ATTNKERN_DEVICE void store(const Tile<T>& to, int t, int d) const {
#pragma unroll
    for (int i = 0; i < kItemBlock; ++i) {
      Vec<T, pack> out;
#pragma unroll
      for (int v = 0; v < pack; ++v) out[v] = narrow<T>(sum[i][v]);
      to.data.store_vec((t + i) * to.stride + d, out);
    }
  }
};

// f(t, d) for every block of kItemBlock items and every pack of the tile, one thread each.
template <class T, class F>
ATTNKERN_DEVICE void each_block(const Tile<T>& tile, const F& f) {
  constexpr int pack = pack_size<T>();
  const int packs = tile.width / pack;
  for (int i = thread_index(); i < tile.items / kItemBlock * packs; i += block_size())
    f(i / packs * kItemBlock, i % packs * pack);
}

}  // namespace attnkern::softmax_pool
