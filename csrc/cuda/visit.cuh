// From the run-time element type to the C++ type, once for all launchers: no kernel accumulates in double, so a tensor
// of float64 is refused here.
#pragma once

#include "core/dtype.h"
#include "core/status.h"
#include "cuda/platform.cuh"

namespace attnkern::cuda {

// f(T{}) with the element type; `refusal` where no kernel serves it.
template <class F>
Status visit_type(DType dtype, const F& f, const char* refusal = "CUDA kernels serve float32, bfloat16 and float16") {
  switch (dtype) {
    case DType::float32:
      return f(float{});
    case DType::bfloat16:
      return f(bfloat16{});
    case DType::float16:
      return f(float16{});
    default:
      return {refusal};
  }
}

}  // namespace attnkern::cuda
