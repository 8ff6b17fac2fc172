// Twin of cuda/async.cuh.
#pragma once

#include "simt/memory.h"

namespace attnkern::cuda {

template <class T>
void async_copy(const Shared<T>& to, int i, const T* from, ATTNKERN_SITE) {
  simt::copy_issue(to.byte(i, 16 / sizeof(T), 16, site), from, site);
}
inline void async_commit() { simt::copy_commit(); }
template <int pending = 0>
void async_wait(ATTNKERN_SITE) {
  simt::copy_wait(pending, site);
}

struct CopyBarrier {
  Shared<uint64_t> word;

  void init(ATTNKERN_SITE) const { simt::copy_barrier_init(word.offset, site); }
  void expect(int bytes, ATTNKERN_SITE) const { simt::copy_barrier_expect(word.offset, bytes, site); }
  void wait(int parity, ATTNKERN_SITE) const { simt::copy_barrier_wait(word.offset, parity, site); }
};

template <class T>
void bulk_copy(const Shared<T>& to, int i, const T* from, int count, const CopyBarrier& barrier, ATTNKERN_SITE) {
  const uint32_t bytes = static_cast<uint32_t>(count) * sizeof(T);
  simt::bulk_copy(to.byte(i, count, 16, site), bytes, from, barrier.word.offset, site);
}

inline void async_fence() {}

}  // namespace attnkern::cuda
