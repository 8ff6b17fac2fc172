// Matrix products over the batch: the MLP where weights outweigh the maps, and every weight gradient.
#pragma once

#include "ops/squeeze_excite/mlp.cuh"

namespace attnkern::squeeze_excite {

// An operand's element (i, j) is at data[i * stride_i + j * stride_j], seen through a transform of the hidden layer.
struct Operand {
  enum Transform : int {
    plain,      // float
    weights,    // of the weights' type
    activated,  // act(v)
    chained,    // v act'(h), h at the same place of `hidden`
  };
  const void* data;
  int64_t stride_i, stride_j;
  Transform transform = plain;
  const float* hidden = nullptr;
};

// out[m, n] = sum_k a(m, k) b(k, n) (+ bias[n]); and ones[m] = sum_k a(m, k), as if b had one more column of ones.
struct Product {
  Operand a, b;  // a is indexed (m, k), b (k, n)
  int64_t m, n, k;
  const void* bias = nullptr;
  void* out;
  bool out_weights = false;  // out and ones have the weights' type
  void* ones = nullptr;
  // of the hidden activation
  Act act = Act::identity;
  double act_slope = 0;
  const void* act_weight = nullptr;
  int64_t act_weight_stride = 0;
  // k is split over `splits` blocks a tile: partial [splits, m, n + 1], one zeroed counter a tile
  int splits = 1;
  float* partial = nullptr;
  uint32_t* counters = nullptr;

  ATTNKERN_HOST_DEVICE int64_t columns() const { return n + (ones ? 1 : 0); }
};

constexpr int kTile = 32;
constexpr int kProductThreads = 256;

template <class W>
struct ProductReader {
  const Product& p;

  ATTNKERN_DEVICE float slope(int64_t r) const {
    return p.act == Act::prelu ? weight<W>(p.act_weight, r * p.act_weight_stride) : static_cast<float>(p.act_slope);
  }
  // `unit`: the hidden unit that the element belongs to.
  ATTNKERN_DEVICE float read(const Operand& o, int64_t i, int64_t j, int64_t unit) const {
    const int64_t at = i * o.stride_i + j * o.stride_j;
    if (o.transform == Operand::weights) return weight<W>(o.data, at);
    const float v = load_global(floats(o.data, at));
    if (o.transform == Operand::activated) return activation(p.act, v, slope(unit));
    if (o.transform == Operand::chained) return activation_backward(p.act, v, load_global(o.hidden + at), slope(unit));
    return v;
  }
};

// Computes   Product: a small matrix product with transforms on reading
// Layout     any strides; lanes run along whichever is 1
// Mapping    a block owns a 32 x 32 tile of out (and a split of k), a thread 2 x 2 of it; the last split adds all up
// Traffic    a and b once a tile, from L2
// Numerics   float; k in order within a split, splits in order
template <class W>
ATTNKERN_KERNEL(kProductThreads, 2)
squeeze_excite_product_kernel(ATTNKERN_GRID_CONSTANT const Product p) {
  constexpr int pad = kTile + 1, loads = kTile * kTile / kProductThreads;
  SharedArena arena;
  const Shared<float> as = arena.take<float>(kTile * pad), bs = arena.take<float>(kTile * pad);
  const Shared<uint32_t> arrived = arena.take<uint32_t>(1);
  const ProductReader<W> reader{p};
  const int64_t tiles_n = (p.columns() + kTile - 1) / kTile;
  const int split = block_index() % p.splits;
  const int64_t tile = block_index() / p.splits, m0 = tile / tiles_n * kTile, n0 = tile % tiles_n * kTile;
  const int64_t steps = (p.k + kTile - 1) / kTile, share = (steps + p.splits - 1) / p.splits;
  const int64_t first = split * share, last = first + share < steps ? first + share : steps;

  float next_a[loads], next_b[loads];
  // lanes along the stride of 1: (row, column) of a tile from a flat index
  const auto place = [](int flat, bool along_columns, int& row, int& column) {
    row = along_columns ? flat / kTile : flat % kTile;
    column = along_columns ? flat % kTile : flat / kTile;
  };
  const auto fetch = [&](int64_t k0) {
#pragma unroll
    for (int l = 0; l < loads; ++l) {
      const int flat = l * kProductThreads + thread_index();
      int i, j;
      place(flat, p.a.stride_j == 1, i, j);
      next_a[l] =
          m0 + i < p.m && k0 + j < p.k ? reader.read(p.a, m0 + i, k0 + j, p.out_weights ? m0 + i : k0 + j) : 0.0f;
      place(flat, p.b.stride_j == 1, i, j);
      next_b[l] = k0 + i >= p.k || n0 + j >= p.columns() ? 0.0f
                  : n0 + j == p.n                        ? 1.0f
                                                         : reader.read(p.b, k0 + i, n0 + j, n0 + j);
    }
  };
  const auto put = [&] {
#pragma unroll
    for (int l = 0; l < loads; ++l) {
      const int flat = l * kProductThreads + thread_index();
      int i, j;
      place(flat, p.a.stride_j == 1, i, j);
      as.store(j * pad + i, next_a[l]);  // [k, m]
      place(flat, p.b.stride_j == 1, i, j);
      bs.store(i * pad + j, next_b[l]);  // [k, n]
    }
  };

  const int tm = thread_index() / 16, tn = thread_index() % 16;
  float sum[2][2] = {};
  if (first < last) fetch(first * kTile);
  for (int64_t step = first; step < last; ++step) {
    put();
    block_sync();
    if (step + 1 < last) fetch((step + 1) * kTile);
#pragma unroll
    for (int k = 0; k < kTile; ++k) {
      const float a0 = as.load(k * pad + tm), a1 = as.load(k * pad + tm + 16);
      const float b0 = bs.load(k * pad + tn), b1 = bs.load(k * pad + tn + 16);
      sum[0][0] += a0 * b0;
      sum[0][1] += a0 * b1;
      sum[1][0] += a1 * b0;
      sum[1][1] += a1 * b1;
    }
    block_sync();
  }

  const auto each = [&](const auto& f) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int64_t m = m0 + tm + 16 * i, n = n0 + tn + 16 * j;
        if (m < p.m && n < p.columns()) f(m, n, sum[i][j]);
      }
  };
  const int64_t plane = p.m * p.columns();
  if (p.splits > 1) {
    each([&](int64_t m, int64_t n, float v) { store_global(p.partial + split * plane + m * p.columns() + n, v); });
    block_sync();
    if (thread_index() == 0) arrived.store(0, atomic_add(p.counters + tile, 1));
    block_sync();
    if (arrived.load(0) + 1 != static_cast<uint32_t>(p.splits)) return;
    each([&](int64_t m, int64_t n, float& v) {
      v = 0.0f;
      for (int s = 0; s < p.splits; ++s) v += load_global(p.partial + s * plane + m * p.columns() + n);
    });
  }
  each([&](int64_t m, int64_t n, float v) {
    const bool one = n == p.n;
    const int64_t at = one ? m : m * p.n + n;
    void* out = one ? p.ones : p.out;
    if (p.bias && !one) v += weight<W>(p.bias, n);
    if (p.out_weights)
      store_global(static_cast<W*>(out) + at, narrow<W>(v));
    else
      store_global(floats(out, at), v);
  });
}

