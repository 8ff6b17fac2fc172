// Blocks' partial sums, added up in order.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace attnkern::attention_gate {

using namespace cuda;

constexpr int kReduceRows = 16;
constexpr int kReduceOutputs = 3;

// out[o][i] = the sum over slots of partial[slot stride + o pitch + i], i < count.
struct Reduction {
  const float* partial;
  float* out[kReduceOutputs];
  int outputs;
  int64_t count, pitch, stride, slots;
};

// Computes   a Reduction
// Layout     dense
// Mapping    a block: 32 elements of an output, 16 warps along the slots
// Traffic    the partial sums once
// Numerics   float; every 16th term in order, then the 16 sums in order
template <int Rows>
ATTNKERN_KERNEL(Rows* kWarpSize, 4)
attention_gate_reduce_kernel(ATTNKERN_GRID_CONSTANT const Reduction r) {
  SharedArena arena;
  const Shared<float> sums = arena.take<float>(Rows * kWarpSize);
  const int64_t blocks = (r.count + kWarpSize - 1) / kWarpSize, output = block_index() / blocks;
  const int64_t i = block_index() % blocks * kWarpSize + lane_id();
  float sum = 0.0f;
  if (i < r.count) {
#pragma unroll 4
    for (int64_t slot = warp_id(); slot < r.slots; slot += Rows)
      sum += load_global(r.partial + slot * r.stride + output * r.pitch + i);
  }
  sums.store(thread_index(), sum);
  block_sync();
  if (warp_id() > 0 || i >= r.count) return;
  for (int w = 1; w < Rows; ++w) sum += sums.load(w * kWarpSize + lane_id());
  store_global(r.out[output] + i, sum);
}

inline Status launch_reduce(const Reduction& r, void* stream) {
  const int64_t blocks = (r.count + kWarpSize - 1) / kWarpSize;
  return launch(attention_gate_reduce_kernel<kReduceRows>,
                {r.outputs * blocks, kReduceRows * kWarpSize, shared_bytes<float>(kReduceRows * kWarpSize)}, stream, r);
}

}  // namespace attnkern::attention_gate
