// What a launch plan may ask of a device. Plain C++: plans are pure functions of these numbers.
#pragma once

#include <cstdint>

namespace attnkern::cuda {

struct DeviceProperties {
  int compute_capability = 90;  // 10 major + minor
  int sm_count = 132;
  int shared_bytes_per_block = 227 * 1024;  // the opt-in limit
  int shared_bytes_per_sm = 228 * 1024;     // of which each resident block costs 1 KB more than it asks for
  int threads_per_sm = 2048;
  int64_t l2_bytes = 60ll << 20;
};

}  // namespace attnkern::cuda
