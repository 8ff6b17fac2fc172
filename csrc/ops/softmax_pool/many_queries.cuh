// Dot scores and weighted sums of 16 queries on the tensor cores, for 16-bit items. Scores and weights are float: they
// enter in two 16-bit parts, so that a product keeps 16 bits of them (float16: 22).
#pragma once

#include "cuda/mma.cuh"
#include "ops/softmax_pool/scorers.cuh"

namespace attnkern::softmax_pool {

// Features are dealt to warps in steps of 16: f(i, first feature) for this warp's i-th step.
template <class F>
ATTNKERN_DEVICE void each_step(int width, const F& f) {
#pragma unroll
  for (int i = 0; i < kManySteps; ++i) {
    const int d = (warp_id() + i * warp_count()) * kManyStep;
    if (d < width) f(i, d);
  }
}

// Two neighbours of a fragment, in parts.
template <class T>
ATTNKERN_DEVICE void split_pair(float first, float second, uint32_t& high, uint32_t& low) {
  T parts[2][2];
  split(first, parts[0][0], parts[1][0]);
  split(second, parts[0][1], parts[1][1]);
  memcpy(&high, parts[0], 4);
  memcpy(&low, parts[1], 4);
}

// float16 has a short range: the power of two that brings the largest of some numbers, infinities apart, to 2^14.
template <class T>
struct Range {
  static constexpr bool ranged = std::is_same_v<T, float16>;
  float largest = 0.0f;

  ATTNKERN_DEVICE void add(float value) {
    const float size = fabsf(value);
    if (ranged && size > largest && size < INFINITY) largest = size;
  }
  ATTNKERN_DEVICE float power() const {
    const int exponent = largest > 0.0f ? ilogbf(largest) : 14;
    return ranged ? ldexpf(1.0f, 14 - (exponent > -112 ? exponent : -112)) : 1.0f;
  }
};

// Of query m, by a warp.
template <class T>
ATTNKERN_DEVICE float query_power(const Matrix<float>& queries, int m) {
  Range<T> range;
#pragma unroll 8
  for (int d = lane_id(); range.ranged && m < queries.count && d < queries.features; d += kWarpSize)
    range.add(load_global(queries.data + m * queries.stride + d));
  range.largest = group_max(range.largest);
  return range.power();
}

// A fragment a of floats in two parts, after a power of two for each of a lane's rows that `back` takes off again: that
// of a row's Range, or of 1 where weights end there.
template <class T, bool weights>
struct RowParts {
  FragmentA high, low;
  float back[2];

  // at(row, column)
  template <class F>
  ATTNKERN_DEVICE explicit RowParts(const F& at) {
    const int g = lane_id() / 4, c = lane_id() % 4;
    float values[4][2];
    Range<T> ranges[2];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int word = i / 2;
      values[word][i % 2] = at(word % 2 * 8 + g, word / 2 * 8 + 2 * c + i % 2);
      ranges[word % 2].add(values[word][i % 2]);
    }
    float powers[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      if (Range<T>::ranged && !weights) ranges[row].largest = group_max<4>(ranges[row].largest);
      powers[row] = weights ? Range<T>{1.0f}.power() : ranges[row].power();
      back[row] = 1.0f / powers[row];
    }
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const float power = powers[word % 2];
      split_pair<T>(power * values[word][0], power * values[word][1], high.words[word], low.words[word]);
    }
  }
};

// e = q . k of a tile. A warp keeps its steps of the queries in registers for all tiles; the sums of warps are added in
// order.
template <class T>
struct ManyQueries {
  FragmentB parts[kManySteps][2][2] = {};  // step, 8 queries, part
  float back;                              // the power of two off again, of query thread_index() % 16

