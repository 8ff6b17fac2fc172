// Twin of cuda/launch.cuh: a launch runs to its end before it returns, and a fault is the Status.
#pragma once

#include "simt/emulator.h"

namespace attnkern::cuda {

template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), const LaunchConfig& config, void*, Arguments&&... arguments) {
  return simt::run({config.grid, config.block, config.shared_bytes, config.cluster, config.cooperative},
                   [&] { kernel(static_cast<Parameters>(arguments)...); });
}

inline Status fill_bytes(void* memory, int value, size_t bytes, void*) {
  return bytes ? simt::fill(memory, value, bytes) : Status{};
}

inline Status copy_bytes(void* to, const void* from, size_t bytes, void*) {
  return bytes ? simt::copy(to, from, bytes) : Status{};
}

inline Status current_device(int& index) {
  index = 0;
  return {};
}

inline Status device_properties(DeviceProperties& properties) {
  properties = simt::settings().device;
  return {};
}

template <class... Parameters>
Status max_active_clusters(void (*)(Parameters...), const LaunchConfig& config, int& clusters) {
  clusters = static_cast<int>(simt::resident_blocks(config.block, config.shared_bytes) / config.cluster);
  return {};
}

}  // namespace attnkern::cuda
