// A norm's vectors on the GPU: one small kernel each where torch would take seven.
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "ops/attention_gate/params.h"

namespace attnkern::attention_gate {
namespace {

using namespace cuda;

constexpr int kNormThreads = 128;

ATTNKERN_DEVICE float vector_at(const void* data, int64_t f, float otherwise = 0.0f) {
  return data ? load_global(static_cast<const float*>(data) + f) : otherwise;
}
ATTNKERN_DEVICE void put(void* data, int64_t f, float value) { store_global(static_cast<float*>(data) + f, value); }

// Computes   NormParams: scale, shift, and weight times scale
// Layout     weight, folded [F, terms], the rest [F]
// Mapping    a block a hidden unit, threads along its terms
// Traffic    weight once
// Numerics   float
ATTNKERN_KERNEL(kNormThreads, 8) attention_gate_norm_kernel(ATTNKERN_GRID_CONSTANT const NormParams p) {
  const int64_t f = block_index();
  const float scale = vector_at(p.gamma, f, 1.0f) / sqrtf(vector_at(p.var, f) + static_cast<float>(p.eps));
  for (int64_t c = thread_index(); c < p.terms; c += kNormThreads)
    put(p.folded, f * p.terms + c, scale * vector_at(p.weight, f * p.terms + c));
  if (thread_index() > 0) return;
  put(p.scale, f, scale);
  put(p.shift, f,
      vector_at(p.onto, f) + (vector_at(p.beta, f) + scale * (vector_at(p.bias, f) - vector_at(p.mean, f))));
}

// Computes   NormBackwardParams
// Layout     [F]
// Mapping    a thread a hidden unit
// Traffic    nothing to speak of
// Numerics   float
ATTNKERN_KERNEL(kNormThreads, 8)
attention_gate_norm_backward_kernel(ATTNKERN_GRID_CONSTANT const NormBackwardParams p) {
  const int64_t f = int64_t{block_index()} * kNormThreads + thread_index();
  if (f >= p.hidden) return;
  const float n = static_cast<float>(p.count), mean = vector_at(p.mean, f), dh = vector_at(p.dh, f);
  const float scale = vector_at(p.scale, f), r = 1.0f / sqrtf(vector_at(p.var, f) + static_cast<float>(p.eps));
  const float dgamma = r * (vector_at(p.dht, f) - mean * dh), k1 = -scale * r * dgamma / n;
  put(p.dgamma, f, dgamma);
  put(p.k1, f, k1);
  put(p.k0, f, -scale * dh / n - k1 * mean);
}

}  // namespace

Status launch_norm_cuda(const NormParams& p, void* stream) {
  return launch(attention_gate_norm_kernel, {p.hidden, kNormThreads}, stream, p);
}

Status launch_norm_backward_cuda(const NormBackwardParams& p, void* stream) {
  return launch(attention_gate_norm_backward_kernel, {(p.hidden + kNormThreads - 1) / kNormThreads, kNormThreads},
                stream, p);
}

}  // namespace attnkern::attention_gate
