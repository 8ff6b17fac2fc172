// Copies from global to shared memory that run beside the thread: cp.async (sm_80) and bulk copies on an mbarrier
// (sm_90).
#pragma once

#include "cuda/cluster.cuh"

#ifdef ATTNKERN_SIMT

#include "simt/async.h"

#else

namespace attnkern::cuda {

// 16 bytes to to[i], both sides 16-byte aligned. Readable by this thread after async_wait, by others after a barrier on
// top.
template <class T>
ATTNKERN_DEVICE void async_copy(const Shared<T>& to, int i, const T* from) {
  const uint32_t address = to.address() + i * static_cast<uint32_t>(sizeof(T));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}

ATTNKERN_DEVICE void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `pending` of this thread's committed groups are under way.
template <int pending = 0>
ATTNKERN_DEVICE void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// A barrier of one arrival in shared memory on which bulk copies report their bytes. One thread initialises it, then
// the block synchronises. Phases alternate in parity, 0 first. sm_90 and later: below it nothing may call this.
struct CopyBarrier {
  Shared<uint64_t> word;

  ATTNKERN_DEVICE void init() const {
#if ATTNKERN_HAS_CLUSTERS
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(word.address()) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
  }
  // One thread a phase, before its copies: the bytes that complete the phase.
  ATTNKERN_DEVICE void expect(int bytes) const {
#if ATTNKERN_HAS_CLUSTERS
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(word.address()), "r"(bytes) : "memory");
#endif
  }
  ATTNKERN_DEVICE void wait(int parity) const {
#if ATTNKERN_HAS_CLUSTERS
    asm volatile(
        "{\n .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        " @!done bra again;\n}" ::"r"(word.address()),
        "r"(parity)
        : "memory");
#endif
  }
};

// `count` elements to to[i] by one thread: both sides 16-byte aligned, a multiple of 16 bytes. Reading to[] again after
// it was read by threads needs async_fence() by them and a barrier before the copy.
template <class T>
ATTNKERN_DEVICE void bulk_copy(const Shared<T>& to, int i, const T* from, int count, const CopyBarrier& barrier) {
#if ATTNKERN_HAS_CLUSTERS
  const uint32_t address = to.address() + i * static_cast<uint32_t>(sizeof(T));
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address),
               "l"(from), "r"(count * static_cast<int>(sizeof(T))), "r"(barrier.word.address())
               : "memory");
#endif
}

// Orders this thread's accesses to shared memory before later bulk copies.
ATTNKERN_DEVICE void async_fence() {
#if ATTNKERN_HAS_CLUSTERS
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace attnkern::cuda

#endif
