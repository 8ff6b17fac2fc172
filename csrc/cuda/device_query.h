// The device that a plan is asked about. Plain C++.
#pragma once

#include "core/plan_registry.h"
#include "cuda/device.h"

namespace attnkern::cuda {

inline DeviceProperties device_of(const PlanQuery& query) {
  DeviceProperties d;
  d.compute_capability = query.get<int>("compute_capability", d.compute_capability);
  d.sm_count = query.get<int>("sm_count", d.sm_count);
  d.shared_bytes_per_block = query.get<int>("shared_per_block", d.shared_bytes_per_block);
  d.shared_bytes_per_sm = query.get<int>("shared_per_sm", d.shared_bytes_per_block + 1024);
  d.l2_bytes = query.get("l2_bytes", d.l2_bytes);
  return d;
}

}  // namespace attnkern::cuda
