// What both directions' launchers share.
#pragma once

#include "cuda/launch.cuh"
#include "ops/softmax_pool/scorers.cuh"

namespace attnkern::softmax_pool {

// Carves the workspace: the same calls count its bytes (base null) and hand it out.
struct Carver {
  char* base;
  size_t bytes = 0;

  template <class T>
  T* take(int64_t count) {
    T* const at = base ? reinterpret_cast<T*>(base + bytes) : nullptr;
    bytes += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return at;
  }
};

// f(T{}) with the element type.
template <class F>
Status visit_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32:
      return f(float{});
    case DType::bfloat16:
      return f(bfloat16{});
    case DType::float16:
      return f(float16{});
    default:
      return {"CUDA kernels serve float32, bfloat16 and float16"};
  }
}

template <class F>
Status visit_scorer(Scorer scorer, const F& f) {
  switch (scorer) {
    case Scorer::given:
      return f(GivenScorer{});
    case Scorer::dot:
      return f(DotScorer{});
    case Scorer::additive:
      return f(AdditiveScorer{});
    default:
      return f(GatedScorer{});
  }
}

inline bool fits(const Plan& plan, const cuda::DeviceProperties& device) {
  return plan.block_queries > 0 && plan.shared_bytes <= device.shared_bytes_per_block;
}

constexpr Status kTooLarge{"items of so many features do not fit the shared memory of this device"};

}  // namespace attnkern::softmax_pool
