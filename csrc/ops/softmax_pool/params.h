// The contract between register.cpp and the launchers: plain data, no torch.
//
//   e[m,n] = scores[m,n]                                            given
//          | q[m] . k[n] + c[m]                                     dot
//          | w . act(k[n] + q[m]) + c[m]                            additive
//          | w[m] . (act(V v[n] + b_V) * sigmoid(U v[n] + b_U)) + c[m]   gated
//   l = scale e + bias;  lse[m] = log sum_n exp l[m,n];  p = exp(l - lse);  z[m] = sum_n p[m,n] v[n]
//   top[m] = largest l[m,n] and its p, of which p is made: exp(l - largest) times that one, as lse is rounded
//
// attnkern/ops/softmax_pool/reference.py has every formula, forward and backward. A row without a logit above -inf has
// lse = -inf, p = 0, z = 0 and no gradient; an item whose bias is -inf has p = 0 whatever its score.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/parallel.h"
#include "core/status.h"

namespace attnkern::softmax_pool {

enum class Scorer : int { given, dot, additive, gated };
enum class HiddenAct : int { tanh, relu, gelu };

// Items of H heads of B samples, [B, H, N, D]. Strides count elements; either the features (rows) or the items
// (columns) of a head are adjacent. Bags stand in one sample, where bag b is items offsets[b]..offsets[b+1].
template <class Pointer>
struct ItemsOf {
  Pointer data = nullptr;
  int64_t stride_batch = 0, stride_head = 0, stride_item = 0, stride_feature = 0;
};
using ConstItems = ItemsOf<const void*>;
using Items = ItemsOf<void*>;

struct Sizes {
  int64_t batch, heads;  // B samples or bags, H
  int64_t items;         // N, of a sample; of all bags together
  int64_t queries;       // M
  int64_t features;      // D of values and z
  int64_t hidden;  // K: features of keys (D where they are the values), hidden units of the gated scorer; 0 for given
};

// A small tensor [B, H, M, ...], dense but for the axes that broadcast, whose stride is 0.
template <class Pointer>
struct RowsOf {
  Pointer data = nullptr;
  int64_t stride_batch = 0, stride_head = 0, stride_query = 0;
};
using ConstRows = RowsOf<const void*>;

// Tensors marked [acc] have dtype accumulation(dtype); items, V and U have dtype.
struct Inputs {
  DType dtype;
  Sizes sizes;
  Scorer scorer;
  HiddenAct act;
  double scale;
  ConstItems values;                 // [B, H, N, D]
  ConstItems keys;                   // [B, H, N, K]; null data: the values
  ConstRows query;                   // [acc] [B or 1, H, M, K]; dot and additive
  ConstRows scores;                  // [acc] [B, H, M, N]; given
  const void* V = nullptr;           // [K, D]; gated
  const void* b_V = nullptr;         // [acc] [K] or null
  const void* U = nullptr;           // [K, D] or null: h = act(V v + b_V)
  const void* b_U = nullptr;         // [acc] [K] or null
  const void* w = nullptr;           // [acc] [M, K] for gated, [1, K] for additive
  ConstRows c;                       // [acc] [B or 1, H, M], or null data
  ConstRows bias;                    // [acc] [B or 1, H or 1, M or 1, N], or null data
  const int64_t* offsets = nullptr;  // [B + 1] or null; read clamped to 0..N and not decreasing
};

// A softmax is saturated where one weight is nearly 1. dz . z and that item's dz . v are then nearly the same, and
// their difference, which its score's gradient is made of, would be the rounding of both. Backward takes it from the
// pool of the rest, z' of the items without that one: dz . z - dz . v = w' (dz . z' - dz . v), with w' the weight of
// the rest. kPeaked is far enough above kPeak that no second item passes for the peak, however its logit was rounded.
constexpr float kPeaked = 0.625f;   // a row whose largest weight is above this has a peak:
constexpr float kPeak = 0.5f;       // its item of a weight above this
constexpr float kAlone = 0x1p-54f;  // weight of the rest below which the peak's is 1 in float64, and no gradient left

struct ForwardParams : Inputs {
  void* z = nullptr;           // [acc] [B, H, M, D], dense
  void* lse = nullptr;         // [acc] [B, H, M], or null
  void* top = nullptr;         // [acc] [2, B, H, M]: the largest logit and its weight, 0 and 0 where none is above -inf
  void* scores_out = nullptr;  // [acc] e [B, H, M, N] ([1, H, M, N] of bags), or null
  // The pool of the rest: with `whole`, which is top of the pool of all, rows that have a peak are pooled without it,
  // and which item that is goes to `peaks` [B, H, M]. Of other rows' results and peaks nothing is said.
  const void* whole = nullptr;
  int64_t* peaks = nullptr;
  void* workspace = nullptr;
};

struct BackwardParams : Inputs {
  const void* dz = nullptr;       // [B, H, M, D], dense
  const void* z = nullptr;        // as the forward wrote it
  const void* dlse = nullptr;     // [acc] [B, H, M], or null
  const void* dscores = nullptr;  // [acc] [B, H, M, N] ([1, H, M, N] of bags), or null
  const void* top = nullptr;      // as the forward wrote it
  // Outputs; null: not needed. d<name> has the shape of <name>; dV, dU too are [acc].
  Items dvalues;
  Items dkeys;
  void* dquery = nullptr;   // [acc] [B or 1, H, M, K], dense
  void* dlogits = nullptr;  // [acc] p (dp - delta), [B, H, M, N] ([1, H, M, N] of bags)
  void* dV = nullptr;
  void* db_V = nullptr;
  void* dU = nullptr;
  void* db_U = nullptr;
  void* dw = nullptr;
  void* workspace = nullptr;
};

// CPU. The workspace is what *_workspace_cpu says, in bytes, 64-byte aligned, contents undefined. B and N may be 0.
size_t forward_workspace_cpu(const ForwardParams& params, const ThreadPool& pool);
size_t backward_workspace_cpu(const BackwardParams& params, const ThreadPool& pool);
Status launch_forward_cpu(const ForwardParams& params, const ThreadPool& pool);
Status launch_backward_cpu(const BackwardParams& params, const ThreadPool& pool);

// CUDA. `stream` is a cudaStream_t; the workspace is device memory, 256-byte aligned, contents undefined. B and N may
// be 0. Offsets are device memory.
size_t forward_workspace_cuda(const ForwardParams& params);
size_t backward_workspace_cuda(const BackwardParams& params);
Status launch_forward_cuda(const ForwardParams& params, void* stream);
Status launch_backward_cuda(const BackwardParams& params, void* stream);

}  // namespace attnkern::softmax_pool
