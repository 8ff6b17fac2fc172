// The thread pool a CPU launcher runs on, handed in by the caller: torch's own pool in the extension, one thread in
// tests.
#pragma once

#include <cstdint>

namespace attnkern {

struct ThreadPool {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  int threads;
  // Splits [0, n) into at most `threads` ranges of at least `grain` items and runs them; returns when all are done.
  void (*run)(int64_t n, int64_t grain, Body body, void* context);

  template <class F>
  void parallel_for(int64_t n, int64_t grain, const F& f) const {
    run(
        n, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
        const_cast<F*>(&f));
  }
};

}  // namespace attnkern
