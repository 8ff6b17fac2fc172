// Backward launcher.
#include <algorithm>

#include "ops/squeeze_excite/launch.cuh"

namespace attnkern::squeeze_excite {
namespace {

// dh = act'(h) da, or dz where the first layer is the only one.
Operand first_layer_gradient(const BackwardParams& p, const Workspace& w) {
  const Sizes& n = p.sizes;
  if (p.w2) return {w.da, n.hidden, 1, Operand::chained, static_cast<const float*>(p.hidden)};
  return {w.dz, n.width, 1};
}

Operand transposed(Operand o) {
  std::swap(o.stride_i, o.stride_j);
  return o;
}

// da = dz W2, dm = dh W1.
Products gradient_products(const BackwardParams& p, const Workspace& w) {
  const Sizes& n = p.sizes;
  Products products;
  if (p.w1 == nullptr) return products;
  if (p.w2)
    products.add({.a = {w.dz, n.width, 1},
                  .b = {p.w2, n.hidden, 1, Operand::weights},
                  .m = n.batch,
                  .n = n.hidden,
                  .k = n.width,
                  .out = w.da});
  const int64_t first = p.w2 ? n.hidden : n.width;
  products.add(with_act({.a = first_layer_gradient(p, w),
                         .b = {p.w1, n.channels, 1, Operand::weights},
                         .m = n.batch,
                         .n = n.channels,
                         .k = first,
                         .out = p.dsrc ? p.dsrc : w.dm},
                        p));
  return products;
}

// dW2 = dz^T a and db2, dW1 = dh^T m and db1.
Products weight_products(const BackwardParams& p, const Workspace& w) {
  const Sizes& n = p.sizes;
  const void* m = p.src ? p.src : p.mean;
  Products products;
  if (p.dw2)
    products.add(with_act({.a = {w.dz, 1, n.width},
                           .b = {p.hidden, n.hidden, 1, Operand::activated},
                           .m = n.width,
                           .n = n.hidden,
                           .k = n.batch,
                           .out = p.dw2,
                           .out_weights = true,
                           .ones = p.db2},
                          p));
  if (p.dw1)
    products.add(with_act({.a = transposed(first_layer_gradient(p, w)),
                           .b = {m, n.channels, 1},
                           .m = p.w2 ? n.hidden : n.width,
                           .n = n.channels,
                           .k = n.batch,
                           .out = p.dw1,
                           .out_weights = true,
                           .ones = p.db1},
                          p));
  return products;
}

Carved carve(const BackwardParams& p, const Plan& plan, const Device& device, void* base) {
  const Sizes& n = p.sizes;
  Carver carver{base};
  Carved c{};
  c.kernel.dz = carver.take<float>(n.batch * n.width);
  c.kernel.da = carver.take<float>(n.batch * n.hidden);
  if (plan.strategy != Strategy::resident) {
    c.kernel.dm = carver.take<float>(n.batch * n.channels);
    c.kernel.counters = carver.take<uint32_t>(counter_count(p));
    c.kernel.partial = carver.take<float>(2 * n.batch * plan.pieces * plan.channels_here);
  }
  c.products = carver.take<float>(
      std::max(gradient_products(p, c.kernel).workspace(device), weight_products(p, c.kernel).workspace(device)));
  c.bytes = carver.bytes;
  return c;
}

Status query(Device& device) { return plan_device(squeeze_excite_resident_kernel<float, false, Backward>, device); }

Status launch_maps(const BackwardParams& p, const Plan& plan, const Carved& w, const Device& device, void* stream) {
  return visit_map(p.dtype, p.layout, [&](auto kind, auto last) -> Status {
    using T = decltype(kind);
    constexpr bool l = decltype(last)::value;
    if (plan.strategy == Strategy::resident) return launch_resident<T, l, Backward>(p, plan, w.kernel, stream);
    if (plan.strategy != Strategy::batched)
      return launch_streamed<T, l, Backward>(p, plan, w.kernel, Phase::both, stream);
    if (const Status status = launch_streamed<T, l, Backward>(p, plan, w.kernel, Phase::sums, stream); !status.ok())
      return status;
    const Products products = gradient_products(p, w.kernel);
    if (const Status status = launch_products(p, products, w, device, stream); !status.ok()) return status;
    if (!p.dx.data && !p.dresidual.data) return {};
    return launch_streamed<T, l, Backward>(p, plan, w.kernel, Phase::rescale, stream);
  });
}

}  // namespace

size_t backward_workspace_cuda(const BackwardParams& p, const Plan& plan, const Device& device) {
  return carve(p, plan, device, nullptr).bytes;
}

Status launch_backward_cuda(const BackwardParams& p, const Plan& plan, const Device& device, void* stream) {
  const Sizes& n = p.sizes;
  const Carved w = carve(p, plan, device, p.workspace);
  if (n.batch > 0)
    if (const Status status = launch_maps(p, plan, w, device, stream); !status.ok()) return status;
  if (const Status status = launch_products(p, weight_products(p, w.kernel), w, device, stream); !status.ok())
    return status;
  if (!p.dact_weight) return {};
  return visit_weight_type(p.weight_dtype, [&](auto weights) {
    const LaunchConfig config{p.act_weight_stride ? n.hidden : 1, kProductThreads, shared_bytes<float>(kWarpSize)};
    return launch(squeeze_excite_prelu_grad_kernel<decltype(weights)>, config, stream, w.kernel.da,
                  static_cast<const float*>(p.hidden), n.batch, n.hidden, p.act_weight_stride, p.dact_weight);
  });
}

size_t backward_workspace_cuda(const BackwardParams& p) {
  Device device;
  if (!query(device).ok()) return 0;
  return backward_workspace_cuda(p, make_plan(problem_of(p), device), device);
}

Status launch_backward_cuda(const BackwardParams& p, void* stream) {
  Device device;
  if (const Status status = query(device); !status.ok()) return status;
  return launch_backward_cuda(p, make_plan(problem_of(p), device), device, stream);
}

}  // namespace attnkern::squeeze_excite
