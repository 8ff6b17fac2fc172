// Kernels that use every primitive, each with a fault that can be planted: test_simt.py wants the clean one to pass and
// the planted one reported, under every schedule.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "cuda/activation.cuh"
#include "cuda/async.cuh"
#include "cuda/atomic.cuh"
#include "cuda/cluster.cuh"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/reduce.cuh"

using namespace attnkern;
using namespace attnkern::cuda;

namespace {

constexpr int kThreads = 64;

// Device arrays of a test: input[i] = i + 1; output and counters (zero).
struct Arrays {
  float* input;
  float* output;
  uint32_t* counter;
};
constexpr int kElements = 1024;

ATTNKERN_DEVICE void copy_through(const Arrays& a, int i, float value) { store_global(a.output + i, value); }

ATTNKERN_KERNEL(64, 1) neighbour_kernel(Arrays a, bool planted) {
  SharedArena arena;
  const Shared<float> tile = arena.take<float>(kThreads);
  const int t = thread_index();
  tile.store(t, 0.0f);
  block_sync();
  tile.store(t, load_global(a.input + t));
  if (!planted) block_sync();
  copy_through(a, t, tile.load((t + 33) % kThreads));
}

ATTNKERN_KERNEL(64, 1) warp_neighbour_kernel(Arrays a, bool planted) {
  SharedArena arena;
  const Shared<float> tile = arena.take<float>(kThreads);
  const int t = thread_index();
  tile.store(t, 0.0f);
  warp_sync();
  tile.store(t, load_global(a.input + t));
  if (!planted) warp_sync();
  copy_through(a, t, tile.load(t ^ 1));
}

ATTNKERN_KERNEL(64, 1) reuse_kernel(Arrays a, bool planted) {
  SharedArena arena;
  const Shared<float> scratch = arena.take<float>(kWarpSize);
  const float first = block_sum(load_global(a.input + thread_index()), scratch);
  if (!planted) block_sync();
  copy_through(a, thread_index(), first + block_sum(1.0f, scratch));
}

ATTNKERN_KERNEL(64, 1) shared_bounds_kernel(Arrays a, bool planted) {
  SharedArena arena;
  const Shared<float> tile = arena.take<float>(kThreads);
  const int t = thread_index();
  tile.store(t, load_global(a.input + t));
  block_sync();
  copy_through(a, t, tile.load(t + (planted && t == 63 ? 1 : 0)));
}

ATTNKERN_KERNEL(64, 1) slice_kernel(Arrays a, bool planted) {
  SharedArena arena;
  const Shared<float> tile = arena.take<float>(kThreads);
  const int t = thread_index();
  const Shared<float> half = tile.slice(planted ? 33 : 32, 32);
  tile.store(t, load_global(a.input + t));
  block_sync();
  copy_through(a, t, half.load(t % 32));
}

ATTNKERN_KERNEL(64, 1) arena_kernel(Arrays a, bool planted) {
  SharedArena arena;
  const Shared<float> tile = arena.take<float>(planted ? 2049 : 2048);
  tile.store(thread_index(), 1.0f);
  copy_through(a, thread_index(), tile.load(thread_index()));
}

ATTNKERN_KERNEL(64, 1) global_bounds_kernel(Arrays a, bool planted) {
  const int t = thread_index();
  store_global(a.output + (planted && t == 5 ? kElements : t), load_global(a.input + t));
}

ATTNKERN_KERNEL(64, 1) global_below_kernel(Arrays a, bool planted) {
  const int t = thread_index();
  copy_through(a, t, load_global(a.input + t - (planted ? 1 : 0)));
}

ATTNKERN_KERNEL(64, 1) shared_uninitialised_kernel(Arrays a, bool planted) {
  SharedArena arena;
  const Shared<float> tile = arena.take<float>(kThreads);
  const int t = thread_index();
  if (!planted || t != 40) tile.store(t, load_global(a.input + t));
  block_sync();
  copy_through(a, t, tile.load(63 - t));
}

ATTNKERN_KERNEL(64, 1) global_uninitialised_kernel(Arrays a, bool planted) {
  const int t = thread_index();
  copy_through(a, t, load_global((planted && t == 9 ? a.output : a.input) + t));
}

ATTNKERN_KERNEL(64, 1) alignment_kernel(Arrays a, bool planted) {
  const int t = thread_index();
  store_global_vec(a.output + 4 * t, load_global_vec<4>(a.input + 4 * t + (planted ? 1 : 0)));
}

ATTNKERN_KERNEL(64, 1) block_race_kernel(Arrays a, bool planted) {
  if (thread_index() == 0) copy_through(a, planted ? 0 : block_index(), 1.0f);
}

// Four blocks sum the input: warps, block, then an exchange of partial sums through the cluster.
ATTNKERN_KERNEL(64, 1) cluster_sum_kernel(Arrays a, int fault) {
  SharedArena arena;
  const Shared<float> scratch = arena.take<float>(kWarpSize);
  const Shared<float> partial = arena.take<float>(8);
  const int t = thread_index(), rank = cluster_rank();
  const float own = block_sum(load_global(a.input + block_index() * kThreads + t), scratch);
  if (t == 0) partial.store(rank, own);
  if (fault == 1)
    block_sync();  // in place of the cluster's
  else
    cluster_sync();
  float total = 0;
  for (int r = 0; r < cluster_size(); ++r)
    total += remote(partial, fault == 2 ? (r + 1) % cluster_size() : fault == 3 ? r + cluster_size() : r).load(r);
  if (fault != 4) cluster_sync();  // nobody exits while its partial sum is read
  copy_through(a, block_index() * kThreads + t, total);
}

// A second round of writes to what others read in the first.
ATTNKERN_KERNEL(64, 1) cluster_rounds_kernel(Arrays a, bool planted) {
  SharedArena arena;
  const Shared<float> slot = arena.take<float>(1);
  const int t = thread_index(), next = (cluster_rank() + 1) % cluster_size();
  float total = 0;
  cluster_sync();
  for (int round = 0; round < 3; ++round) {
    if (t == 0) remote(slot, next).store(0, static_cast<float>(round));
    cluster_sync();
    total += slot.load(0);
    if (!planted || round == 2) cluster_sync();
  }
  copy_through(a, block_index() * kThreads + t, total);
}

ATTNKERN_KERNEL(64, 1) cluster_first_kernel(Arrays a, bool planted) {
  SharedArena arena;
  const Shared<float> slot = arena.take<float>(1);
  if (!planted) cluster_sync();  // the other blocks have started
  if (thread_index() == 0) remote(slot, (cluster_rank() + 1) % cluster_size()).store(0, 3.0f);
  cluster_sync();
  copy_through(a, block_index() * kThreads + thread_index(), slot.load(0));
}

ATTNKERN_KERNEL(64, 1) split_barrier_kernel(Arrays a, bool planted) {
  SharedArena arena;
  const Shared<float> slot = arena.take<float>(1);
  if (!planted && thread_index() == 0) slot.store(0, 2.0f);
  cluster_arrive();
  if (planted && thread_index() == 0) slot.store(0, 2.0f);
  cluster_wait();
  const float value = remote(slot, (cluster_rank() + 1) % cluster_size()).load(0);
  cluster_sync();
  copy_through(a, block_index() * kThreads + thread_index(), value);
}

ATTNKERN_KERNEL(64, 1) async_kernel(Arrays a, int fault) {
  SharedArena arena;
  const Shared<float> tile = arena.take<float>(2 * 4 * kThreads);
  const int t = thread_index();
  for (int stage = 0; stage < 2; ++stage) {
    async_copy(tile, (stage * kThreads + t) * 4, a.input + (stage * kThreads + t) * 4);
    async_commit();
  }
  if (fault == 1) {
    async_wait<1>();  // leaves the second stage under way
  } else {
    async_wait();
  }
  if (fault != 2) block_sync();
  copy_through(a, t, tile.load(4 * kThreads + (t + 4) % kThreads));
  if (fault == 1) async_wait();
}

ATTNKERN_KERNEL(64, 1) async_exit_kernel(Arrays a, bool planted) {
  SharedArena arena;
  const Shared<float> tile = arena.take<float>(4 * kThreads);
  async_copy(tile, thread_index() * 4, a.input + thread_index() * 4);
  async_commit();
  if (!planted) async_wait();
  copy_through(a, thread_index(), 1.0f);
}

ATTNKERN_KERNEL(64, 1) bulk_kernel(Arrays a, int fault) {
  SharedArena arena;
  const Shared<float> tile = arena.take<float>(256);
  const CopyBarrier barrier{arena.take<uint64_t>(1)};
  const int t = thread_index();
  if (t == 0) barrier.init();
  if (fault != 1) block_sync();
  float total = 0;
  for (int phase = 0; phase < 3; ++phase) {
    if (t == 0) {
      barrier.expect(fault == 2 ? 2048 : 1024);
      bulk_copy(tile, 0, a.input + phase * 256, 256, barrier);
    }
    if (fault != 3) barrier.wait(phase & 1);
    total += tile.load(t * 4);
    if (fault != 4) {
      async_fence();
      block_sync();
    }
  }
  copy_through(a, t, total);
}

ATTNKERN_KERNEL(64, 1) shuffle_exit_kernel(Arrays a, bool planted) {
  const int t = thread_index();
  copy_through(a, t, 1.0f);
  if (planted && t % 32 == 31) return;
  warp_sum(1.0f);
}

ATTNKERN_KERNEL(64, 1) warp_divergence_kernel(Arrays a, bool planted) {
  const int t = thread_index();
  float value = load_global(a.input + t);
  if (planted && t % 2) {
    value = shuffle_xor(value, 2);
  } else {
    value = shuffle_xor(value, 2);
  }
  copy_through(a, t, value);
}

ATTNKERN_KERNEL(64, 1) barrier_divergence_kernel(Arrays a, bool planted) {
  copy_through(a, thread_index(), 1.0f);
  if (planted && warp_id() == 1) {
    block_sync();
  } else {
    block_sync();
  }
}

ATTNKERN_KERNEL(64, 1) barrier_exit_kernel(Arrays a, bool planted) {
  copy_through(a, thread_index(), 1.0f);
  if (planted && warp_id() == 1) return;
  block_sync();
}

// The last block to arrive sums what the others wrote.
ATTNKERN_KERNEL(64, 1) ticket_kernel(Arrays a, int fault) {
  SharedArena arena;
  const Shared<uint32_t> ticket = arena.take<uint32_t>(1);
  const int t = thread_index();
  store_global(a.output + 64 + block_index() * kThreads + t, load_global(a.input + block_index() * kThreads + t));
  if (fault != 1) block_sync();
  if (t == 0) ticket.store(0, atomic_add(a.counter, 1));
  if (fault != 2) block_sync();
  if (ticket.load(0) == static_cast<uint32_t>(grid_size() - 1)) {
    float total = 0;
    for (int b = 0; b < grid_size(); ++b) total += load_global(a.output + 64 + b * kThreads + t);
    copy_through(a, t, total);
  }
}

// Block of ticket n waits for the block of ticket n - 1, which has started; waiting for block n + 1 may never end.
ATTNKERN_KERNEL(64, 1) chain_kernel(Arrays a, int fault) {
  SharedArena arena;
  const Shared<uint32_t> slot = arena.take<uint32_t>(1);
  const int t = thread_index();
  if (t == 0) slot.store(0, atomic_add(a.counter, 1));
  block_sync();
  const uint32_t ticket = slot.load(0);
  if (t == 0 && fault != 2)
    wait_until_at_least(a.counter + 1, fault == 1 ? static_cast<uint32_t>(grid_size()) : ticket);
  block_sync();
  const float before = ticket ? load_global(a.output + (ticket - 1) * kThreads + t) : 0.0f;
  copy_through(a, static_cast<int>(ticket) * kThreads + t, before + 1);
  block_sync();
  if (t == 0) store_release(a.counter + 1, ticket + 1);
}

// All blocks meet at a counter: right only where all are resident.
ATTNKERN_KERNEL(64, 1) meet_kernel(Arrays a, bool) {
  const int t = thread_index();
  copy_through(a, block_index() * kThreads + t, 1.0f);
  block_sync();
  if (t == 0) {
    atomic_add(a.counter, 1);
    wait_until_at_least(a.counter, static_cast<uint32_t>(grid_size()));
  }
  block_sync();
  const float value = load_global(a.output + (block_index() + 1) % grid_size() * kThreads + t);
  store_global(a.output + 512 + block_index() * kThreads + t, value);
}

ATTNKERN_KERNEL(64, 1) poll_kernel(Arrays a, bool planted) {
  if (thread_index() == 0) {
    if (block_index() == 0 && !planted) store_release(a.counter, 1);
    while (load_acquire(a.counter) == 0) {
    }
  }
  copy_through(a, block_index() * kThreads + thread_index(), 1.0f);
}

ATTNKERN_KERNEL(64, 1) values_kernel(Arrays a, bool) {
  SharedArena arena;
  const Shared<float> scratch = arena.take<float>(2 * kWarpSize);
  const int t = thread_index();
  const float x = load_global<Cache::streaming>(a.input + t);
  const Vec<float, 2> sums = block_sum(Vec<float, 2>{{x, 2 * x}}, scratch);
  copy_through(a, t, sums[0]);
  copy_through(a, 64 + t, sums[1]);
  copy_through(a, 128 + t, group_sum<4>(x));
  copy_through(a, 192 + t, static_cast<float>(warp_ballot(t % 3 == 0)));
  copy_through(a, 256 + t, shuffle(x, 7));
  const Vec<bfloat16, 4> pack = narrow<bfloat16>(load_global_vec<4, Cache::keep>(a.input + 4 * t));
  store_global_vec<Cache::streaming>(a.output + 320 + 4 * t, widen(pack));
}

ATTNKERN_HOST_DEVICE int a_at(int row, int k) { return (3 * row + 5 * k) % 7 - 3; }
ATTNKERN_HOST_DEVICE int b_at(int k, int column) { return (2 * k + 3 * column) % 5 - 2; }

// a b, a [16, 16] and b [16, 16], each warp of its own; the second has columns of both as rows.
template <class T>
ATTNKERN_DEVICE void tensor_core(const Arrays& a, int fault, int to) {
  constexpr int stride = 24;
  SharedArena arena;
  const Shared<T> both = arena.take<T>(4 * 16 * stride);
  const Shared<T> left = both.slice(warp_id() * 32 * stride, 16 * stride);
  const Shared<T> right = both.slice((warp_id() * 32 + 16) * stride, 16 * stride);
  warp_sync();  // the call before was read
  for (int i = lane_id(); i < 256; i += kWarpSize) {
    const int row = i / 16, column = i % 16;
    const int of_a = warp_id() == 0 ? a_at(row, column) : a_at(column, row);
    const int of_b = warp_id() == 0 ? b_at(row, column) : b_at(column, row);
    left.store(row * stride + column, narrow<T>(static_cast<float>(of_a)));
    right.store(row * stride + column, narrow<T>(static_cast<float>(of_b)));
  }
  if (fault != 1) warp_sync();
  const int begin = fault == 2 ? 4 : 0;
  const FragmentA f = warp_id() == 0 ? load_a(left, begin, stride) : load_a_transposed(left, begin, stride);
  FragmentB b[2];
  warp_id() == 0 ? load_b(right, 0, stride, b) : load_b_transposed(right, 0, stride, b);
  for (int n = 0; n < 2; ++n) {
    FragmentD d{};
    multiply_add<T>(d, f, b[n]);
    multiply_add<T>(d, f, b[n]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane_id() / 4 + i / 2 * 8, column = 8 * n + lane_id() % 4 * 2 + i % 2;
      copy_through(a, to + warp_id() * 256 + row * 16 + column, d.values[i]);
    }
  }
}

ATTNKERN_KERNEL(64, 1) tensor_core_kernel(Arrays a, int fault) {
  tensor_core<bfloat16>(a, fault, 0);
  tensor_core<float16>(a, 0, 512);
}

struct Case {
  const char* name;
  int faults;               // planted ones; 0 is the clean kernel
  const char* expected[5];  // what the report of fault 1, 2, ... contains
  Status (*launch)(const Arrays& arrays, int fault);
  float (*output)(int i);  // of the clean kernel; NaN: not checked
};

template <class Parameter>
Status start(void (*kernel)(Arrays, Parameter), const Arrays& a, int fault, int grid = 1, int cluster = 1,
             bool cooperative = false) {
  return launch(kernel, {grid, kThreads, 8192, cluster, cooperative}, nullptr, a, static_cast<Parameter>(fault));
}

float first_sum(int count) { return count * (count + 1) / 2.0f; }

const Case kCases[] = {
    {"block_barrier",
     1,
     {"race: "},
     [](const Arrays& a, int f) { return start(neighbour_kernel, a, f); },
     [](int i) { return i < 64 ? (i + 33) % 64 + 1.0f : NAN; }},
    {"warp_barrier",
     1,
     {"race: "},
     [](const Arrays& a, int f) { return start(warp_neighbour_kernel, a, f); },
     [](int i) { return i < 64 ? (i ^ 1) + 1.0f : NAN; }},
    {"scratch_reuse",
     1,
     {"race: "},
     [](const Arrays& a, int f) { return start(reuse_kernel, a, f); },
     [](int i) { return i < 64 ? first_sum(64) + 64 : NAN; }},
    {"shared_bounds",
     1,
     {"shared memory out of bounds"},
     [](const Arrays& a, int f) { return start(shared_bounds_kernel, a, f); },
     [](int i) { return i < 64 ? i + 1.0f : NAN; }},
    {"shared_slice",
     1,
     {"a slice leaves its view"},
     [](const Arrays& a, int f) { return start(slice_kernel, a, f); },
     [](int i) { return i < 64 ? i % 32 + 33.0f : NAN; }},
    {"shared_size",
     1,
     {"leaves the 8192 bytes of shared memory"},
     [](const Arrays& a, int f) { return start(arena_kernel, a, f); },
     [](int i) { return i < 64 ? 1.0f : NAN; }},
    {"global_bounds",
     1,
     {"global write out of bounds: 4 bytes at byte 4096 of 'output'"},
     [](const Arrays& a, int f) { return start(global_bounds_kernel, a, f); },
     [](int i) { return i < 64 ? i + 1.0f : NAN; }},
    {"global_below",
     1,
     {"global read out of bounds: 4 bytes at byte -4 of 'input'"},
     [](const Arrays& a, int f) { return start(global_below_kernel, a, f); },
     [](int i) { return i < 64 ? i + 1.0f : NAN; }},
    {"shared_uninitialised",
     1,
     {"read of uninitialised shared"},
     [](const Arrays& a, int f) { return start(shared_uninitialised_kernel, a, f); },
     [](int i) { return i < 64 ? 64.0f - i : NAN; }},
    {"global_uninitialised",
     1,
     {"read of uninitialised global"},
     [](const Arrays& a, int f) { return start(global_uninitialised_kernel, a, f); },
     [](int i) { return i < 64 ? i + 1.0f : NAN; }},
    {"alignment",
     1,
     {"misaligned vector load"},
     [](const Arrays& a, int f) { return start(alignment_kernel, a, f); },
     [](int i) { return i < 256 ? i + 1.0f : NAN; }},
    {"global_race",
     1,
     {"race: write of global"},
     [](const Arrays& a, int f) { return start(block_race_kernel, a, f, 8); },
     [](int i) { return i < 8 ? 1.0f : NAN; }},
    {"cluster_sum",
     4,
     {"before the first cluster barrier", "read of uninitialised shared", "rank 4 is outside a cluster of 4", "exit"},
     [](const Arrays& a, int f) { return start(cluster_sum_kernel, a, f, 8, 4); },
     [](int i) { return i < 256   ? first_sum(256)
                        : i < 512 ? first_sum(512) - first_sum(256)
                                  : NAN; }},
    {"cluster_rounds",
     1,
     {"race: "},
     [](const Arrays& a, int f) { return start(cluster_rounds_kernel, a, f, 4, 2); },
     [](int i) { return i < 256 ? 3.0f : NAN; }},
    {"cluster_first",
     1,
     {"before the first cluster barrier"},
     [](const Arrays& a, int f) { return start(cluster_first_kernel, a, f, 4, 2); },
     [](int i) { return i < 256 ? 3.0f : NAN; }},
    {"cluster_split_barrier",
     1,
     {"race: read of shared"},
     [](const Arrays& a, int f) { return start(split_barrier_kernel, a, f, 4, 2); },
     [](int i) { return i < 256 ? 2.0f : NAN; }},
    {"async_copy",
     2,
     {"the wait is missing", "shared memory"},
     [](const Arrays& a, int f) { return start(async_kernel, a, f); },
     [](int i) { return i < 64 ? 257.0f + (i + 4) % 64 : NAN; }},
    {"async_exit",
     1,
     {"async_wait is missing"},
     [](const Arrays& a, int f) { return start(async_exit_kernel, a, f); },
     [](int i) { return i < 64 ? 1.0f : NAN; }},
    {"bulk_copy",
     4,
     {"copy barrier", "deadlock", "shared memory", "block 0 thread"},
     [](const Arrays& a, int f) { return start(bulk_kernel, a, f); },
     [](int i) { return i < 64 ? 3 * (4 * i + 1) + 768.0f : NAN; }},
    {"shuffle_exit",
     1,
     {"lane"},
     [](const Arrays& a, int f) { return start(shuffle_exit_kernel, a, f); },
     [](int i) { return i < 64 ? 1.0f : NAN; }},
    {"warp_divergence",
     1,
     {"warp divergence"},
     [](const Arrays& a, int f) { return start(warp_divergence_kernel, a, f); },
     [](int i) { return i < 64 ? (i ^ 2) + 1.0f : NAN; }},
    {"barrier_divergence",
     1,
     {"barrier divergence"},
     [](const Arrays& a, int f) { return start(barrier_divergence_kernel, a, f); },
     [](int i) { return i < 64 ? 1.0f : NAN; }},
    {"barrier_exit",
     1,
     {"barrier divergence"},
     [](const Arrays& a, int f) { return start(barrier_exit_kernel, a, f); },
     [](int i) { return i < 64 ? 1.0f : NAN; }},
    {"ticket",
     2,
     {"race: read of global", "shared memory"},
     [](const Arrays& a, int f) { return start(ticket_kernel, a, f, 6); },
     [](int i) { return i < 64 ? 6 * (i + 1) + 64 * 15.0f : NAN; }},
    {"chain",
     2,
     {"deadlock", "global"},
     [](const Arrays& a, int f) { return start(chain_kernel, a, f, 6); },
     [](int i) { return i < 384 ? i / 64 + 1.0f : NAN; }},
    {"cooperative",
     1,
     {"deadlock"},
     [](const Arrays& a, int f) { return start(meet_kernel, a, f, 6, 1, f == 0); },
     [](int i) { return i < 384 || (i >= 512 && i < 896) ? 1.0f : NAN; }},
    {"livelock",
     1,
     {"livelock"},
     [](const Arrays& a, int f) { return start(poll_kernel, a, f, 1); },
     [](int i) { return i < 64 ? 1.0f : NAN; }},
    {"tensor_core",
     2,
     {"race: ", "misaligned vector access to shared memory"},
     [](const Arrays& a, int f) { return start(tensor_core_kernel, a, f); },
     [](int i) {
       int sum = 0;
       for (int k = 0; k < 16; ++k) sum += a_at(i % 256 / 16, k) * b_at(k, i % 16);
       return 2.0f * sum;
     }},
    {"values",
     0,
     {},
     [](const Arrays& a, int f) { return start(values_kernel, a, f); },
     [](int i) {
       const int t = i % 64, lane = t % 32;
       if (i < 64) return first_sum(64);
       if (i < 128) return 2 * first_sum(64);
       if (i < 192) return 4.0f * (t / 4 * 4) + 10;
       if (i < 256) {
         uint32_t votes = 0;
         for (int l = 0; l < 32; ++l) votes |= static_cast<uint32_t>((t - lane + l) % 3 == 0) << l;
         return static_cast<float>(votes);
       }
       if (i < 320) return t - lane + 8.0f;
       return i < 576 ? i - 319.0f : NAN;  // whole numbers to 256 are exact in bfloat16
     }},
};

}  // namespace

