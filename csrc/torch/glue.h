// The only header that sees torch: what register.cpp files share, on LibTorch's stable ABI (torch >= 2.10).
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>

#include "core/dtype.h"
#include "core/parallel.h"
#include "core/poison.h"
#include "core/status.h"

namespace attnkern::glue {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using ScalarType = torch::headeronly::ScalarType;

// attnkern/_layout.py's rule for x [B, C, ...]: channels first when the spatial dims merge into one of stride 1.
inline bool is_channels_last(const Tensor& x) {
  int64_t expected = 1;
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    if (x.size(d) != 1 && x.stride(d) != expected) return true;
    expected *= x.size(d);
  }
  return false;
}

// Of x channels last: the spatial dims merge into one of this stride.
inline int64_t position_stride(const Tensor& x) {
  for (int64_t d = x.dim() - 1; d >= 2; --d)
    if (x.size(d) != 1) return x.stride(d);
  return x.size(1);
}

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

// Fresh CPU memory straight from the allocator: through the dispatcher each tensor costs 0.8 us more.
inline Tensor empty_cpu(size_t dims, const int64_t* sizes, const int64_t* strides, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(dims), sizes, strides,
                                                  static_cast<int32_t>(dtype), aoti_torch_device_type_cpu(), 0,
                                                  &handle));
  Tensor fresh(handle);
  if (poison_fresh_memory && fresh.numel()) {
    int64_t bytes = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle, &bytes));
    std::memset(fresh.mutable_data_ptr(), 0xff, static_cast<size_t>(bytes));  // NaN in every floating type
  }
  return fresh;
}

// On the device of `x`.
template <size_t N>
Tensor empty(const Tensor& x, const std::array<int64_t, N>& sizes, ScalarType dtype) {
  if (!x.is_cpu()) return torch::stable::new_empty(x, sizes, dtype);
  std::array<int64_t, N> strides;
  int64_t stride = 1;
  for (size_t d = N; d-- > 0; stride *= sizes[d]) strides[d] = stride;
  return empty_cpu(N, sizes.data(), strides.data(), dtype);
}

// In the memory format of `x`, whose elements do not overlap.
inline Tensor empty_like(const Tensor& x) {
  if (!x.is_cpu()) return torch::stable::empty_like(x);
  int64_t *sizes = nullptr, *strides = nullptr, last = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(x.get(), &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(x.get(), &strides));
  for (int64_t d = 0; d < x.dim(); ++d) last += (sizes[d] - 1) * strides[d];
  const bool dense = last + 1 == x.numel();
  return dense ? empty_cpu(static_cast<size_t>(x.dim()), sizes, strides, x.scalar_type())
               : torch::stable::empty_like(x);
}

inline Tensor nothing(const Tensor& x, ScalarType dtype) { return empty(x, std::array<int64_t, 1>{0}, dtype); }
inline Tensor nothing(const Tensor& x) { return nothing(x, x.scalar_type()); }

// An output of the shape, dtype and memory format of `like`, or an empty tensor where it is not wanted.
inline Tensor output_like(const MaybeTensor& like, bool wanted, const Tensor& x) {
  return like.has_value() && wanted ? glue::empty_like(*like) : nothing(x);
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

// A launcher of params.h, and what tells the bytes of workspace that it wants; null where Params have none.
template <class Params>
struct CpuLauncher {
  Status (*launch)(const Params&, const ThreadPool&);
  size_t (*workspace)(const Params&, const ThreadPool&) = nullptr;
};
template <class Params>
struct CudaLauncher {
  Status (*launch)(const Params&, void* stream) = nullptr;
  size_t (*workspace)(const Params&) = nullptr;
};

// Names of functions that a build without CUDA has not: its linker would look for them in vain.
#ifdef ATTNKERN_WITH_CUDA
#define ATTNKERN_CUDA(...) __VA_ARGS__
#else
#define ATTNKERN_CUDA(...)
#endif

// Fresh memory beside x, that the caller holds until the launch.
template <class Params>
Tensor give_workspace(Params& p, const Tensor& x, size_t bytes) {
  Tensor workspace = empty(x, std::array<int64_t, 1>{static_cast<int64_t>(bytes)}, ScalarType::Byte);
  p.workspace = mutable_or_null(workspace);
  return workspace;
}

// Launches `op` on the device of x, by `cuda` where that is a GPU: {ATTNKERN_CUDA(...)}.
template <class Params>
void launch(const char* op, Params& p, const Tensor& x, std::type_identity_t<CpuLauncher<Params>> cpu,
            [[maybe_unused]] std::type_identity_t<CudaLauncher<Params>> cuda) {
  MaybeTensor workspace;
#ifdef ATTNKERN_WITH_CUDA
  if (x.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    if constexpr (requires { p.workspace; }) workspace = give_workspace(p, x, cuda.workspace(p));
    return check(cuda.launch(p, current_stream(x)), op);
  }
#endif
  const ThreadPool pool = torch_threads();
  if constexpr (requires { p.workspace; }) workspace = give_workspace(p, x, cpu.workspace(p, pool));
  check(cpu.launch(p, pool), op);
}

}  // namespace attnkern::glue
