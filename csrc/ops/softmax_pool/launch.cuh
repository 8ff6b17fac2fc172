// What both directions' launchers share.
#pragma once

#include "cuda/carver.h"
#include "cuda/launch.cuh"
#include "cuda/visit.cuh"
#include "ops/softmax_pool/product.cuh"

namespace attnkern::softmax_pool {

// f(T{}, scorer) with the scorer that the plan chose.
template <class F>
Status visit_scorer(DType dtype, Scorer scorer, const Plan& plan, const F& f) {
  return visit_type(dtype, [&](auto type) -> Status {
    switch (scorer) {
      case Scorer::given:
        return f(type, GivenScorer{});
      case Scorer::dot:
        return plan.held ? f(type, DotScorer{}) : f(type, DotManyScorer{});
      case Scorer::additive:
        return f(type, AdditiveScorer{});
      default:
        if constexpr (sizeof(type) == 2)
          if (plan.product) return f(type, GatedProductScorer{});
        return f(type, GatedScorer{});
    }
  });
}

template <class T>
Status launch_pack(const Inputs& p, const Plan& plan, T* packed, void* stream) {
  const int64_t threads = packed_size(p.sizes.hidden, plan.value_width) / 8;
  return launch(softmax_pool_pack_kernel<T>, {(threads + kProductThreads - 1) / kProductThreads, kProductThreads},
                stream, static_cast<const T*>(p.V), static_cast<const T*>(p.U), p.sizes.hidden, p.sizes.features,
                plan.value_width, packed);
}

inline bool fits(const Plan& plan, const cuda::DeviceProperties& device) {
  return plan.block_queries > 0 && plan.shared_bytes <= device.shared_bytes_per_block;
}

constexpr Status kTooLarge{"items of so many features do not fit the shared memory of this device"};

}  // namespace attnkern::softmax_pool
