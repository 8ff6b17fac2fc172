// Carves a launcher's workspace into arrays: the same calls count its bytes (base null) and hand it out. Plain C++.
#pragma once

#include <cstddef>
#include <cstdint>

namespace attnkern::cuda {

struct Carver {
  void* base;
  size_t bytes = 0;

  // Each array begins at a multiple of 256 bytes, as device memory and the workspace do.
  template <class T>
  T* take(int64_t count) {
    void* const at = base ? static_cast<std::byte*>(base) + bytes : nullptr;
    bytes += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return static_cast<T*>(at);
  }
};

}  // namespace attnkern::cuda
