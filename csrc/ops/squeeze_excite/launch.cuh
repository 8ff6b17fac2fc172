// What both directions' launchers share.
#pragma once

#include <algorithm>
#include <array>
#include <mutex>

#include "cuda/carver.h"
#include "cuda/launch.cuh"
#include "cuda/visit.cuh"
#include "ops/squeeze_excite/kernels.cuh"
#include "ops/squeeze_excite/product.cuh"

namespace attnkern::squeeze_excite {

// Properties of the current device, with the clusters of `kernel` that fit at one block an SM; asked once a device.
template <class Kernel>
Status plan_device(Kernel kernel, Device& device) {
  static constexpr int kDevices = 64;
  static std::array<std::mutex, kDevices> locks;
  static std::array<bool, kDevices> known;
  static std::array<Device, kDevices> devices;
  int index = 0;
  if (const Status status = current_device(index); !status.ok()) return status;
  if (index >= kDevices) return {"more than 64 CUDA devices"};
  const std::lock_guard lock(locks[index]);
  if (!known[index]) {
    Device& d = devices[index];
    if (const Status status = device_properties(d); !status.ok()) return status;
    for (int i = 0; i < 5; ++i) {
      d.clusters[i] = 0;
      if (i > 0 && d.compute_capability < 90) continue;
      const LaunchConfig config{1 << i, 512, d.shared_bytes_per_block, 1 << i};
      // a size that the device refuses stays at 0: the plan does not use it
      if (!max_active_clusters(kernel, config, d.clusters[i]).ok()) d.clusters[i] = 0;
    }
    known[index] = true;
  }
  device = devices[index];
  return {};
}

inline int64_t counter_count(const Inputs& p) { return 1 + 2 * p.sizes.batch; }

inline Status clear_counters(const Inputs& p, const Workspace& w, void* stream) {
  return fill_bytes(w.counters, 0, counter_count(p) * sizeof(uint32_t), stream);
}

template <class T, bool last, template <class, bool> class StageOf>
Status launch_streamed(const typename StageOf<T, last>::Params& p, const Plan& plan, const Workspace& w, Phase phase,
                       void* stream) {
  if (phase != Phase::rescale)
    if (const Status status = clear_counters(p, w, stream); !status.ok()) return status;
  return launch(squeeze_excite_streamed_kernel<T, last, StageOf>, {plan.grid, plan.threads, plan.shared_bytes}, stream,
                p, plan, w, phase);
}

template <class T, bool last, template <class, bool> class StageOf>
Status launch_resident(const typename StageOf<T, last>::Params& p, const Plan& plan, const Workspace& w, void* stream) {
  return launch(squeeze_excite_resident_kernel<T, last, StageOf>,
                {plan.grid, plan.threads, plan.shared_bytes, plan.cluster}, stream, p, plan, w);
}

// f(T{}, layout) with the element type and, as a type, whether channels are last.
template <class F>
Status visit_map(DType dtype, Layout layout, const F& f) {
  return visit_type(dtype, [&](auto kind) {
    return layout == Layout::channels_last ? f(kind, std::true_type{}) : f(kind, std::false_type{});
  });
}

template <class F>
Status visit_weight_type(DType dtype, const F& f) {
  return visit_type(dtype, f, "CUDA kernels serve weights of float32, bfloat16 and float16");
}

// Matrix products of the MLP, one after another: none, one or two.
struct Products {
  Product list[2];
  int count = 0;
  void add(const Product& product) { list[count++] = product; }

  // Floats that each of them finds room in.
  int64_t workspace(const Device& device) const {
    int64_t floats = 0;
    for (int i = 0; i < count; ++i) floats = std::max(floats, product_workspace(list[i], device.sm_count));
    return floats;
  }
};

// A call's workspace.
struct Carved {
  Workspace kernel;
  float* products;
  size_t bytes;
};

inline Status launch_products(const Inputs& p, const Products& products, const Carved& w, const Device& device,
                              void* stream) {
  for (int i = 0; i < products.count; ++i) {
    const Status status = visit_weight_type(p.weight_dtype, [&](auto weights) {
      return launch_product<decltype(weights)>(products.list[i], device.sm_count, w.products, stream);
    });
    if (!status.ok()) return status;
  }
  return {};
}

// out = in W^T + bias, W [out, in].
inline Product linear(Operand in, const void* weights, const void* bias, int64_t batch, int64_t inputs, int64_t outputs,
                      void* out) {
  return {.a = in,
          .b = {weights, 1, inputs, Operand::weights},
          .m = batch,
          .n = outputs,
          .k = inputs,
          .bias = bias,
          .out = out};
}

inline Product with_act(Product product, const Inputs& p) {
  product.act = p.options.act;
  product.act_slope = p.options.act_slope;
  product.act_weight = p.act_weight;
  product.act_weight_stride = p.act_weight_stride;
  return product;
}

}  // namespace attnkern::squeeze_excite
