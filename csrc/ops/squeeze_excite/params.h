// The contract between register.cpp and the launchers: plain data, no torch.
//
//   m = src, or mean_l x;  h = W1 m + b1;  z = W2 act(h) + b2;  (s, t) from g = gate(z)
//   y = out_act(residual + d gain (s x + t))
//
// attnkern/ops/squeeze_excite/reference.py has every formula, forward and backward.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/activation.h"
#include "core/dtype.h"
#include "core/parallel.h"
#include "core/status.h"

namespace attnkern::squeeze_excite {

enum class Apply : int { scale, scale1p, scale_shift, shift };

// A feature map of B samples. Channels first: a row is one channel's L positions. Channels last: a row is one
// position's C channels. Elements of a row are adjacent; strides count elements and are free otherwise.
enum class Layout : int { channels_first, channels_last };

template <class Pointer>
struct MapOf {
  Pointer data = nullptr;
  int64_t stride_batch = 0;
  int64_t stride_row = 0;
};
using ConstMap = MapOf<const void*>;
using Map = MapOf<void*>;

struct Sizes {
  int64_t batch, channels, length;  // B, C, L
  int64_t hidden;                   // R; 0 for an MLP of fewer than two layers
  int64_t width;                    // of the logits: C, or 2C for Apply::scale_shift
};

struct Options {
  Act act;
  double act_slope;
  Gate gate;
  double gate_slope, gate_offset;
  Apply apply;
  double gain;
  Act out_act;
};

// Tensors marked [acc] have dtype accumulation(dtype); weights and biases have weight_dtype; maps have dtype.
struct Inputs {
  DType dtype, weight_dtype;
  Layout layout;
  Sizes sizes;
  Options options;
  ConstMap x;
  const void* src = nullptr;         // [acc] [B, C] ([B, width] without weights), or null: mean of x
  const void* w1 = nullptr;          // [R, C]; [width, C] when w2 is null; null: z = src
  const void* b1 = nullptr;          // [R] ([width]) or null
  const void* w2 = nullptr;          // [width, R] or null
  const void* b2 = nullptr;          // [width] or null
  const void* act_weight = nullptr;  // prelu slopes [R], or [1] with act_weight_stride 0
  int64_t act_weight_stride = 0;
  ConstMap residual;                // null data: none
  const void* drop_path = nullptr;  // [acc] [B] or null: 1
};

// Rows of the bit mask are bytes [rows, ceil(columns / 8)], least significant bit first; rows and columns as the layout
// has them (B*C rows of L bits, or B*L rows of C bits), always dense. A bit is out_act'(u) for relu and relu6.
struct ForwardParams : Inputs {
  Map y;
  void* mean = nullptr;     // [acc] [B, C]; null when src is given
  void* hidden = nullptr;   // [acc] [B, R], before the activation; null without a hidden layer
  void* logits = nullptr;   // [acc] [B, width]
  uint8_t* mask = nullptr;  // or null: do not save
  void* workspace = nullptr;
};

struct BackwardParams : Inputs {
  ConstMap dy;
  const void* dlogits = nullptr;  // [acc] [B, width] or null
  const void* mean = nullptr;     // as the forward wrote them
  const void* hidden = nullptr;
  const void* logits = nullptr;
  const uint8_t* mask = nullptr;  // set for relu and relu6 out_act; then residual is null
  // Outputs; null: not needed. d<name> has the type and shape of <name>.
  Map dx;
  void* dsrc = nullptr;
  void* dw1 = nullptr;
  void* db1 = nullptr;
  void* dw2 = nullptr;
  void* db2 = nullptr;
  void* dact_weight = nullptr;
  Map dresidual;  // v = dy out_act'(u); null for the identity, where dy serves
  void* ddrop_path = nullptr;
  void* workspace = nullptr;
};

// The squeeze alone writes mean, and reads dtype, layout, sizes (without a hidden layer) and x.
//
// CPU. The workspace is what *_workspace_cpu says, in bytes, 64-byte aligned, contents undefined. B may be 0.
size_t forward_workspace_cpu(const ForwardParams& params, const ThreadPool& pool);
size_t backward_workspace_cpu(const BackwardParams& params, const ThreadPool& pool);
Status launch_forward_cpu(const ForwardParams& params, const ThreadPool& pool);
Status launch_backward_cpu(const BackwardParams& params, const ThreadPool& pool);
size_t squeeze_workspace_cpu(const ForwardParams& params, const ThreadPool& pool);
Status launch_squeeze_cpu(const ForwardParams& params, const ThreadPool& pool);

// CUDA. `stream` is a cudaStream_t; the workspace is device memory, 256-byte aligned, contents undefined. B may be 0.
size_t forward_workspace_cuda(const ForwardParams& params);
size_t backward_workspace_cuda(const BackwardParams& params);
Status launch_forward_cuda(const ForwardParams& params, void* stream);
Status launch_backward_cuda(const BackwardParams& params, void* stream);
size_t squeeze_workspace_cuda(const ForwardParams& params);
Status launch_squeeze_cuda(const ForwardParams& params, void* stream);

}  // namespace attnkern::squeeze_excite
