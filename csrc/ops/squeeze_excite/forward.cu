// Forward and squeeze launchers.
#include "ops/squeeze_excite/launch.cuh"

namespace attnkern::squeeze_excite {
namespace {

// The MLP's layers.
Products forward_products(const ForwardParams& p) {
  const Sizes& n = p.sizes;
  const void* m = p.src ? p.src : p.mean;
  Products products;
  if (p.w1 == nullptr) return products;
  const int64_t first = p.w2 ? n.hidden : n.width;
  products.add(linear({m, n.channels, 1}, p.w1, p.b1, n.batch, n.channels, first, p.w2 ? p.hidden : p.logits));
  if (p.w2)
    products.add(with_act(
        linear({p.hidden, n.hidden, 1, Operand::activated}, p.w2, p.b2, n.batch, n.hidden, n.width, p.logits), p));
  return products;
}

Carved carve(const ForwardParams& p, const Plan& plan, const Device& device, void* base) {
  Carver carver{base};
  Carved c{};
  if (plan.strategy != Strategy::resident) {
    c.kernel.counters = carver.take<uint32_t>(counter_count(p));
    if (!p.src) c.kernel.partial = carver.take<float>(p.sizes.batch * plan.pieces * plan.channels_here);
    if (plan.strategy == Strategy::batched) c.products = carver.take<float>(forward_products(p).workspace(device));
  }
  c.bytes = carver.bytes;
  return c;
}

Status query(Device& device) { return plan_device(squeeze_excite_resident_kernel<float, false, Forward>, device); }

Plan squeeze_plan(const ForwardParams& p, const Device& device) {
  Force force;
  force.strategy = static_cast<int>(Strategy::batched);
  return make_plan(problem_of(p), device, force);
}

}  // namespace

size_t forward_workspace_cuda(const ForwardParams& p, const Plan& plan, const Device& device) {
  return carve(p, plan, device, nullptr).bytes;
}

Status launch_forward_cuda(const ForwardParams& p, const Plan& plan, const Device& device, void* stream) {
  if (p.sizes.batch == 0) return {};
  if (plan.chunk > INT32_MAX) return {"a mask cannot be saved for channels of an odd length beyond 2^31"};
  const Carved w = carve(p, plan, device, p.workspace);
  return visit_map(p.dtype, p.layout, [&](auto kind, auto last) -> Status {
    using T = decltype(kind);
    constexpr bool l = decltype(last)::value;
    if (plan.strategy == Strategy::resident) return launch_resident<T, l, Forward>(p, plan, w.kernel, stream);
    if (plan.strategy != Strategy::batched)
      return launch_streamed<T, l, Forward>(p, plan, w.kernel, Phase::both, stream);
    if (!p.src) {
      const Status status = launch_streamed<T, l, Forward>(p, plan, w.kernel, Phase::sums, stream);
      if (!status.ok()) return status;
    }
    if (const Status status = launch_products(p, forward_products(p), w, device, stream); !status.ok()) return status;
    if (p.w1 == nullptr) {
      const Status status = copy_bytes(p.logits, p.src, p.sizes.batch * p.sizes.width * sizeof(float), stream);
      if (!status.ok()) return status;
    }
    return launch_streamed<T, l, Forward>(p, plan, w.kernel, Phase::rescale, stream);
  });
}

size_t forward_workspace_cuda(const ForwardParams& p) {
  Device device;
  if (!query(device).ok()) return 0;
  return forward_workspace_cuda(p, make_plan(problem_of(p), device), device);
}

Status launch_forward_cuda(const ForwardParams& p, void* stream) {
  Device device;
  if (const Status status = query(device); !status.ok()) return status;
  return launch_forward_cuda(p, make_plan(problem_of(p), device), device, stream);
}

size_t squeeze_workspace_cuda(const ForwardParams& p) {
  Device device;
  if (!query(device).ok()) return 0;
  return forward_workspace_cuda(p, squeeze_plan(p, device), device);
}

Status launch_squeeze_cuda(const ForwardParams& p, void* stream) {
  if (p.sizes.batch == 0) return {};
  Device device;
  if (const Status status = query(device); !status.ok()) return status;
  const Plan plan = squeeze_plan(p, device);
  const Carved w = carve(p, plan, device, p.workspace);
  return visit_map(p.dtype, p.layout, [&](auto kind, auto last) {
    return launch_streamed<decltype(kind), decltype(last)::value, Forward>(p, plan, w.kernel, Phase::sums, stream);
  });
}

}  // namespace attnkern::squeeze_excite
