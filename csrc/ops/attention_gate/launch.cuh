// What both directions' launchers share.
#pragma once

#include "cuda/carver.h"
#include "cuda/launch.cuh"
#include "cuda/visit.cuh"
#include "ops/attention_gate/lanes.cuh"

namespace attnkern::attention_gate {

inline bool is_last(const ConstMap& map) { return map.stride_position != 1; }

inline Operand operand_of(const ConstMap& map, int64_t channels, int64_t length, int64_t patch) {
  const int padded = multiple_of(channels, kStep);
  return {map, channels, length, patch, padded, multiple_of(patch * padded, kWarpTile)};
}

inline Operand theta_operand(const Inputs& p) {
  return operand_of(p.x, p.sizes.channels, product_of(p.sizes.x), product_of(p.sizes.kernel));
}

inline Operand phi_operand(const Inputs& p) { return operand_of(p.g, p.sizes.gating, product_of(p.sizes.g), 1); }

// Weights in parts, in workspace: what carve() takes and split_weights() fills.
struct SplitSpace {
  void* theta = nullptr;
  void* phi = nullptr;
};

inline int stored_parts(DType dtype) { return size_of(dtype) == 2 ? 3 : 1; }

inline SplitSpace take_split(Carver& carver, const Inputs& p, const Plan& plan) {
  const int64_t rows = int64_t{plan.passes} * plan.hidden, bytes = size_of(p.dtype) * stored_parts(p.dtype);
  SplitSpace s;
  s.theta = carver.take<char>(rows * theta_operand(p).width * bytes);
  if (p.phi) s.phi = carver.take<char>(rows * phi_operand(p).width * bytes);
  return s;
}

template <class T>
Status split_weight(const void* weight, int64_t hidden, const Operand& o, int64_t rows, void* out, void* stream) {
  const int64_t blocks = (rows * o.width + kWeightThreads - 1) / kWeightThreads;
  return launch(attention_gate_split_kernel<T>, {blocks, kWeightThreads}, stream, static_cast<const float*>(weight),
                hidden, o, rows, static_cast<T*>(out));
}

// The products of a call, the target's last where it is known to stay in shared memory until the gate multiplies it.
template <class T>
Status make_work(const Inputs& p, const Plan& plan, const SplitSpace& space, Work<T>& work, void* stream) {
  const int64_t rows = int64_t{plan.passes} * plan.hidden;
  work = {};
  work.count = p.phi ? 2 : 1;
  work.theta = p.phi && p.target == Target::x ? 1 : 0;
  const Operand theta = theta_operand(p);
  work.operands[work.theta] = theta;
  work.weights[work.theta] = {static_cast<const T*>(space.theta), rows, theta.width};
  const Status status = split_weight<T>(p.theta, p.sizes.hidden, theta, rows, space.theta, stream);
  if (!status.ok() || !p.phi) return status;
  const Operand phi = phi_operand(p);
  work.operands[1 - work.theta] = phi;
  work.weights[1 - work.theta] = {static_cast<const T*>(space.phi), rows, phi.width};
  return split_weight<T>(p.phi, p.sizes.hidden, phi, rows, space.phi, stream);
}

// f(T{}, std::bool_constant<channels last>{}).
template <class F>
Status visit(DType dtype, bool last, const F& f) {
  return visit_type(dtype,
                    [&](auto type) -> Status { return last ? f(type, std::true_type{}) : f(type, std::false_type{}); });
}

// f(std::integral_constant<int, positions of a lane>{}).
template <class T, class F>
Status visit_rows(const Plan& plan, const F& f) {
  if constexpr (sizeof(T) == 2)
    if (plan.warp_tile > kWarpTile) return f(std::integral_constant<int, 2 * kLaneRows>{});
  return f(std::integral_constant<int, kLaneRows>{});
}

inline bool fits(const Plan& plan, const cuda::DeviceProperties& device) {
  return plan.shared_bytes <= device.shared_bytes_per_block;
}

constexpr Status kTooLarge{"no tile of these maps fits the shared memory of this device"};

}  // namespace attnkern::attention_gate