extern "C" {

int case_count() { return sizeof(kCases) / sizeof(kCases[0]); }
const char* case_name(int i) { return kCases[i].name; }
int case_faults(int i) { return kCases[i].faults; }
const char* case_expected(int i, int fault) { return kCases[i].expected[fault - 1]; }

// The report: empty where the kernel ran clean and its output is right.
const char* case_run(int i, int fault, uint64_t seed) {
  static std::string report;
  const Case& c = kCases[i];
  simt::settings().seed = seed;
  std::vector<float> input(kElements);
  for (int k = 0; k < kElements; ++k) input[k] = k + 1.0f;
  Arrays arrays{static_cast<float*>(simt::allocate(kElements * 4, "input")),
                static_cast<float*>(simt::allocate(kElements * 4, "output")),
                static_cast<uint32_t*>(simt::allocate(8, "counter"))};
  simt::upload(arrays.input, input.data(), kElements * 4);
  Status status = fill_bytes(arrays.counter, 0, 8, nullptr);
  if (status.ok()) status = c.launch(arrays, fault);
  report = status.ok() ? "" : status.message;
  for (int k = 0; status.ok() && k < kElements && report.empty(); ++k) {
    const float want = c.output(k);
    if (!std::isnan(want) && arrays.output[k] != want)
      report = "wrong result: output[" + std::to_string(k) + "] = " + std::to_string(arrays.output[k]) + ", expected " +
               std::to_string(want);
  }
  simt::release(arrays.input);
  simt::release(arrays.output);
  simt::release(arrays.counter);
  return report.c_str();
}

float activation_of(int act, int derivative, float x, float slope) {
  return derivative ? activation_grad(static_cast<Act>(act), x, slope) : activation(static_cast<Act>(act), x, slope);
}
float gate_of(int gate, int derivative, float z, float slope, float offset) {
  const Gate g = static_cast<Gate>(gate);
  return derivative ? gate_grad(g, z, slope, offset) : gate_value(g, z, slope, offset);
}
int mask_of(int act, float u) { return mask_bit(static_cast<Act>(act), u); }

uint16_t to_half(float x) { return narrow<float16>(x).bits; }
float from_half(uint16_t bits) { return widen(float16{bits}); }
uint16_t to_bfloat(float x) { return narrow<bfloat16>(x).bits; }
float from_bfloat(uint16_t bits) { return widen(bfloat16{bits}); }

}  // extern "C"