  // `scales` has 16 floats, free until the next barrier but one.
  ATTNKERN_DEVICE void load(const Matrix<float>& queries, const Shared<float>& scales) {
    for (int m = warp_id(); m < kManyQueries; m += warp_count()) {
      const float power = query_power<T>(queries, m);
      if (lane_id() == 0) scales.store(m, power);
    }
    block_sync();
    back = 1.0f / scales.load(thread_index() % kManyQueries);
    const int g = lane_id() / 4, c = lane_id() % 4;
    each_step(round_up(queries.features, kManyStep), [&](int i, int d) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int word = 0; word < 2; ++word) {
          const int m = half * 8 + g;
          const float scale = scales.load(m);
          const Vec<float, 2> q = queries.load<2>(m, d + word * 8 + 2 * c);
          split_pair<T>(scale * q[0], scale * q[1], parts[i][half][0].words[word], parts[i][half][1].words[word]);
        }
    });
  }

  // `by_warp` [warps, items, 16] is free before and after.
  ATTNKERN_DEVICE void score(const View<T>& v, const Shared<float>& by_warp) const {
    const Tile<T>& keys = v.keys;
    const int size = keys.items * kManyQueries, g = lane_id() / 4, c = lane_id() % 4;
#pragma unroll 1
    for (int t = 0; t < keys.items; t += 16) {
      FragmentD sum[2] = {};
      each_step(keys.width, [&](int i, int d) {
        const FragmentA items = load_a(keys.data, t * keys.stride + d, keys.stride);
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int part = 1; part >= 0; --part) multiply_add<T>(sum[half], items, parts[i][half][part]);
      });
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int k = 0; k < 4; ++k)
          by_warp.store(warp_id() * size + (t + k / 2 * 8 + g) * kManyQueries + half * 8 + 2 * c + k % 2,
                        sum[half].values[k]);
    }
    block_sync();
#pragma unroll 1
    for (int i = thread_index(); i < size; i += block_size()) {
      float e = 0.0f;
      for (int w = 0; w < warp_count(); ++w) e += by_warp.load(w * size + i);
      v.e.store(i, e * back);
    }
  }
};

// z [16, D] over tiles, as Accumulator: a warp has all queries of its steps of the features.
template <class T, bool weights>
struct ManySums {
  static constexpr int groups = 1, slots = 0;

  FragmentD sum[kManySteps][2] = {};  // step, 8 features
  int width;

  ATTNKERN_DEVICE void start(int, int features) { width = features; }

  // The sum of 16 items is made apart: tensor cores truncate what they add to. (That of a tile spilled 12 bytes.)
  template <class Factor>
  ATTNKERN_DEVICE void add(const Tile<T>& x, const Shared<float>& a, int stride, const Factor& factor) {
    const int g = lane_id() / 4;
    const float factors[2] = {factor(g), factor(g + 8)};
#pragma unroll
    for (int i = 0; i < kManySteps; ++i)
#pragma unroll
      for (int k = 0; k < 8; ++k) sum[i][k / 4].values[k % 4] *= factors[k % 4 / 2];
#pragma unroll 1
    for (int t = 0; t < x.items; t += 16) {
      const RowParts<T, weights> parts([&](int m, int item) { return a.load((t + item) * stride + m); });
      each_step(width, [&](int i, int d) {
        FragmentB items[2];
        load_b(x.data, t * x.stride + d, x.stride, items);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          FragmentD own = {};
          multiply_add<T>(own, parts.low, items[half]);
          multiply_add<T>(own, parts.high, items[half]);
#pragma unroll
          for (int k = 0; k < 4; ++k) sum[i][half].values[k] += own.values[k] * parts.back[k / 2];
        }
      });
    }
  }
  ATTNKERN_DEVICE void merge_groups(const Shared<float>&) {}

  // f(query, feature, value) for this thread's sums.
  template <class F>
  ATTNKERN_DEVICE void each(const F& f) const {
    each_step(width, [&](int i, int d) {
#pragma unroll
      for (int k = 0; k < 8; ++k)
        f(k % 4 / 2 * 8 + lane_id() / 4, d + k / 4 * 8 + lane_id() % 4 * 2 + k % 2, sum[i][k / 4].values[k % 4]);
    });
  }
};

// Dot scores by ManyQueries, z by ManySums.
struct ManyQueriesScorer {
  static constexpr Scorer kind = Scorer::dot;
  static constexpr int threads = kProductThreads;
};

}  // namespace attnkern::softmax_pool
