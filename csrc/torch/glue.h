// The only header that sees torch: what register.cpp files share, on LibTorch's stable ABI (torch >= 2.10).
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>

#include "core/dtype.h"
#include "core/parallel.h"
#include "core/status.h"

namespace attnkern::glue {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using ScalarType = torch::headeronly::ScalarType;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      STD_TORCH_CHECK(false, "attnkern: a kernel was called with a dtype it does not serve");
  }
}

inline ScalarType accumulation_scalar(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline const void* data_or_null(const MaybeTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

inline const void* data_or_null(const Tensor& tensor) { return tensor.numel() ? tensor.const_data_ptr() : nullptr; }

inline void* mutable_or_null(Tensor& tensor) { return tensor.numel() ? tensor.mutable_data_ptr() : nullptr; }

inline Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, std::array<int64_t, 1>{0}); }

// An output of the shape, dtype and memory format of `like`, or an empty tensor where it is not wanted.
inline Tensor output_like(const MaybeTensor& like, bool wanted, const Tensor& x) {
  return like.has_value() && wanted ? torch::stable::empty_like(*like) : nothing(x);
}

// The value that `name` has in `names`: names[i] is the spelling of enumerator i.
template <class Enum, size_t N>
Enum parse(std::string_view name, const std::array<std::string_view, N>& names) {
  for (size_t i = 0; i < N; ++i)
    if (names[i] == name) return static_cast<Enum>(i);
  STD_TORCH_CHECK(false, "attnkern: unknown option '", std::string(name), "'");
}

inline void check(const Status& status, const char* op) { STD_TORCH_CHECK(status.ok(), op, ": ", status.message); }

inline ThreadPool torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t n, int64_t grain, ThreadPool::Body body, void* context) {
            torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { body(begin, end, context); });
          }};
}

inline void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
#ifdef ATTNKERN_WITH_CUDA
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
#else
  (void)tensor;
#endif
  return stream;
}

inline Tensor bytes(const Tensor& like, size_t size) {
  return torch::stable::new_empty(like, std::array<int64_t, 1>{static_cast<int64_t>(size)}, ScalarType::Byte);
}

}  // namespace attnkern::glue
