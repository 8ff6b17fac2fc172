// The engine: fibers, their scheduler and barriers. memory.cpp keeps the shadow of memory.
#include "simt/emulator.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <memory>

#include "simt/engine.h"

namespace attnkern::simt {

Thread* self = nullptr;
Engine engine;

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr int kIdle = 1, kClusterDone = 2, kFault = 3;  // why a fiber returned to the host

std::vector<void*> free_stacks;

void* take_stack() {
  if (free_stacks.empty()) {
    constexpr size_t count = 256;
    auto* memory = static_cast<char*>(
        mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (size_t i = 0; i < count; ++i) free_stacks.push_back(memory + i * kStackBytes);
  }
  void* stack = free_stacks.back();
  free_stacks.pop_back();
  return stack;
}

std::string text(Site site) {
  const char* name = std::strrchr(site.file, '/');
  return std::string(name ? name + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string name_of(const Thread& thread) {
  return "block " + std::to_string(thread.block->index) + " thread " + std::to_string(thread.index);
}

// Schedules differ by seed: depth first, breadth first, random.
Thread* pick() {
  Thread* thread;
  if (engine.policy == 0) {
    thread = engine.ready.back();
    engine.ready.pop_back();
  } else {
    if (engine.policy == 2) std::swap(engine.ready.front(), engine.ready[engine.random() % engine.ready.size()]);
    thread = engine.ready.front();
    engine.ready.pop_front();
  }
  return thread;
}

void fiber_main() {
  (*engine.kernel)();
  thread_exit();
}

[[noreturn]] void next() {
  if (engine.ready.empty()) _longjmp(engine.host, kIdle);
  self = pick();
  if (self->stack) _longjmp(self->context, 1);
  self->stack = take_stack();
  ucontext_t fresh;
  getcontext(&fresh);
  fresh.uc_stack.ss_sp = self->stack;
  fresh.uc_stack.ss_size = kStackBytes;
  fresh.uc_link = nullptr;
  makecontext(&fresh, fiber_main, 0);
  setcontext(&fresh);
  __builtin_unreachable();
}

void suspend(Wait wait, Site site) {
  self->wait = wait;
  self->site = site;
  if (_setjmp(self->context) == 0) next();
}

// The threads of [begin, end) wait no longer; they run on in any order.
template <class F>
void resume(std::vector<Thread>& threads, size_t begin, size_t end, const F& waits) {
  const size_t first = engine.ready.size();
  for (size_t i = begin; i < end; ++i)
    if (waits(threads[i])) {
      threads[i].wait = Wait::none;
      engine.ready.push_back(&threads[i]);
    }
  if (engine.policy != 1) std::shuffle(engine.ready.begin() + first, engine.ready.end(), engine.random);
}

void yield() {  // to the end of the line, whichever end pick() takes from
  if (engine.policy == 0)
    engine.ready.push_front(self);
  else
    engine.ready.push_back(self);
  if (_setjmp(self->context) == 0) next();
}

Warp& warp_of(const Thread& thread) { return thread.block->warps[thread.index / 32]; }

void merge(Clock& into, const Clock& from) {
  for (const auto& [key, tick] : from) {
    uint32_t& known = into[key];
    known = std::max(known, tick);
  }
}

void merge_known(Block& block) {
  for (Thread& thread : block.threads) {
    merge(block.known, thread.known);
    thread.known.clear();
  }
}

const char* describe(Wait wait) {
  switch (wait) {
    case Wait::warp:
      return "a warp operation";
    case Wait::block:
      return "block_sync";
    case Wait::cluster:
      return "cluster_wait";
    case Wait::counter:
      return "a counter";
    case Wait::copy_barrier:
      return "a copy barrier";
    default:
      return "nothing";
  }
}

std::string deadlock() {
  std::string what = "deadlock:";
  int listed = 0;
  for (const auto& cluster : engine.live)
    for (const Block& block : cluster->blocks) {
      const Thread* previous = nullptr;
      for (const Thread& thread : block.threads) {
        if (thread.exited || listed == 8 ||
            (previous && previous->wait == thread.wait && previous->site == thread.site))
          continue;
        previous = &thread;
        ++listed;
        what += " " + name_of(thread) + " waits for " + describe(thread.wait) + " at " + text(thread.site);
        if (thread.wait == Wait::counter)
          what += " (is " + std::to_string(*thread.counter) + ", wants " + std::to_string(thread.target) + ")";
        what += ";";
      }
    }
  const size_t waiting = engine.order.size();
  if (waiting) what += " " + std::to_string(waiting) + " clusters have not started, nor need they before these end";
  return what;
}

void start_cluster(int64_t index) {
  const Shape& shape = engine.shape;
  auto cluster = std::make_unique<Cluster>();
  cluster->blocks.resize(shape.cluster);
  const size_t first = engine.ready.size();
  for (int rank = 0; rank < shape.cluster; ++rank) {
    Block& block = cluster->blocks[rank];
    block.cluster = cluster.get();
    block.rank = rank;
    block.index = static_cast<int>(index * shape.cluster + rank);
    block.shared.assign(shape.shared_bytes, 0xff);  // NaN
    block.cells.resize(shape.shared_bytes);
    block.warps.resize(shape.block / 32);
    block.threads.resize(shape.block);
    for (int i = 0; i < shape.block; ++i) {
      Thread& thread = block.threads[i];
      thread.block = &block;
      thread.index = i;
      thread.id = static_cast<uint32_t>(block.index) * shape.block + i + 1;
      engine.ready.push_back(&thread);
    }
  }
  if (engine.policy != 1) std::shuffle(engine.ready.begin() + first, engine.ready.end(), engine.random);
  engine.live.push_back(std::move(cluster));
}

void drop(Cluster& cluster) {
  for (Block& block : cluster.blocks)
    for (Thread& thread : block.threads)
      if (thread.stack) free_stacks.push_back(thread.stack);
}

}  // namespace

void fault(const std::string& what, Site site) {
  static std::deque<std::string> messages;  // Status holds static text
  messages.push_back((self ? name_of(*self) + ": " : "") + what + (site.file ? " [" + text(site) + "]" : ""));
  engine.outcome = {messages.back().c_str()};
  _longjmp(engine.host, kFault);
}

std::string describe(Site site) { return text(site); }

void thread_exit() {
  Block& block = *self->block;
  Cluster& cluster = *block.cluster;
  self->exited = true;
  ++engine.progress;
  if (!self->copies.empty() || !self->copy_groups.empty())
    fault("exits with an async_copy under way: async_wait is missing", {});
  const size_t warp = self->index / 32 * 32;
  for (size_t i = warp; i < warp + 32; ++i)
    if (block.threads[i].wait == Wait::warp)
      fault("exits while other lanes of its warp wait: a warp operation needs all 32 lanes", block.threads[i].site);
  if (block.arrived)
    for (const Thread& thread : block.threads)
      if (thread.wait == Wait::block)
        fault("barrier divergence: exits while thread " + std::to_string(thread.index) + " waits for block_sync",
              thread.site);
  if (cluster.arrived) fault("exits while other threads have arrived at a cluster barrier", self->site);
  if (++block.exited == static_cast<int>(block.threads.size())) {
    check_remote_readers_done(block);
    if (++cluster.exited == static_cast<int>(cluster.blocks.size())) _longjmp(engine.host, kClusterDone);
  }
  next();
}

uint64_t warp_exchange(int operation, uint64_t value, int source_lane, Site site) {
  Block& block = *self->block;
  Warp& warp = warp_of(*self);
  const size_t first = self->index / 32 * 32;
  for (size_t i = first; i < first + 32; ++i) {
    const Thread& other = block.threads[i];
    if (other.exited) fault("warp operation with an exited lane (" + std::to_string(other.index % 32) + ")", site);
    if (other.wait == Wait::warp && (other.operation != operation || !(other.site == site)))
      fault("warp divergence: lane " + std::to_string(other.index % 32) + " waits at " + text(other.site), site);
  }
  self->operation = operation;
  self->source_lane = source_lane;
  self->value = value;
  if (++warp.arrived < 32) {
    suspend(Wait::warp, site);
    return self->result;
  }
  warp.arrived = 0;
  uint64_t votes = 0;
  for (size_t lane = 0; lane < 32; ++lane) votes |= (block.threads[first + lane].value & 1) << lane;
  for (size_t lane = 0; lane < 32; ++lane) {
    Thread& thread = block.threads[first + lane];
    thread.result = operation == 2 ? votes : block.threads[first + thread.source_lane].value;
  }
  // a shuffle exchanges registers only: it does not order memory
  if (operation == 0) warp.synced = ++engine.tick;
  ++engine.progress;
  self->wait = Wait::warp;
  resume(block.threads, first, first + 32, [](const Thread&) { return true; });
  if (_setjmp(self->context) == 0) next();
  return self->result;
}

void block_barrier(Site site) {
  Block& block = *self->block;
  if (block.exited) fault("barrier divergence: a thread of the block has exited", site);
  if (block.arrived)
    for (const Thread& other : block.threads)
      if (other.wait == Wait::block) {
        if (!(other.site == site))
          fault("barrier divergence: thread " + std::to_string(other.index) + " waits at " + text(other.site), site);
        break;
      }
  if (++block.arrived < static_cast<int>(block.threads.size())) return suspend(Wait::block, site);
  block.arrived = 0;
  merge_known(block);
  block.synced = ++engine.tick;
  ++engine.progress;
  self->wait = Wait::block;
  resume(block.threads, 0, block.threads.size(), [](const Thread&) { return true; });
  if (_setjmp(self->context) == 0) next();
}

void cluster_arrive(Site site) {
  Cluster& cluster = *self->block->cluster;
  for (const Block& block : cluster.blocks)
    if (block.exited) fault("cluster barrier with an exited thread in block " + std::to_string(block.index), site);
  if (self->cluster_arrived != self->cluster_waited) fault("cluster_arrive twice without cluster_wait", site);
  self->arrive_tick[self->cluster_arrived++ & 3] = ++engine.tick;
  const size_t all = cluster.blocks.size() * self->block->threads.size();
  if (++cluster.arrived < static_cast<int>(all)) return;
  cluster.arrived = 0;
  ++cluster.phase;
  ++engine.progress;
  for (Block& block : cluster.blocks) merge_known(block);
  Clock known;
  for (const Block& block : cluster.blocks) merge(known, block.known);
  for (Block& block : cluster.blocks) {
    block.known = known;
    resume(block.threads, 0, block.threads.size(), [](const Thread& t) { return t.wait == Wait::cluster; });
  }
}

void cluster_wait(Site site) {
  if (self->cluster_arrived == self->cluster_waited) fault("cluster_wait without cluster_arrive", site);
  if (self->block->cluster->phase <= self->cluster_waited) suspend(Wait::cluster, site);
  ++self->cluster_waited;
}

// ---- counters ----

namespace {

Clock release_clock() {
  Block& block = *self->block;
  Clock clock = block.known;
  merge(clock, self->known);
  clock[block_key(block.index)] = block.synced;
  clock[thread_key(self->id)] = ++engine.tick;
  if (self->cluster_waited)
    for (const Block& other : block.cluster->blocks) {
      uint32_t tick = UINT32_MAX;
      for (const Thread& thread : other.threads)
        tick = std::min(tick, thread.arrive_tick[(self->cluster_waited - 1) & 3]);
      uint32_t& known = clock[block_key(other.index)];
      known = std::max(known, tick);
    }
  return clock;
}

void wake(const uint32_t* counter) {
  ++engine.progress;
  auto& spinning = engine.spinning;
  for (size_t i = 0; i < spinning.size();)
    if (spinning[i]->counter == counter && *counter >= spinning[i]->target) {
      spinning[i]->wait = Wait::none;
      engine.ready.push_back(spinning[i]);
      spinning[i] = spinning.back();
      spinning.pop_back();
    } else {
      ++i;
    }
}

}  // namespace

uint32_t atomic_add(uint32_t* counter, uint32_t value, Site site) {
  yield();
  counter_access(counter, false, site);
  Clock& released = engine.released[counter];
  merge(self->known, released);
  merge(released, release_clock());
  const uint32_t old = *counter;
  *counter += value;
  wake(counter);
  return old;
}

uint32_t load_acquire(const uint32_t* flag, Site site) {
  counter_access(flag, false, site);
  if (engine.polled_at != engine.progress) {
    engine.polled_at = engine.progress;
    engine.polls = 0;
  }
  if (++engine.polls > 100000) fault("livelock: load_acquire is polled and nothing changes", site);
  yield();
  merge(self->known, engine.released[flag]);
  return *flag;
}

void store_release(uint32_t* flag, uint32_t value, Site site) {
  yield();
  counter_access(flag, true, site);
  engine.released[flag] = release_clock();
  *flag = value;
  wake(flag);
}

void wait_until_at_least(const uint32_t* counter, uint32_t value, Site site) {
  counter_access(counter, false, site);
  if (*counter < value) {
    self->counter = counter;
    self->target = value;
    engine.spinning.push_back(self);
    suspend(Wait::counter, site);
  }
  merge(self->known, engine.released[counter]);
}

void wait_for_copies(uint32_t barrier, int parity, Site site) {
  self->copy_barrier = barrier;
  self->parity = parity;
  suspend(Wait::copy_barrier, site);
}

void wake_copy_waiters(Block& block, uint32_t barrier) {
  ++engine.progress;
  resume(block.threads, 0, block.threads.size(),
         [&](const Thread& t) { return t.wait == Wait::copy_barrier && t.copy_barrier == barrier; });
}

// ---- the host's side ----

Settings& settings() {
  static Settings value;
  return value;
}

int grid_size() { return static_cast<int>(engine.shape.grid); }

int64_t resident_blocks(int block, int shared_bytes) {
  const cuda::DeviceProperties& device = settings().device;
  const int by_shared = device.shared_bytes_per_sm / (shared_bytes + 1024);
  return int64_t{device.sm_count} * std::min({device.threads_per_sm / block, by_shared, 32});
}

Status run(const Shape& shape, const std::function<void()>& kernel) {
  const cuda::DeviceProperties& device = settings().device;
  if (shape.grid == 0) return {};
  if (shape.grid < 0 || shape.grid > INT32_MAX) return {"a grid of more than 2^31 - 1 blocks"};
  if (shape.block < 32 || shape.block > 1024 || shape.block % 32) return {"a block must be 1 to 32 whole warps"};
  if (shape.cluster < 1 || shape.cluster > 16 || shape.grid % shape.cluster)
    return {"the grid is not a number of clusters of up to 16 blocks"};
  if (shape.cluster > 1 && device.compute_capability < 90) return {"clusters need compute capability 9.0"};
  if (shape.shared_bytes < 0 || shape.shared_bytes > device.shared_bytes_per_block)
    return {"too much shared memory asked for"};
  const int64_t clusters = shape.grid / shape.cluster;
  const int64_t resident = resident_blocks(shape.block, shape.shared_bytes) / shape.cluster;
  if (resident == 0) return {"not one cluster fits the device"};
  if (shape.cooperative && clusters > resident) return {"a cooperative grid does not fit the device"};

  engine.shape = shape;
  engine.kernel = &kernel;
  engine.random.seed(settings().seed + 1);
  engine.policy = static_cast<int>(settings().seed % 3);
  engine.launch_tick = ++engine.tick;
  engine.released.clear();
  engine.spinning.clear();
  engine.ready.clear();
  engine.outcome = {};
  engine.order.resize(clusters);
  for (int64_t i = 0; i < clusters; ++i) engine.order[i] = clusters - 1 - i;
  if (engine.policy != 1) std::shuffle(engine.order.begin(), engine.order.end(), engine.random);
  // a launch that is not cooperative promises the kernel no more than one cluster at a time
  engine.resident = shape.cooperative ? clusters : std::min<int64_t>(resident, 1 + engine.random() % 4);

  for (;;) {
    const int why = _setjmp(engine.host);
    if (why == kFault) break;
    if (why == kClusterDone) {
      auto done = std::find_if(engine.live.begin(), engine.live.end(),
                               [](const auto& c) { return c.get() == self->block->cluster; });
      drop(**done);
      engine.live.erase(done);
    }
    while (!engine.order.empty() && static_cast<int64_t>(engine.live.size()) < engine.resident) {
      start_cluster(engine.order.back());
      engine.order.pop_back();
    }
    if (engine.live.empty()) break;
    if (engine.ready.empty()) {
      self = nullptr;
      fault(deadlock(), {});
    }
    next();
  }
  for (const auto& cluster : engine.live) drop(*cluster);
  engine.live.clear();
  self = nullptr;
  return engine.outcome;
}

}  // namespace attnkern::simt
