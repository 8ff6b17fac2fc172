// What a tile's de adds to the gradients of a scorer's parameters, and how blocks' sums are added up.
#pragma once

#include "ops/softmax_pool/launch.cuh"

namespace attnkern::softmax_pool {

// Blocks' own sums of the gradients that many items share; softmax_pool_reduce_kernel adds them up. Null: not needed.
struct Sums {
  float* dquery = nullptr;  // [slots, H, groups, M, K]; slots: blocks where the samples share the query, else units
  float* dw = nullptr;      // [blocks, H, groups, rows of w, K]
  float* db_V = nullptr;    // [blocks, groups, K]
  float* db_U = nullptr;
};

// The hidden layer of a range of units (gated): a row an item, `length` rows a unit. Gradients and p in the dtype of
// the values.
struct Hidden {
  int64_t first = 0, last = 0;  // units
  float* layer = nullptr;       // [blocks, items of a tile, 2, K]: V v + b_V and U v + b_U
  void* gradients = nullptr;    // theirs [rows, 2, K]
  void* weights = nullptr;      // p [rows, M]
};

// How a block's threads share K hidden units: each has `index` and those block_size() on, of every `groups`-th item.
struct HiddenThreads {
  int hidden, groups, group, index;

  ATTNKERN_HOST_DEVICE static int groups_of(int64_t hidden, int threads) {
    return hidden < threads ? threads / static_cast<int>(hidden) : 1;
  }
  ATTNKERN_DEVICE explicit HiddenThreads(int64_t units)
      : hidden(static_cast<int>(units)), groups(groups_of(units, block_size())) {
    group = groups > 1 ? thread_index() / hidden : 0;
    index = groups > 1 ? thread_index() % hidden : thread_index();
  }
  template <class F>
  ATTNKERN_DEVICE void each(const F& f) const {
    if (group < groups)
      for (int k = index; k < hidden; k += block_size()) f(k);
  }
};

ATTNKERN_DEVICE void add_global(float* to, float value) { store_global(to, load_global(to) + value); }

// What a tile's gradients are made of, beside its View.
template <class T>
struct Gradient {
  const BackwardParams& p;
  Shared<float> weights, de;  // p and de [items, stride]
  Shared<float> dkeys;        // additive: [items, K]
  float *dquery, *dw;         // this block's (slot's, head's) sums; null: not needed
  float *db_V, *db_U;
  const float* layer;  // gated: of this tile, and the rows of its gradients
  T* gradients;
};

// dh = de w act'(k + q);  dk = sum_m dh, dq += sum_n dh, dw += sum_n,m de act(k + q).
template <class T>
ATTNKERN_DEVICE void add_additive(const Gradient<T>& g, const View<T>& v) {
  const BackwardParams& p = g.p;
  const HiddenThreads own(p.sizes.hidden);
  float* const dquery = g.dquery ? g.dquery + int64_t{own.group} * v.queries * own.hidden : nullptr;
  own.each([&](int k) {
    const float w = load_global(static_cast<const float*>(p.w) + k);
    float dw = 0.0f;
    for (int m = 0; m < v.queries; ++m) {
      const float q = load_global(row_of(p.query, v.sample, v.head, m) + k);
      float dq = 0.0f;
      for (int t = own.group; t < v.x.items; t += own.groups) {
        const float h = widen(v.keys.data.load(t * v.keys.stride + k)) + q, de = g.de.load(t * v.stride + m);
        const float dh = t < v.count ? hidden_backward(p.act, de * w, h) : 0.0f;
        const int at = t * own.hidden + k;
        g.dkeys.store(at, m ? g.dkeys.load(at) + dh : dh);
        dq += dh;
        if (t < v.count) dw += de * hidden_act(p.act, h);
      }
      if (dquery) add_global(dquery + m * own.hidden + k, dq);
    }
    if (g.dw) add_global(g.dw + own.group * own.hidden + k, dw);
  });
}

// g = sum_m de w;  da = g sigmoid(b) act'(a), db = g act(a) sigmoid'(b);
// dw += sum_n de act(a) sigmoid(b), db_V += sum_n da, db_U += sum_n db.
template <class T>
ATTNKERN_DEVICE void add_gated(const Gradient<T>& g, const View<T>& v, const Shared<float>& units) {
  const BackwardParams& p = g.p;
  const HiddenThreads own(p.sizes.hidden);
  const auto* w = static_cast<const float*>(p.w);
  own.each([&](int k) {
    float da_sum = 0.0f, db_sum = 0.0f;
    for (int t = own.group; t < v.count; t += own.groups) {
      const int64_t at = int64_t{t} * 2 * own.hidden + k;
      const float a = load_global(g.layer + at), act = hidden_act(p.act, a);
      const float b = p.U ? load_global(g.layer + at + own.hidden) : 0.0f, s = p.U ? sigmoid(b) : 1.0f;
      float grad = 0.0f;
      for (int m = 0; m < v.queries; ++m) grad += g.de.load(t * v.stride + m) * load_global(w + m * own.hidden + k);
      const float da = hidden_backward(p.act, grad * s, a), db = grad * act * s * (1.0f - s);
      store_global(g.gradients + at, narrow<T>(da));
      if (p.U) store_global(g.gradients + at + own.hidden, narrow<T>(db));
      units.store(t * own.hidden + k, act * s);
      da_sum += da;
      db_sum += db;
    }
    if (g.db_V) add_global(g.db_V + own.group * own.hidden + k, da_sum);
    if (g.db_U) add_global(g.db_U + own.group * own.hidden + k, db_sum);
    if (!g.dw) return;
    for (int m = 0; m < v.queries; ++m) {
      float sum = 0.0f;
      for (int t = own.group; t < v.count; t += own.groups)
        sum += g.de.load(t * v.stride + m) * units.load(t * own.hidden + k);
      add_global(g.dw + (int64_t{own.group} * v.queries + m) * own.hidden + k, sum);
    }
  });
}

// The gradients of items, and of keys where they are apart, take their place: p dz and the scorer's, of 4 items and a
// pack of features by a thread.
template <class ScorerT, class T>
ATTNKERN_DEVICE void put_gradients(const Gradient<T>& g, const View<T>& v, const Matrix<T>& dz) {
  constexpr int pack = pack_size<T>();
  const bool keyed = g.p.keys.data != nullptr;
  const int hidden = static_cast<int>(g.p.sizes.hidden);
  const auto add_dkeys = [&](RowSum<T>& sum, int t, int k) {
    if constexpr (ScorerT::kind == Scorer::dot) sum.add(g.de, v.stride, t, v.template query_matrix<pack>(), k);
    if constexpr (ScorerT::kind == Scorer::additive) {
#pragma unroll
      for (int i = 0; i < kItemBlock; ++i)
#pragma unroll
        for (int u = 0; u < pack; ++u)
          if (k + u < hidden) sum.sum[i][u] += g.dkeys.load((t + i) * hidden + k + u);
    }
  };
  if (g.p.dvalues.data)
    each_block(v.x, [&](int t, int d) {
      RowSum<T> sum;
      sum.add(g.weights, v.stride, t, dz, d);
      if (!keyed) add_dkeys(sum, t, d);
      sum.store(v.x, t, d);
    });
  if (keyed && g.p.dkeys.data)
    each_block(v.keys, [&](int t, int k) {
      RowSum<T> sum;
      add_dkeys(sum, t, k);
      sum.store(v.keys, t, k);
    });
}

constexpr int kDeltaThreads = 256;

// dl = p (dz . v - delta) of a row's items, but p left of its peak (params.h).
struct Deltas {
  float *delta, *left;  // [B, H, M]
  int64_t* peaks;       // items, or -1
};

// Computes   delta = dz . z - dlse of every row; left = w' (dz . v - dz . z') + dlse of those with a peak v, whose rest
//            has the pool z' and the weight w', and delta = dz . v - left
// Layout     dz, z, z' [rows, D]; dlse (which may be null) and the results [rows]
// Mapping    a warp: a row, lanes along D
// Traffic    dz and z once, or dz twice, the item and z'
// Numerics   float; a lane's terms in order, then the lanes
template <class T>
ATTNKERN_KERNEL(kDeltaThreads, 4)
softmax_pool_delta_kernel(ATTNKERN_GRID_CONSTANT const BackwardParams p, const float* rest_z, const float* rest_top,
                          const Deltas out) {
  const Sizes& n = p.sizes;
  const int64_t row = block_index() * warp_count() + warp_id(), rows = rows_of(p);
  if (row >= rows) return;
  const auto times = [&](auto factor) {
    float sum = 0.0f;
    for (int64_t d = lane_id(); d < n.features; d += kWarpSize)
      sum += widen(load_global(static_cast<const T*>(p.dz) + row * n.features + d)) * factor(d);
    return warp_sum(sum);
  };
  const auto pool = [&](const void* z) {
    return times([&](int64_t d) { return load_global(static_cast<const float*>(z) + row * n.features + d); });
  };
  const float dlse = p.dlse ? load_global(static_cast<const float*>(p.dlse) + row) : 0.0f;
  const int64_t peak = load_global(out.peaks + row);
  float delta, left = 0.0f;
  if (peak < 0) {
    delta = pool(p.z) - dlse;
  } else {
    const int64_t sample = row / (n.heads * n.queries), head = row / n.queries % n.heads;
    const auto items = span_of<T>(p.values, items_batch(p, sample), head, n.features);
    const float dp =
        times([&](int64_t d) { return widen(load_global(items.data + peak * items.item + d * items.feature)); });
    const auto* top = static_cast<const float*>(p.top) + row;
    const float rest = load_global(rest_top + rows + row);
    const float weight =
        rest == 0.0f ? 0.0f : expf(load_global(rest_top + row) - load_global(top)) * load_global(top + rows) / rest;
    const float excess = weight < kAlone ? 0.0f : weight * (pool(rest_z) - dp);
    delta = dp + excess - dlse;
    left = dp - dp - excess + dlse;  // dp - dp: NaN where it is not finite, as eager's
  }
  if (lane_id() > 0) return;
  store_global(out.delta + row, delta);
  store_global(out.left + row, left);
}

inline Status launch_delta(const BackwardParams& p, const float* rest_z, const float* rest_top, const Deltas& out,
                           void* stream) {
  const int64_t rows = rows_of(p), warps = kDeltaThreads / kWarpSize;
  return visit_type(p.dtype, [&](auto type) {
    return launch(softmax_pool_delta_kernel<decltype(type)>, {(rows + warps - 1) / warps, kDeltaThreads}, stream, p,
                  rest_z, rest_top, out);
  });
}

constexpr int kReduceRows = 8;

// What is added up: out[o, i] = sum over the slots of o and over groups of partial[slot, head of o, group, i].
struct Reduction {
  const float* partial = nullptr;
  float* out = nullptr;
  int64_t count = 0;    // elements i
  int64_t outputs = 0;  // o: samples x heads, or heads
  int64_t heads = 1, groups = 1;
  int64_t slots = 0;  // of every output; 0: the units of its sample
};

// Computes   a Reduction
// Layout     dense
// Mapping    a block: 32 elements of an output, 8 rows of warps along the slots
// Traffic    the partial sums once
// Numerics   float; every 8th term in order, then the 8 sums in order
ATTNKERN_KERNEL(kReduceRows* kWarpSize, 4)
softmax_pool_reduce_kernel(ATTNKERN_GRID_CONSTANT const BackwardParams p, ATTNKERN_GRID_CONSTANT const Plan plan,
                           const Reduction r) {
  SharedArena arena;
  const Shared<float> sums = arena.take<float>(kReduceRows * kWarpSize);
  const int64_t blocks = (r.count + kWarpSize - 1) / kWarpSize, output = block_index() / blocks;
  const int64_t i = block_index() % blocks * kWarpSize + lane_id(), head = output % r.heads;
  Units slots{0, r.slots};
  if (r.slots == 0) slots = units_of(p, plan, output / r.heads);
  const int64_t rows = (slots.last - slots.first) * r.groups;
  float sum = 0.0f;
  if (i < r.count) {
#pragma unroll 4
    for (int64_t row = warp_id(); row < rows; row += kReduceRows) {
      const int64_t slot = slots.first + row / r.groups, group = row % r.groups;
      sum += load_global(r.partial + ((slot * r.heads + head) * r.groups + group) * r.count + i);
    }
  }
  sums.store(thread_index(), sum);
  block_sync();
  if (warp_id() > 0 || i >= r.count) return;
  for (int w = 1; w < kReduceRows; ++w) sum += sums.load(w * kWarpSize + lane_id());
  store_global(r.out + output * r.count + i, sum);
}

inline Status launch_reduce(const BackwardParams& p, const Plan& plan, const Reduction& r, void* stream) {
  const int64_t blocks = (r.count + kWarpSize - 1) / kWarpSize;
  return launch(softmax_pool_reduce_kernel,
                {r.outputs * blocks, kReduceRows * kWarpSize, shared_bytes<float>(kReduceRows * kWarpSize)}, stream, p,
                plan, r);
}

}  // namespace attnkern::softmax_pool
