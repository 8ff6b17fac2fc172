// Scorers: what fills e [items, queries] of a tile in shared memory. One pooling loop (forward.cu, backward.cu) serves
// all four.
#pragma once

#include "cuda/activation.cuh"
#include "ops/softmax_pool/sums.cuh"

namespace attnkern::softmax_pool {

ATTNKERN_DEVICE float hidden_act(HiddenAct act, float h) {
  return act == HiddenAct::tanh ? tanhf(h) : activation(act == HiddenAct::relu ? Act::relu : Act::gelu, h);
}

// grad act'(h); relu's 0 also stops a grad that is not finite, as torch's does.
ATTNKERN_DEVICE float hidden_backward(HiddenAct act, float grad, float h) {
  if (act == HiddenAct::tanh) return gate_backward(Gate::tanh, grad, h, 0.0f, 0.0f);
  return activation_backward(act == HiddenAct::relu ? Act::relu : Act::gelu, grad, h);
}

// What a scorer sees of a block's work: queries [query, query + queries) of a head, and a tile.
template <class T>
struct View {
  const Inputs& p;
  int64_t sample, head, query;
  int queries;
  Tile<T> x, keys;  // the same tile where the keys are the values
  int64_t item;     // the tile's first
  int count;        // its items that exist
  Shared<float> e;  // [items, stride]
  int stride;

  template <int N>
  ATTNKERN_DEVICE Matrix<float> query_matrix() const {
    return matrix<N, float>(row_of(p.query, sample, head, query), p.query.stride_query, queries, p.sizes.hidden);
  }
};

struct GivenScorer {
  static constexpr Scorer kind = Scorer::given;
  static constexpr int threads = kMostThreads;  // of a block, at most
  template <int Rows, class T>
  ATTNKERN_DEVICE static void score(const View<T>& v) {
    const int64_t batch = items_batch(v.p, v.sample);
    for (int i = thread_index(); i < v.queries * v.x.items; i += block_size()) {
      const int m = i / v.x.items, t = i % v.x.items;
      if (t < v.count)
        v.e.store(t * v.stride + m, load_global(row_of(v.p.scores, batch, v.head, v.query + m) + v.item + t));
    }
  }
};

struct DotScorer {
  static constexpr Scorer kind = Scorer::dot;
  static constexpr int threads = kMostThreads;
  template <int Rows, class T>
  ATTNKERN_DEVICE static void score(const View<T>& v) {
    sum_features<Rows>(v.keys, v.template query_matrix<pack_size<T>()>(),
                       [&](int t, int m, float e) { v.e.store(t * v.stride + m, e); });
  }
};

// The same; backward adds its sums of dquery to global memory after each tile, where registers hold too few.
struct DotManyScorer : DotScorer {};

struct AdditiveScorer {
  static constexpr Scorer kind = Scorer::additive;
  static constexpr int threads = kMostThreads;
  template <int Rows, class T>
  ATTNKERN_DEVICE static void score(const View<T>& v) {
    const auto* w = static_cast<const float*>(v.p.w);
    const int hidden = static_cast<int>(v.p.sizes.hidden);
    const SumIndex own = sum_index<1>();
    for (int t = warp_id() * kItemBlock; t < v.x.items; t += warp_count() * kItemBlock)
      for (int m = 0; m < v.queries; ++m) {
        const float* const query = row_of(v.p.query, v.sample, v.head, v.query + m);
        float sum[kItemBlock] = {};
        for (int k = lane_id(); k < hidden; k += kWarpSize) {
          const float q = load_global(query + k), weight = load_global(w + k);
#pragma unroll
          for (int i = 0; i < kItemBlock; ++i)
            sum[i] += weight * hidden_act(v.p.act, widen(v.keys.data.load((t + i) * v.keys.stride + k)) + q);
        }
        const float e = scattered_sum(sum);
        if (own.first) v.e.store((t + own.item) * v.stride + m, e);
      }
  }
};

struct GatedScorer {
  static constexpr Scorer kind = Scorer::gated;
  static constexpr int threads = kMostThreads;
  template <int Rows, class T>
  ATTNKERN_DEVICE static void score(const View<T>& v) {
    score<T>(v, [](int, int, float, float) {});
  }
  // keep(t, k, a, b) gets the pre-activations V v + b_V and U v + b_U.
  template <class T, class Keep>
  ATTNKERN_DEVICE static void score(const View<T>& v, const Keep& keep) {
    constexpr int pack = pack_size<T>(), rows = 16 / pack;  // 4 rows of 8 elements spill
    const Inputs& p = v.p;
    const int hidden = static_cast<int>(p.sizes.hidden);
    const auto weights = [&](const void* data) {
      return matrix<pack, T>(data, p.sizes.features, hidden, p.sizes.features);
    };
    const auto bias = [&](const void* b, int k) { return b ? load_global(static_cast<const float*>(b) + k) : 0.0f; };
    const SumIndex own = sum_index<rows>();
    for (int t = warp_id() * kItemBlock; t < v.x.items; t += warp_count() * kItemBlock)
      for (int first = 0; first < hidden; first += rows) {
        const int k = first + own.row;
        const bool mine = own.first && k < hidden;
        float a = features_sum<rows>(v.x, t, weights(p.V), first), b = 0.0f, h = 0.0f;
        if (p.U) b = features_sum<rows>(v.x, t, weights(p.U), first);
        if (mine) {
          a += bias(p.b_V, k);
          b += bias(p.b_U, k);
          keep(t + own.item, k, a, b);
          h = hidden_act(p.act, a) * (p.U ? sigmoid(b) : 1.0f);
        }
        for (int m = 0; m < v.queries; ++m) {
          const float w = mine ? load_global(static_cast<const float*>(p.w) + (v.query + m) * hidden + k) : 0.0f;
          const float sum = group_sum<kWarpSize / kItemBlock>(mine ? w * h : 0.0f);
          const int at = (t + own.item) * v.stride + m;
          if (lane_id() % (kWarpSize / kItemBlock) == 0) v.e.store(at, first ? v.e.load(at) + sum : sum);
        }
      }
  }
};

// The logits of one query: scale e + bias, -inf where the bias is; e with c added.
template <class T>
struct Logits {
  const View<T>& v;
  float scale, c;
  const float* bias;

  ATTNKERN_DEVICE Logits(const View<T>& view, int m) : v(view), scale(static_cast<float>(view.p.scale)) {
    const int64_t batch = items_batch(v.p, v.sample);
    c = v.p.c.data ? load_global(row_of(v.p.c, v.sample, v.head, v.query + m)) : 0.0f;
    bias = v.p.bias.data ? row_of(v.p.bias, batch, v.head, v.query + m) + v.item : nullptr;
  }
  ATTNKERN_DEVICE float logit(int t, float e) const {
    if (!bias) return scale * e;
    const float b = load_global(bias + t);
    return b == -INFINITY ? b : scale * e + b;
  }
};

}  // namespace attnkern::softmax_pool
