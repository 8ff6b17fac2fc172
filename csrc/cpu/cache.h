// Sizes of this processor's caches.
#pragma once

#include <unistd.h>

#include <cstdint>

namespace attnkern::cpu {

inline int64_t l3_bytes() {
  static const int64_t bytes = [] {
    const long found = sysconf(_SC_LEVEL3_CACHE_SIZE);
    return found > 0 ? int64_t{found} : int64_t{16} << 20;
  }();
  return bytes;
}

}  // namespace attnkern::cpu
