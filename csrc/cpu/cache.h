// Sizes of this processor's caches.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>

namespace attnkern::cpu {

inline int64_t l2_bytes() {
  static const int64_t bytes = [] {
    const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return found > 0 ? int64_t{found} : int64_t{1} << 20;
  }();
  return bytes;
}

// The part of the last-level cache that some cores share: glibc adds up a package's, 384 MB on an EPYC of 32 MB parts.
inline int64_t l3_bytes() {
  static const int64_t bytes = [] {
    const long found = sysconf(_SC_LEVEL3_CACHE_SIZE);
    return std::clamp<int64_t>(found, int64_t{16} << 20, int64_t{32} << 20);
  }();
  return bytes;
}

}  // namespace attnkern::cpu
