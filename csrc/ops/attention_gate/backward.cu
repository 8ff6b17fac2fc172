// Backward, fused; or in ranges of units whose hidden gradients stay in L2: h again, then the maps' and the weights'
// gradients.
#include <utility>

#include "ops/attention_gate/fused_backward.cuh"
#include "ops/attention_gate/launch.cuh"
#include "ops/attention_gate/reduce.cuh"
#include "ops/attention_gate/resample.cuh"
#include "ops/attention_gate/sweep.cuh"
#include "ops/attention_gate/weight_gradient.cuh"

namespace attnkern::attention_gate {
namespace {

struct Carved {
  SplitSpace weights;
  float* dq = nullptr;       // [B, grid], where the gate was applied
  float* vectors = nullptr;  // dbias, dpsi and dpsi_bias of a slot
  float* dtheta = nullptr;   // [splits, hidden units, terms]; fused: [blocks, F, C]
  float* dphi = nullptr;
  Beside* beside = nullptr;
  HiddenGradients hidden{};
  size_t bytes;
};

bool is_normed(const BackwardParams& p) { return p.theta_branch.k0 || p.phi_branch.k0; }

Carved carve(const BackwardParams& p, const Plan& plan, void* base) {
  const Sizes& n = p.sizes;
  Carver carver{base};
  Carved c;
  const int64_t pitch = int64_t{plan.passes} * plan.hidden, rows = plan.chunk_units * plan.tile;
  c.hidden.pitch = pitch;
  c.weights = take_split(carver, p, plan);
  if (p.dtheta) c.vectors = carver.take<float>(plan.slots * 3 * pitch);
  if (plan.fused) {
    if (p.dtheta) c.dtheta = carver.take<float>(plan.blocks * n.hidden * n.channels);
    if (p.dphi) c.dphi = carver.take<float>(plan.blocks * n.hidden * n.gating);
    c.bytes = carver.bytes;
    return c;
  }
  if (p.apply) c.dq = carver.take<float>(n.batch * product_of(n.grid));
  if (p.dtheta) {
    c.dtheta = carver.take<float>(plan.splits * pitch * theta_operand(p).width);
    if (p.phi) c.dphi = carver.take<float>(plan.splits * pitch * phi_operand(p).width);
  }
  if (!p.phi && p.dg.data) c.beside = carver.take<Beside>(n.g[0] + n.g[1] + n.g[2]);
  c.hidden.dt = carver.take<char>(rows * pitch * size_of(p.dtype));
  c.hidden.du = is_normed(p) ? carver.take<char>(rows * pitch * size_of(p.dtype)) : c.hidden.dt;
  c.bytes = carver.bytes;
  return c;
}

// What a call without samples writes.
Status clear_gradients(const BackwardParams& p, void* stream) {
  const Sizes& n = p.sizes;
  const std::pair<void*, int64_t> outputs[] = {{p.dtheta, n.hidden * n.channels * product_of(n.kernel)},
                                               {p.dphi, n.hidden * n.gating},
                                               {p.dbias, n.hidden},
                                               {p.dpsi, n.hidden},
                                               {p.dpsi_bias, 1}};
  for (const auto& [out, count] : outputs) {
    if (out == nullptr) continue;
    if (const Status status = fill_bytes(out, 0, count * sizeof(float), stream); !status.ok()) return status;
  }
  return {};
}

// dq with what comes from y.
template <class T, bool last>
Status launch_logits(const BackwardParams& p, float* dq, void* stream) {
  const Sizes& n = p.sizes;
  const bool of_x = p.target == Target::x;
  const Sweep s{n.batch,
                of_x ? n.channels : n.gating,
                product_of(n.grid),
                of_x ? p.x : p.g,
                p.d,
                {},
                static_cast<const float*>(p.q),
                static_cast<const float*>(p.dq),
                dq};
  return launch_sweep<T, last, SweepKind::logits>(s, stream);
}

// Everything of the units of c.hidden.
template <class T, bool last>
Status launch_range(const BackwardParams& p, const Plan& plan, const Work<T>& work, const Carved& c, void* stream) {
  const float* const dq = p.apply ? c.dq : static_cast<const float*>(p.dq);
  const HiddenGradients& range = c.hidden;
  Status status = visit_rows<T>(plan, [&](auto rows) {
    return launch(attention_gate_hidden_gradient_kernel<T, last, decltype(rows)::value>,
                  {plan.passes * plan.blocks, plan.threads, plan.shared_bytes}, stream, p, plan, work, dq, range,
                  c.vectors);
  });
  const int phi = 1 - work.theta;
  const float* const logits = p.apply ? static_cast<const float*>(p.q) : nullptr;
  const auto beginning = [&](Target target) { return Beginning{p.target == target ? p.d : ConstMap{}, logits}; };
  if (status.ok() && p.dx.data)
    status = launch_map_gradient<T, last>(p, plan, work.operands[work.theta], work.weights[work.theta], range.dt, range,
                                          beginning(Target::x), p.dx, stream);
  if (status.ok() && p.dg.data)
    status = p.phi ? launch_map_gradient<T, last>(p, plan, work.operands[phi], work.weights[phi], range.du, range,
                                                  beginning(Target::g), p.dg, stream)
                   : launch_resample_gradient<T>(p, plan, range, c.beside, stream);
  if (status.ok() && p.dtheta)
    status = launch_weight_gradient<T, last>(p, plan, work.operands[work.theta], range.dt, range, c.dtheta, stream);
  if (status.ok() && p.dphi)
    status = launch_weight_gradient<T, last>(p, plan, work.operands[phi], range.du, range, c.dphi, stream);
  return status;
}

template <class T, bool last>
Status launch_fused(const BackwardParams& p, const Plan& plan, const Work<T>& work, const Carved& c, void* stream) {
  Operand d = work.operands[p.target == Target::x ? work.theta : 1 - work.theta];
  d.map = p.d;
  const auto kernel = plan.alone ? attention_gate_bwd_kernel<T, last, true> : attention_gate_bwd_kernel<T, last, false>;
  return launch(kernel, {plan.blocks, plan.threads, plan.shared_bytes}, stream, p, plan, work, d, c.vectors, c.dtheta,
                c.dphi);
}

Status launch_reductions(const BackwardParams& p, const Plan& plan, const Carved& c, void* stream) {
  const Sizes& n = p.sizes;
  const int64_t hidden = n.hidden, pitch = c.hidden.pitch;
  const auto to = [](void* out) { return static_cast<float*>(out); };
  Status status =
      launch_reduce({c.vectors, {to(p.dbias), to(p.dpsi)}, 2, hidden, pitch, 3 * pitch, plan.slots}, stream);
  if (status.ok())
    status = launch_reduce({c.vectors + 2 * pitch, {to(p.dpsi_bias)}, 1, 1, pitch, 3 * pitch, plan.slots}, stream);
  const auto reduce_weight = [&](const float* blocks, void* out, int64_t channels) {
    const int64_t count = hidden * channels;
    return launch_reduce({blocks, {to(out)}, 1, count, count, count, plan.blocks}, stream);
  };
  if (plan.fused) {
    if (status.ok()) status = reduce_weight(c.dtheta, p.dtheta, n.channels);
    return status.ok() ? reduce_weight(c.dphi, p.dphi, n.gating) : status;
  }
  if (status.ok()) status = launch_put_weight(p, plan, theta_operand(p), c.dtheta, p.dtheta, stream);
  if (status.ok() && p.dphi) status = launch_put_weight(p, plan, phi_operand(p), c.dphi, p.dphi, stream);
  return status;
}

}  // namespace

size_t backward_workspace_cuda(const BackwardParams& p, const Plan& plan) { return carve(p, plan, nullptr).bytes; }

Status launch_backward_cuda(const BackwardParams& p, const Plan& plan, void* stream) {
  if (p.sizes.batch == 0) return clear_gradients(p, stream);
  cuda::DeviceProperties device;
  if (const Status status = device_properties(device); !status.ok()) return status;
  if (!fits(plan, device)) return kTooLarge;
  Carved c = carve(p, plan, p.workspace);
  const Status status = visit(p.dtype, is_last(p.x), [&](auto type, auto is_last) -> Status {
    using T = decltype(type);
    constexpr bool last = decltype(is_last)::value;
    Work<T> work;
    Status status = make_work(p, plan, c.weights, work, stream);
    if (plan.fused) return status.ok() ? launch_fused<T, last>(p, plan, work, c, stream) : status;
    if (status.ok() && p.apply) status = launch_logits<T, last>(p, c.dq, stream);
    if (status.ok() && c.beside) status = launch_beside(p, c.beside, stream);
    if (status.ok() && p.dx.data) status = launch_uncovered<T>(p, p.target == Target::x ? p.d : ConstMap{}, stream);
    for (int64_t first = 0; first < plan.units && status.ok(); first += plan.chunk_units) {
      c.hidden.first = first;
      c.hidden.last = first + plan.chunk_units < plan.units ? first + plan.chunk_units : plan.units;
      status = launch_range<T, last>(p, plan, work, c, stream);
    }
    return status;
  });
  return status.ok() && p.dtheta ? launch_reductions(p, plan, c, stream) : status;
}

size_t backward_workspace_cuda(const BackwardParams& p) {
  cuda::DeviceProperties device;
  if (!device_properties(device).ok()) return 0;
  return backward_workspace_cuda(p, make_plan(problem_of(p), device));
}

Status launch_backward_cuda(const BackwardParams& p, void* stream) {
  cuda::DeviceProperties device;
  if (const Status status = device_properties(device); !status.ok()) return status;
  return launch_backward_cuda(p, make_plan(problem_of(p), device), stream);
}

}  // namespace attnkern::attention_gate
