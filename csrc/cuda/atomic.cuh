// Tickets and flags in global memory between blocks of one grid.
#pragma once

#include "cuda/platform.cuh"

#ifdef ATTNKERN_SIMT

#include "simt/atomic.h"

#else

namespace attnkern::cuda {

// Adds and returns the old value; orders this thread's earlier accesses before, its later ones after (acq_rel, device
// scope).
ATTNKERN_DEVICE uint32_t atomic_add(uint32_t* counter, uint32_t value) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(value) : "memory");
  return old;
}

ATTNKERN_DEVICE uint32_t load_acquire(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

ATTNKERN_DEVICE void store_release(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

// Spins until *counter >= value. One thread waits, then the block synchronises. Blocks wait only for blocks that have
// surely started: those with a lower ticket, or any in a cooperative launch.
ATTNKERN_DEVICE void wait_until_at_least(const uint32_t* counter, uint32_t value) {
  while (load_acquire(counter) < value) __nanosleep(32);
}

}  // namespace attnkern::cuda

#endif