// Computes   dact_weight[r] = sum_b (h <= 0 ? h : 0) da, over all r where the slope is shared
// Layout     da, hidden [B, R]
// Mapping    a block a slope; threads stride over its terms
// Traffic    2 B R floats
// Numerics   float, block_sum's order
template <class W>
ATTNKERN_KERNEL(kProductThreads, 2)
squeeze_excite_prelu_grad_kernel(const float* da, const float* hidden, int64_t batch, int64_t units, int64_t stride,
                                 void* out) {
  SharedArena arena;
  const Shared<float> scratch = arena.take<float>(kWarpSize);
  const int64_t terms = stride ? batch : batch * units;
  float sum = 0.0f;
  for (int64_t i = thread_index(); i < terms; i += block_size()) {
    const int64_t at = stride ? i * units + block_index() : i;
    const float h = load_global(hidden + at);
    if (!(h > 0.0f)) sum += h * load_global(da + at);
  }
  sum = block_sum(sum, scratch);
  if (thread_index() == 0) store_global(static_cast<W*>(out) + block_index(), narrow<W>(sum));
}

// ------------------------------------------------------------------ launches

constexpr int64_t kMostTiles = 1 << 24;
constexpr int64_t kLeastSplit = 4;  // steps of 32 a split: below, adding up costs more than it saves

inline int64_t product_tiles(const Product& p) {
  return (p.m + kTile - 1) / kTile * ((p.columns() + kTile - 1) / kTile);
}

// Splits of k until every SM has two blocks.
inline int product_splits(const Product& p, int sm_count) {
  const int64_t tiles = product_tiles(p) < 1 ? 1 : product_tiles(p);
  int64_t splits = 2 * sm_count / tiles;
  const int64_t most = p.k / kTile / kLeastSplit;
  if (splits > most) splits = most;
  return static_cast<int>(splits < 1 ? 1 : splits);
}

// Floats of p.partial, and of p.counters after them.
inline int64_t product_workspace(const Product& p, int sm_count) {
  const int splits = product_splits(p, sm_count);
  return splits > 1 ? splits * p.m * p.columns() + product_tiles(p) : 0;
}

template <class W>
Status launch_product(Product p, int sm_count, float* workspace, void* stream) {
  const int64_t tiles = product_tiles(p);
  p.splits = product_splits(p, sm_count);
  if (p.splits > 1) {
    p.partial = workspace;
    p.counters = reinterpret_cast<uint32_t*>(workspace + p.splits * p.m * p.columns());
    if (const Status status = fill_bytes(p.counters, 0, tiles * sizeof(uint32_t), stream); !status.ok()) return status;
  }
  const int shared = 2 * shared_bytes<float>(kTile * (kTile + 1)) + shared_bytes<uint32_t>(1);
  return launch(squeeze_excite_product_kernel<W>, {tiles * p.splits, kProductThreads, shared}, stream, p);
}

}  // namespace attnkern::squeeze_excite
