// Launches and device properties: errors come back as Status, nothing synchronises, throws or prints.
#pragma once

#include "core/status.h"
#include "cuda/device.h"
#include "cuda/platform.cuh"

namespace attnkern::cuda {

struct LaunchConfig {
  int64_t grid;              // blocks, a multiple of cluster; 0 launches nothing
  int block;                 // threads, a multiple of 32
  int shared_bytes = 0;      // dynamic
  int cluster = 1;           // blocks a cluster, up to 16 on sm_90
  bool cooperative = false;  // all blocks resident at once, or an error
};

}  // namespace attnkern::cuda

#ifdef ATTNKERN_SIMT

#include "simt/launch.h"

#else

#include <array>
#include <mutex>

namespace attnkern::cuda {

inline Status status_of(cudaError_t error) {
  if (error == cudaSuccess) return {};
  (void)cudaGetLastError();  // not left behind for the caller's next check
  return {cudaGetErrorString(error)};
}

namespace detail {

// `attributes` must outlive the returned configuration.
inline cudaLaunchConfig_t native_config(const LaunchConfig& config, void* stream,
                                        std::array<cudaLaunchAttribute, 2>& attributes) {
  cudaLaunchConfig_t native{};
  native.gridDim = dim3(static_cast<unsigned>(config.grid));
  native.blockDim = dim3(static_cast<unsigned>(config.block));
  native.dynamicSmemBytes = static_cast<size_t>(config.shared_bytes);
  native.stream = static_cast<cudaStream_t>(stream);
  native.attrs = attributes.data();
  if (config.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[native.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(config.cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  if (config.cooperative) {
    cudaLaunchAttribute& attribute = attributes[native.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  return native;
}

// What a kernel must be told once before it may use so much shared memory or so large a cluster.
template <class... Parameters>
Status prepare(void (*kernel)(Parameters...), const LaunchConfig& config) {
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (config.shared_bytes > 48 * 1024)
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, config.shared_bytes);
  if (error == cudaSuccess && config.cluster > 8)
    error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return status_of(error);
}

}  // namespace detail

// `stream` is a cudaStream_t of the current device.
template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), const LaunchConfig& config, void* stream, Arguments&&... arguments) {
  if (config.grid == 0) return {};
  if (config.grid > INT32_MAX) return {"a grid of more than 2^31 - 1 blocks"};
  if (const Status status = detail::prepare(kernel, config); !status.ok()) return status;
  std::array<cudaLaunchAttribute, 2> attributes;
  const cudaLaunchConfig_t native = detail::native_config(config, stream, attributes);
  return status_of(cudaLaunchKernelEx(&native, kernel, static_cast<Parameters>(arguments)...));
}

// Sets `bytes` of device memory to `value` in stream order.
inline Status fill_bytes(void* memory, int value, size_t bytes, void* stream) {
  return bytes ? status_of(cudaMemsetAsync(memory, value, bytes, static_cast<cudaStream_t>(stream))) : Status{};
}

// The same for a copy within device memory.
inline Status copy_bytes(void* to, const void* from, size_t bytes, void* stream) {
  return bytes
             ? status_of(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream)))
             : Status{};
}

inline Status current_device(int& index) { return status_of(cudaGetDevice(&index)); }

// Of the current device; asked once a device.
inline Status device_properties(DeviceProperties& properties) {
  static constexpr int kDevices = 64;
  static std::array<std::once_flag, kDevices> once;
  static std::array<DeviceProperties, kDevices> known;
  static std::array<Status, kDevices> outcome;
  int device = 0;
  if (const Status status = current_device(device); !status.ok()) return status;
  if (device >= kDevices) return {"more than 64 CUDA devices"};
  std::call_once(once[device], [device] {
    cudaError_t error = cudaSuccess;
    const auto ask = [&](cudaDeviceAttr attribute) {
      int value = 0;
      if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
      return value;
    };
    DeviceProperties& p = known[device];
    p.compute_capability = 10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor);
    p.sm_count = ask(cudaDevAttrMultiProcessorCount);
    p.shared_bytes_per_block = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    p.shared_bytes_per_sm = ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    p.threads_per_sm = ask(cudaDevAttrMaxThreadsPerMultiProcessor);
    p.l2_bytes = ask(cudaDevAttrL2CacheSize);
    outcome[device] = status_of(error);
  });
  properties = known[device];
  return outcome[device];
}

// Clusters (blocks, where config.cluster is 1) of this kernel resident at once on the current device; 0 if it cannot
// run.
template <class... Parameters>
Status max_active_clusters(void (*kernel)(Parameters...), const LaunchConfig& config, int& clusters) {
  clusters = 0;
  if (const Status status = detail::prepare(kernel, config); !status.ok()) return status;
  if (config.cluster > 1) {
    std::array<cudaLaunchAttribute, 2> attributes;
    const cudaLaunchConfig_t native = detail::native_config(config, nullptr, attributes);
    return status_of(cudaOccupancyMaxActiveClusters(&clusters, kernel, &native));
  }
  DeviceProperties properties;
  if (const Status status = device_properties(properties); !status.ok()) return status;
  int blocks = 0;
  const Status status = status_of(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &blocks, kernel, config.block, static_cast<size_t>(config.shared_bytes)));
  clusters = blocks * properties.sm_count;
  return status;
}

}  // namespace attnkern::cuda

#endif
