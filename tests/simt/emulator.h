// A small emulator of the SIMT model: runs kernels written against csrc/cuda on the CPU, one fiber a thread, and checks
// what hardware leaves undefined. This header is the engine and the twin of platform.cuh; memory.h, cluster.h, async.h,
// atomic.h and launch.h are the twins of the other headers.
//
// Happens-before is kept by ticks: a counter that steps at every synchronisation. An access is stamped with the tick
// and its thread; a barrier remembers the tick of its completion, so everything its threads did at earlier ticks is
// ordered.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "core/status.h"
#include "cuda/device.h"
#include "simt/float16.h"

#define ATTNKERN_KERNEL(max_threads, min_blocks) [[maybe_unused]] static void
#define ATTNKERN_DEVICE inline
#define ATTNKERN_DEVICE_CALL inline
#define ATTNKERN_HOST_DEVICE inline
#define ATTNKERN_GRID_CONSTANT

namespace attnkern::simt {

// Where in the kernel a primitive was called; the default argument of every primitive.
struct Site {
  const char* file;
  int line;
  bool operator==(const Site& other) const { return line == other.line && file == other.file; }
};
#define ATTNKERN_SITE ::attnkern::simt::Site site = {__builtin_FILE(), __builtin_LINE()}

// What the shadow knows of one byte.
struct Cell {
  uint32_t write_tick, write_thread;
  uint32_t read_tick[2], read_thread[2];  // the last two readers that differ
  uint16_t write_site, read_site;
  bool initialised, pending;  // pending: an asynchronous copy owns it
  uint16_t unused;            // no padding: cells are compared as bytes
};

using Clock =
    std::unordered_map<uint64_t, uint32_t>;  // block, thread or copy engine -> tick before which all is visible

struct Block;
struct Cluster;

enum class Wait : uint8_t { none, warp, block, cluster, counter, copy_barrier };

struct PendingCopy {
  uint32_t offset, bytes;
  const void* from;
};

struct Thread {
  jmp_buf context;
  void* stack = nullptr;
  Block* block = nullptr;
  int index = 0;
  uint32_t id = 0;  // in the launch; names the thread in shadow cells
  bool exited = false;
  Wait wait = Wait::none;
  Site site{};
  // warp exchange
  int operation = 0;
  int source_lane = 0;
  uint64_t value = 0, result = 0;
  // cluster barrier: arrivals and waits so far, and the ticks of the last arrivals
  uint32_t cluster_arrived = 0, cluster_waited = 0;
  uint32_t arrive_tick[4] = {};
  // spins
  const uint32_t* counter = nullptr;
  uint32_t target = 0;
  uint32_t copy_barrier = 0;
  int parity = 0;
  Clock known;  // acquired since the last block barrier
  std::vector<std::vector<PendingCopy>> copy_groups;
  std::vector<PendingCopy> copies;  // not yet committed
};

struct Warp {
  uint32_t fragments[32][6];  // of a matrix product under way
  uint32_t synced = 0;        // tick of the last barrier
  int arrived = 0;
};

struct CopyBarrierState {
  bool initialised = false;
  uint32_t init_tick = 0, init_thread = 0;
  int arrivals_left = 1;
  int64_t bytes_left = 0;
  uint32_t phase = 0;
  uint32_t completed_tick = 0;
  std::vector<PendingCopy> copies;
};

struct RemoteAccess {
  uint32_t tick;
  Site site;
};

struct Block {
  Cluster* cluster = nullptr;
  int index = 0, rank = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  uint32_t synced = 0;
  int arrived = 0, exited = 0;
  Clock known;
  std::vector<unsigned char> shared;
  std::vector<Cell> cells;
  std::map<uint32_t, CopyBarrierState> copy_barriers;
  std::unordered_map<uint32_t, RemoteAccess> remote;  // by thread of another block
};

struct Cluster {
  std::vector<Block> blocks;
  int arrived = 0, exited = 0;
  uint32_t phase = 0;  // completed barriers
};

extern Thread* self;  // the running thread

[[noreturn]] void fault(const std::string& what, Site site);

// Warp operations: 0 sync, 1 shuffle, 2 ballot.
uint64_t warp_exchange(int operation, uint64_t value, int source_lane, Site site);
void block_barrier(Site site);
void cluster_arrive(Site site);
void cluster_wait(Site site);

// Checks an access of the running thread to `owner`'s shared memory and records it; returns the bytes.
unsigned char* shared_access(Block& owner, uint32_t offset, uint32_t bytes, bool write, Site site);
// The same in global memory.
void global_access(const void* address, size_t bytes, bool write, Site site);

void copy_issue(uint32_t offset, const void* from, Site site);
void copy_commit();
void copy_wait(int pending, Site site);
void copy_barrier_init(uint32_t offset, Site site);
void copy_barrier_expect(uint32_t offset, int bytes, Site site);
void copy_barrier_wait(uint32_t offset, int parity, Site site);
void bulk_copy(uint32_t offset, uint32_t bytes, const void* from, uint32_t barrier, Site site);

uint32_t atomic_add(uint32_t* counter, uint32_t value, Site site);
uint32_t load_acquire(const uint32_t* flag, Site site);
void store_release(uint32_t* flag, uint32_t value, Site site);
void wait_until_at_least(const uint32_t* counter, uint32_t value, Site site);

// ---- the host's side ----

struct Settings {
  uint64_t seed = 0;
  cuda::DeviceProperties device;
};
Settings& settings();

// Device memory, apart from all other; uninitialised. Kernels may touch nothing else.
void* allocate(size_t bytes, const char* name);
void release(void* memory);
void upload(void* to, const void* from, size_t bytes);  // marks it initialised
size_t uninitialised_bytes(const void* memory, size_t bytes);

struct Shape {
  int64_t grid;
  int block, shared_bytes, cluster;
  bool cooperative;
};
Status run(const Shape& shape, const std::function<void()>& kernel);
int64_t resident_blocks(int block, int shared_bytes);
Status fill(void* memory, int value, size_t bytes);
Status copy(void* to, const void* from, size_t bytes);

int grid_size();

}  // namespace attnkern::simt

namespace attnkern::cuda {

using float16 = simt::Float16;
using bfloat16 = simt::BFloat16;

inline int thread_index() { return simt::self->index; }
inline int block_size() { return static_cast<int>(simt::self->block->threads.size()); }
inline int block_index() { return simt::self->block->index; }
inline int grid_size() { return simt::grid_size(); }
inline int lane_id() { return thread_index() & 31; }
inline int warp_id() { return thread_index() >> 5; }
inline int warp_count() { return block_size() >> 5; }

inline void block_sync(ATTNKERN_SITE) { simt::block_barrier(site); }
inline void warp_sync(ATTNKERN_SITE) { simt::warp_exchange(0, 0, 0, site); }

template <class T>
T shuffle(T value, int lane, ATTNKERN_SITE) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = simt::warp_exchange(1, bits, lane & 31, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
T shuffle_xor(T value, int mask, ATTNKERN_SITE) {
  return shuffle(value, lane_id() ^ mask, site);
}
inline uint32_t warp_ballot(bool predicate, ATTNKERN_SITE) {
  return static_cast<uint32_t>(simt::warp_exchange(2, predicate, 0, site));
}

}  // namespace attnkern::cuda
