// Backward of many_queries.cuh: the scores again, dp = dz . v, and the items' gradients p dz + de q; dquery is
// ManySums.
#pragma once

#include "ops/softmax_pool/many_queries.cuh"

namespace attnkern::softmax_pool {

// The 16 queries of a block, in parts, and their dz, in shared memory: registers hold the sums of dquery, and two
// products sum over features, one over queries.
template <class T>
struct ManyRows {
  Tile<T> high, low, dz;
  Shared<float> back;  // the powers of two of queries off again

  ATTNKERN_DEVICE ManyRows(SharedArena& arena, const Plan& plan)
      : high(take_tile<T>(arena, kManyQueries, plan.key_width)),
        low(take_tile<T>(arena, kManyQueries, plan.key_width)),
        dz(take_tile<T>(arena, kManyQueries, plan.value_width)),
        back(arena.take<float>(kManyQueries)) {}

  // Complete after async_wait and a barrier.
  ATTNKERN_DEVICE void load(const Matrix<float>& queries, const T* gradients, int features) const {
    const bool vector = features % pack_size<T>() == 0 && reinterpret_cast<uintptr_t>(gradients) % 16 == 0;
    fetch(dz, Span<const T*>{gradients, features, 1, features, true, vector}, 0, queries.count);
    constexpr int pack = 4, batch = 6;  // packs on their way: 6 of 9 at 1152 features
    for (int m = warp_id(); m < kManyQueries; m += warp_count()) {
      const float power = query_power<T>(queries, m);
      if (lane_id() == 0) back.store(m, 1.0f / power);
      for (int first = pack * lane_id(); first < high.width; first += batch * pack * kWarpSize) {
        Vec<float, pack> q[batch];
#pragma unroll
        for (int u = 0; u < batch; ++u) q[u] = queries.load<pack>(m, first + u * pack * kWarpSize);
#pragma unroll
        for (int u = 0; u < batch; ++u) {
          const int d = first + u * pack * kWarpSize;
          if (d >= high.width) break;
          Vec<T, pack> parts[2];
#pragma unroll
          for (int i = 0; i < pack; ++i) split(power * q[u][i], parts[0][i], parts[1][i]);
          high.data.store_vec(m * high.stride + d, parts[0]);
          low.data.store_vec(m * low.stride + d, parts[1]);
        }
      }
    }
  }

  // e = q . k and dp = dz . v: the sums of warps, added in order. They take the place of the first warp's in
  // `e` and `dp` [warps, items, 16].
  ATTNKERN_DEVICE void score(const Tile<T>& x, const Tile<T>& keys, const Shared<float>& e,
                             const Shared<float>& dp) const {
    const int size = x.items * kManyQueries;
    const int own = warp_id() * size;
    product({low, high}, keys, e.slice(own, size));
    product({dz}, x, dp.slice(own, size));
    block_sync();
    for (int i = thread_index(); i < size; i += block_size()) {
      float sums[2] = {};
      for (int w = 0; w < warp_count(); ++w) {
        sums[0] += e.load(w * size + i);
        sums[1] += dp.load(w * size + i);
      }
      e.store(i, sums[0] * back.load(i % kManyQueries));
      dp.store(i, sums[1]);
    }
  }

  // p dz, where the tile is of values, and de q, where it is of keys, take the items' place.
  ATTNKERN_DEVICE void put_gradients(const Tile<T>& to, bool values, bool keys, const Shared<float>& weights,
                                     const Shared<float>& de) const {
    const int g = lane_id() / 4, c = lane_id() % 4;
#pragma unroll 1
    for (int t = 0; t < to.items; t += 16) {
      const RowParts<T, false> p(
          [&](int item, int m) { return values ? weights.load((t + item) * kManyQueries + m) : 0.0f; });
      const RowParts<T, false> a(
          [&](int item, int m) { return keys ? de.load((t + item) * kManyQueries + m) * back.load(m) : 0.0f; });
      FragmentB rows[3][2], next[3][2] = {};  // of dz, low, high
      const auto load = [&](int d, FragmentB(&to)[3][2]) {
        if (values) load_b(dz.data, d, dz.stride, to[0]);
        if (keys) load_b(low.data, d, low.stride, to[1]);
        if (keys) load_b(high.data, d, high.stride, to[2]);
      };
      const int step = warp_count() * kManyStep;
      load(warp_id() * kManyStep, next);
#pragma unroll 1
      for (int d = warp_id() * kManyStep; d < to.width; d += step) {
        memcpy(rows, next, sizeof(rows));
        if (d + step < to.width) load(d + step, next);  // before the stores, which it cannot pass
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          FragmentD of_values = {}, of_keys = {};
          multiply_add<T>(of_values, p.low, rows[0][half]);
          multiply_add<T>(of_keys, a.low, rows[2][half]);
          multiply_add<T>(of_values, p.high, rows[0][half]);
          multiply_add<T>(of_keys, a.high, rows[1][half]);
          multiply_add<T>(of_keys, a.high, rows[2][half]);
#pragma unroll
          for (int row = 0; row < 2; ++row) {
            Vec<T, 2> out;
#pragma unroll
            for (int k = 0; k < 2; ++k)
              out[k] =
                  narrow<T>(of_values.values[2 * row + k] * p.back[row] + of_keys.values[2 * row + k] * a.back[row]);
            to.data.store_vec((t + row * 8 + g) * to.stride + d + half * 8 + 2 * c, out);
          }
        }
      }
    }
  }

 private:
  // out [items, 16]: this warp's steps of the sums of x over features, with every part of the rows.
  template <int Parts>
  ATTNKERN_DEVICE static void product(const Tile<T> (&rows)[Parts], const Tile<T>& x, const Shared<float>& out) {
    const int g = lane_id() / 4, c = lane_id() % 4;
#pragma unroll 1
    for (int t = 0; t < x.items; t += 16) {
      FragmentD sums[Parts][2] = {};
#pragma unroll 3
      for (int d = warp_id() * kManyStep; d < x.width; d += warp_count() * kManyStep) {
        const FragmentA items = load_a(x.data, t * x.stride + d, x.stride);
#pragma unroll
        for (int part = 0; part < Parts; ++part) {
          FragmentB b[2];
          load_b_transposed(rows[part].data, d, rows[part].stride, b);
#pragma unroll
          for (int half = 0; half < 2; ++half) multiply_add<T>(sums[part][half], items, b[half]);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i / 2, row = i % 2;
        Vec<float, 2> sum{};
#pragma unroll
        for (int part = 0; part < Parts; ++part)
#pragma unroll
          for (int k = 0; k < 2; ++k) sum[k] += sums[part][half].values[2 * row + k];
        out.store_vec((t + row * 8 + g) * kManyQueries + half * 8 + 2 * c, sum);
      }
    }
  }
};

}  // namespace attnkern::softmax_pool
