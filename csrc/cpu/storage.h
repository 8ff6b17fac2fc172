// Storage types of tensors on the CPU, and the type that each accumulates in.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/dtype.h"

namespace attnkern::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Two bfloat16 that follow one another in a sum: a product of pairs adds both terms at once. The first is the low half.
// Rows of bfloat16 are read as rows of pairs, hence may_alias.
struct __attribute__((may_alias)) Pair {
  uint32_t bits;
};

template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// f(T{}) for the storage type T of `dtype`.
template <class F>
void visit(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32:
      return f(float{});
    case DType::float64:
      return f(double{});
    case DType::bfloat16:
      return f(BFloat16{});
    case DType::float16:
      return f(Float16{});
  }
}

}  // namespace attnkern::cpu
