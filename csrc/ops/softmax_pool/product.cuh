// The gated scorer on the tensor cores, for 16-bit items: hidden layer and scores of a tile without storing the layer.
#pragma once

#include "cuda/mma.cuh"
#include "ops/softmax_pool/scorers.cuh"

namespace attnkern::softmax_pool {

constexpr int kHiddenBlock = 16;  // hidden units of a warp's product: two blocks of 8 of V and of U
constexpr int kStep = 32;         // features of a step: what a lane reads of a packed block is 16 bytes

ATTNKERN_HOST_DEVICE constexpr int64_t hidden_blocks(int64_t hidden) {
  return (hidden + kHiddenBlock - 1) / kHiddenBlock;
}

// Elements of V and U, packed: [hidden blocks, steps, V or U, 2 blocks of 8, lanes, 8 elements].
ATTNKERN_HOST_DEVICE constexpr int64_t packed_size(int64_t hidden, int64_t width) {
  return hidden_blocks(hidden) * (width / kStep) * 4 * kWarpSize * 8;
}

// Computes   V and U in the order in which lanes hold fragments b, zero beyond K and D
// Layout     V, U [K, D] -> packed_size
// Mapping    a thread 8 elements
// Traffic    V and U once, again as packed
// Numerics   none
template <class T>
ATTNKERN_KERNEL(kProductThreads, 4)
softmax_pool_pack_kernel(const T* V, const T* U, int64_t hidden, int64_t features, int width, T* packed) {
  const int64_t index = int64_t{block_index()} * kProductThreads + thread_index();
  if (index >= packed_size(hidden, width) / 8) return;
  const int lane = static_cast<int>(index % kWarpSize), block = static_cast<int>(index / kWarpSize % 4);
  const int64_t rest = index / kWarpSize / 4, steps = width / kStep;
  const int64_t unit = rest / steps * kHiddenBlock + block % 2 * 8 + lane / 4, d = rest % steps * kStep + lane % 4 * 2;
  const T* const from = block < 2 ? V : U;
  Vec<T, 8> pack{};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t feature = d + i / 2 * 8 + i % 2;
    if (from && unit < hidden && feature < features) pack[i] = load_global(from + unit * features + feature);
  }
  store_global_vec(packed + index * 8, pack);
}

template <class T>
ATTNKERN_DEVICE void load_packed(const T* from, FragmentB (&b)[2]) {
  const Vec<T, 8> pack = load_global_vec<8, Cache::keep>(from);
  memcpy(&b[0], &pack, 8);
  memcpy(&b[1], &pack[4], 8);
}

// e of a tile. A warp has hidden blocks of its own and all items, 16 a fragment; V and U pass from L2 once a tile.
struct GatedProductScorer {
  static constexpr Scorer kind = Scorer::gated;
  static constexpr int threads = 256;  // 64 sums and 32 of z a thread: more than 128 registers
  static constexpr int most = 4;       // fragments of items

  // keep(t, k, a, b) gets the pre-activations; `partial` [warps, items, stride] is free before and after.
  template <class T, class Keep>
  ATTNKERN_DEVICE static void score(const View<T>& v, const T* packed, const Shared<float>& partial, const Keep& keep) {
    const Inputs& p = v.p;
    const int hidden = static_cast<int>(p.sizes.hidden), steps = v.x.width / kStep, size = v.x.items * v.stride;
    const int g = lane_id() / 4, c = lane_id() % 4;
    for (int i = lane_id(); i < size; i += kWarpSize) partial.store(warp_id() * size + i, 0.0f);
    warp_sync();
    for (int block = warp_id(); block < hidden_blocks(hidden); block += warp_count()) {
      FragmentD sum[most][2][2] = {};  // items, V or U, 8 hidden units
      const T* from = packed + (int64_t{block} * steps * 4 * kWarpSize + lane_id()) * 8;
      FragmentB next[4][2];
#pragma unroll
      for (int j = 0; j < 4; ++j) load_packed(from + j * kWarpSize * 8, next[j]);
      for (int step = 0; step < steps; ++step) {
        FragmentB b[4][2];
        memcpy(b, next, sizeof(b));
        from += 4 * kWarpSize * 8;
        if (step + 1 < steps) {  // on its way during this step's products
#pragma unroll
          for (int j = 0; j < 4; ++j) load_packed(from + j * kWarpSize * 8, next[j]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int i = 0; i < most; ++i) {
            if (i * 16 >= v.x.items) break;
            const FragmentA a = load_a(v.x.data, i * 16 * v.x.stride + step * kStep + half * 16, v.x.stride);
#pragma unroll
            for (int j = 0; j < 4; ++j) multiply_add<T>(sum[i][j / 2][j % 2], a, b[j][half]);
          }
      }
      // the lane's hidden units of each item: 2 blocks of 8, 2 neighbours
#pragma unroll
      for (int i = 0; i < most; ++i) {
        if (i * 16 >= v.x.items) break;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const int t = i * 16 + row * 8 + g;
          float h[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int k = block * kHiddenBlock + j / 2 * 8 + 2 * c + j % 2, at = row * 2 + j % 2;
            h[j] = 0.0f;
            if (k >= hidden) continue;
            const float a = sum[i][0][j / 2].values[at] + bias(p.b_V, k);
            const float b = sum[i][1][j / 2].values[at] + bias(p.b_U, k);
            keep(t, k, a, b);
            h[j] = hidden_act(p.act, a) * (p.U ? sigmoid(b) : 1.0f);
          }
          for (int m = 0; m < v.queries; ++m) {
            const float* const w = static_cast<const float*>(p.w) + (v.query + m) * hidden;
            float e = 0.0f;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const int k = block * kHiddenBlock + j / 2 * 8 + 2 * c + j % 2;
              if (k < hidden) e += load_global(w + k) * h[j];
            }
            e = group_sum<4>(e);
            const int at = warp_id() * size + t * v.stride + m;
            if (c == 0) partial.store(at, partial.load(at) + e);
          }
        }
      }
    }
    block_sync();
    for (int i = thread_index(); i < size; i += block_size()) {
      float e = 0.0f;
      for (int w = 0; w < warp_count(); ++w) e += partial.load(w * size + i);
      v.e.store(i, e);
    }
  }

 private:
  ATTNKERN_DEVICE static float bias(const void* b, int k) {
    return b ? load_global(static_cast<const float*>(b) + k) : 0.0f;
  }
};

}  // namespace attnkern::softmax_pool
