// Tests fill fresh memory, so that an element that no kernel writes shows.
#pragma once

#include <atomic>

namespace attnkern {

inline std::atomic<bool> poison_fresh_memory{false};

}  // namespace attnkern
