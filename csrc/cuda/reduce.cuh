// Sums of a warp and of a block in a fixed order: the same bits on every run.
#pragma once

#include "cuda/memory.cuh"

namespace attnkern::cuda {

// Sum over aligned groups of Width lanes (a power of two), in every lane; xor butterfly. The whole warp calls it.
template <int Width = kWarpSize, class T>
ATTNKERN_DEVICE T group_sum(T value) {
#pragma unroll
  for (int mask = Width / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

template <class T>
ATTNKERN_DEVICE T warp_sum(T value) {
  return group_sum<kWarpSize>(value);
}

// K sums at once over the block, in every thread: warps first, then one warp's butterfly over their sums.
// scratch holds K * kWarpSize elements; it is free again after the caller's next block_sync().
template <class T, int K>
ATTNKERN_DEVICE Vec<T, K> block_sum(Vec<T, K> value, const Shared<T>& scratch) {
#pragma unroll
  for (int k = 0; k < K; ++k) {
    value[k] = warp_sum(value[k]);
    if (lane_id() == 0) scratch.store(k * kWarpSize + warp_id(), value[k]);
  }
  block_sync();
#pragma unroll
  for (int k = 0; k < K; ++k)
    value[k] = warp_sum(lane_id() < warp_count() ? scratch.load(k * kWarpSize + lane_id()) : T(0));
  return value;
}

template <class T>
ATTNKERN_DEVICE T block_sum(T value, const Shared<T>& scratch) {
  return block_sum(Vec<T, 1>{{value}}, scratch)[0];
}

}  // namespace attnkern::cuda
