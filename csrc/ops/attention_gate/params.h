// The contract between register.cpp and the launchers: plain data, no torch.
//
//   t[f] = sum_c theta[f,c] x[c]      over the patch of a position of the logits' grid
//   u[f] = sum_c phi[f,c] g[c]        or g itself, between two of its positions along each dim
//   h = t + u + bias;   q = sum_f psi[f] act(h[f]) + psi_bias;   y = sigmoid(q) target
//
// attnkern/ops/attention_gate/reference.py has every formula, forward and backward.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/parallel.h"
#include "core/status.h"

namespace attnkern::attention_gate {

enum class HiddenAct : int { relu, leaky_relu, softplus };
enum class Target : int { x, g };

// A map [B, C, size[0], size[1], size[2]]. Its positions stand in one row, in that order: element (b, c, l) is at
// b stride_batch + c stride_channel + l stride_position, and one of the two last strides is 1. Strides count elements.
template <class Pointer>
struct MapOf {
  Pointer data = nullptr;
  int64_t stride_batch = 0, stride_channel = 0, stride_position = 0;
};
using ConstMap = MapOf<const void*>;
using Map = MapOf<void*>;

struct Sizes {
  int64_t batch, channels, gating, hidden;  // B, C, G, F
  int64_t x[3];                             // of x
  int64_t kernel[3];                        // of theta, which is its stride
  int64_t grid[3];                          // of the logits: x / kernel, rounded down
  int64_t g[3];                             // of g: the grid's where phi is given
};

// A branch normalised over the batch: t enters h as scale t, and dt = scale dh + k0 + k1 t. All [F]; null: dt = dh.
struct Branch {
  const void* scale = nullptr;
  const void* k0 = nullptr;
  const void* k1 = nullptr;
};

// x, g, their gradients, d and y have dtype and are all channels first (position stride 1) or all channels last;
// everything else has accumulation(dtype) and is dense.
struct Inputs {
  DType dtype;
  Sizes sizes;
  HiddenAct act;
  double slope;
  Target target;
  bool apply;
  ConstMap x, g;
  const void* theta = nullptr;        // [F, C k1 k2 k3]
  const void* phi = nullptr;          // [F, G]; null: g is [B, F, ...] and resampled by the taps
  const void* bias = nullptr;         // [F] or null
  const void* psi = nullptr;          // [F]
  const void* psi_bias = nullptr;     // [1] or null
  const int64_t* taps = nullptr;      // [grid1 + grid2 + grid3, 2] positions of g, or null with phi
  const void* tap_weights = nullptr;  // the same shape
};

struct ForwardParams : Inputs {
  void* q = nullptr;  // [B, grid]
  Map y;              // of the target's sizes; null data where not applied
  void* workspace = nullptr;
};

struct BackwardParams : Inputs {
  ConstMap d;                // dy where applied, else what the target's gradient begins with; null data: nothing
  const void* dq = nullptr;  // [B, grid] or null: nothing besides what comes from d
  const void* q = nullptr;   // [B, grid]
  Branch theta_branch, phi_branch;
  // Outputs; null: not needed.
  Map dx, dg;
  void* dtheta = nullptr;  // the weights' gradients are wanted together; dphi is null without phi
  void* dphi = nullptr;
  void* dbias = nullptr;      // [F]
  void* dpsi = nullptr;       // [F]
  void* dpsi_bias = nullptr;  // [1]
  void* workspace = nullptr;
};

// Mean and variance (biased) of t over batch and positions, [F]. Of the inputs dtype, sizes (without those of g), x and
// theta count.
struct MomentsParams : Inputs {
  void* mean = nullptr;
  void* var = nullptr;
  void* workspace = nullptr;
};

// The sums over batch and positions of dh, dh t and dh u, [F].
struct SumsParams : Inputs {
  const void* dq = nullptr;  // [B, grid]
  const void* theta_scale = nullptr;
  const void* phi_scale = nullptr;
  void* dh = nullptr;
  void* dht = nullptr;
  void* dhu = nullptr;
  void* workspace = nullptr;
};

// A product by weight [hidden, terms] and a norm as one product, [hidden] otherwise:
//   scale = gamma (var + eps)^-1/2;  folded = scale weight;  shift = onto + beta + scale (bias - mean)
struct NormParams {
  DType dtype;  // of everything
  int64_t hidden, terms;
  const void *weight, *onto, *bias, *gamma, *beta, *mean, *var;  // null: onto 0, bias 0, gamma 1, beta 0
  double eps;
  void *folded, *shift, *scale;
};

// What returns through the statistics of `count` values, [hidden] each (reference.py, norm_backward).
struct NormBackwardParams {
  DType dtype;
  int64_t hidden, count;
  const void *dh, *dht, *mean, *var, *scale;
  double eps;
  void *k0, *k1, *dgamma;
};

// y = alpha x, or dx = alpha dy with dalpha = sum_c dy x: batch, channels and sizes.x alone count.
struct ApplyParams {
  DType dtype;
  int64_t batch, channels, length;
  ConstMap x;
  const void* alpha = nullptr;  // [B, L]
  Map y;
};
struct ApplyBackwardParams {
  DType dtype;
  int64_t batch, channels, length;
  ConstMap x, dy;
  const void* alpha = nullptr;  // [B, L]
  Map dx;
  void* dalpha = nullptr;  // [B, L]
};

// CPU. The workspace is what *_workspace_cpu says, in bytes, 64-byte aligned, contents undefined. B may be 0.
size_t forward_workspace_cpu(const ForwardParams& params, const ThreadPool& pool);
size_t backward_workspace_cpu(const BackwardParams& params, const ThreadPool& pool);
size_t moments_workspace_cpu(const MomentsParams& params, const ThreadPool& pool);
size_t sums_workspace_cpu(const SumsParams& params, const ThreadPool& pool);
Status launch_forward_cpu(const ForwardParams& params, const ThreadPool& pool);
Status launch_backward_cpu(const BackwardParams& params, const ThreadPool& pool);
Status launch_moments_cpu(const MomentsParams& params, const ThreadPool& pool);
Status launch_sums_cpu(const SumsParams& params, const ThreadPool& pool);
Status launch_norm_cpu(const NormParams& params, const ThreadPool& pool);
Status launch_norm_backward_cpu(const NormBackwardParams& params, const ThreadPool& pool);
Status launch_apply_cpu(const ApplyParams& params, const ThreadPool& pool);
Status launch_apply_backward_cpu(const ApplyBackwardParams& params, const ThreadPool& pool);

// CUDA. `stream` is a cudaStream_t; the workspace is device memory, 256-byte aligned, contents undefined. B may be 0.
size_t forward_workspace_cuda(const ForwardParams& params);
size_t backward_workspace_cuda(const BackwardParams& params);
size_t moments_workspace_cuda(const MomentsParams& params);
size_t sums_workspace_cuda(const SumsParams& params);
Status launch_forward_cuda(const ForwardParams& params, void* stream);
Status launch_backward_cuda(const BackwardParams& params, void* stream);
Status launch_moments_cuda(const MomentsParams& params, void* stream);
Status launch_sums_cuda(const SumsParams& params, void* stream);
Status launch_norm_cuda(const NormParams& params, void* stream);
Status launch_norm_backward_cuda(const NormBackwardParams& params, void* stream);
Status launch_apply_cuda(const ApplyParams& params, void* stream);
Status launch_apply_backward_cuda(const ApplyBackwardParams& params, void* stream);

}  // namespace attnkern::attention_gate
