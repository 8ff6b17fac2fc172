// How CPU launchers share work among threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "core/parallel.h"

namespace attnkern::cpu {

constexpr int64_t kGrainBytes = 1 << 16;  // of maps a thread should get, 5 us of work against 5 us to wake it

// Threads for so many items that are worth reading so many bytes of maps.
inline int64_t lanes_for(const ThreadPool& pool, int64_t items, int64_t bytes) {
  return std::max<int64_t>(1, std::min({static_cast<int64_t>(pool.threads), items, bytes / kGrainBytes}));
}

// f(i, lane) for i < n on at most `lanes` threads of the pool, each on the next item that is free.
template <class F>
void share(const ThreadPool& pool, int64_t lanes, int64_t n, const F& f) {
  lanes = std::min(lanes, n);
  if (lanes <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i, int64_t{0});
    return;
  }
  std::atomic<int64_t> next{0};
  pool.parallel_for(lanes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t lane = begin; lane < end; ++lane)
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i, lane);
  });
}

}  // namespace attnkern::cpu
