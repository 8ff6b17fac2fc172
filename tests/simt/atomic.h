// Twin of cuda/atomic.cuh.
#pragma once

#include "simt/emulator.h"

namespace attnkern::cuda {

inline uint32_t atomic_add(uint32_t* counter, uint32_t value, ATTNKERN_SITE) {
  return simt::atomic_add(counter, value, site);
}
inline uint32_t load_acquire(const uint32_t* flag, ATTNKERN_SITE) { return simt::load_acquire(flag, site); }
inline void store_release(uint32_t* flag, uint32_t value, ATTNKERN_SITE) { simt::store_release(flag, value, site); }
inline void wait_until_at_least(const uint32_t* counter, uint32_t value, ATTNKERN_SITE) {
  simt::wait_until_at_least(counter, value, site);
}

}  // namespace attnkern::cuda
