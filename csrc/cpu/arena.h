// Hands out a launcher's workspace in pieces of whole cache lines; with no base it only counts.
#pragma once

#include <cstddef>
#include <cstdint>

namespace attnkern::cpu {

class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<std::byte*>(base)) {}
  void* take(int64_t elements, int64_t size) {
    void* p = base_ ? base_ + used_ : nullptr;
    used_ += (elements * size + 63) / 64 * 64;
    return p;
  }
  int64_t used() const { return used_; }

 private:
  std::byte* base_;
  int64_t used_ = 0;
};

}  // namespace attnkern::cpu
