// Element types of tensors. From the run-time value to a C++ type lead cpu/storage.h and cuda/visit.cuh.
#pragma once

#include <cstdint>

namespace attnkern {

enum class DType : int { float32, float64, bfloat16, float16 };

constexpr int size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// Accumulation, and everything of size [B, C], is in float; in double for double tensors.
constexpr DType accumulation(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

}  // namespace attnkern
