// What emulator.cpp and memory.cpp share.
#pragma once

#include <deque>
#include <memory>
#include <random>

#include "simt/emulator.h"

namespace attnkern::simt {

struct Engine {
  jmp_buf host;
  Shape shape;
  const std::function<void()>* kernel = nullptr;
  int policy = 0;
  std::mt19937_64 random;
  uint32_t tick = 0, launch_tick = 0;
  std::deque<Thread*> ready;
  std::vector<Thread*> spinning;
  std::vector<std::unique_ptr<Cluster>> live;
  std::vector<int64_t> order;  // clusters not yet started
  int64_t resident = 1;
  uint64_t progress = 0, polled_at = 0, polls = 0;
  std::unordered_map<const void*, Clock> released;  // by counter
  Status outcome;
};
extern Engine engine;

inline uint64_t block_key(int block) { return static_cast<uint64_t>(block) << 32; }
inline uint64_t thread_key(uint32_t id) { return id; }
inline uint32_t copy_engine_id(int block) { return 0x80000000u | static_cast<uint32_t>(block); }

std::string describe(Site site);
[[noreturn]] void thread_exit();
void check_remote_readers_done(const Block& block);
void counter_access(const uint32_t* counter, bool write, Site site);
void wait_for_copies(uint32_t barrier, int parity, Site site);
void wake_copy_waiters(Block& block, uint32_t barrier);

}  // namespace attnkern::simt
