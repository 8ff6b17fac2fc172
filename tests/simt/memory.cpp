// The shadow of shared and global memory: bounds, initialisation, races, and copies under way.
#include <algorithm>
#include <cstdlib>
#include <utility>

#include "simt/engine.h"

namespace attnkern::simt {
namespace {

constexpr size_t kRedZone = 4096;

struct Allocation {
  std::string name;
  size_t bytes;
  Cell* cells;
};
std::map<uintptr_t, Allocation> allocations;  // by address of the first red zone

std::vector<Site> sites;

uint16_t site_id(Site site) {
  static std::unordered_map<uint64_t, uint16_t> known;
  static Site last{};
  static uint16_t last_id = 0;
  if (site == last) return last_id;
  const uint64_t key = reinterpret_cast<uint64_t>(site.file) << 16 ^ static_cast<uint64_t>(site.line);
  const auto [at, fresh] = known.try_emplace(key, static_cast<uint16_t>(sites.size()));
  if (fresh) sites.push_back(site);
  last = site;
  return last_id = at->second;
}

uint32_t bound(const Clock& clock, uint64_t key) {
  const auto at = clock.find(key);
  return at == clock.end() ? 0 : at->second;
}

bool knows(uint64_t key, uint32_t tick) {
  return tick < bound(self->known, key) || tick < bound(self->block->known, key);
}

// Whether an access at `tick` by thread `id` happens before whatever the running thread does now.
bool ordered(uint32_t tick, uint32_t id) {
  if (tick < engine.launch_tick || id == self->id) return true;
  if (id & 0x80000000u) return knows(thread_key(id), tick);
  const Block& block = *self->block;
  const int size = engine.shape.block;
  const int owner = static_cast<int>((id - 1) / size), index = static_cast<int>((id - 1) % size);
  if (owner == block.index) {
    if (tick < block.synced) return true;
    if (index / 32 == self->index / 32 && tick < block.warps[index / 32].synced) return true;
  }
  if (owner / engine.shape.cluster == block.index / engine.shape.cluster && self->cluster_waited) {
    const Thread& other = block.cluster->blocks[owner % engine.shape.cluster].threads[index];
    if (tick < other.arrive_tick[(self->cluster_waited - 1) & 3]) return true;
  }
  return knows(block_key(owner), tick) || knows(thread_key(id), tick);
}

std::string by(uint32_t id, uint16_t site) {
  const std::string where = " at " + describe(sites[site]);
  if (id & 0x80000000u) return "the bulk copy" + where + ": wait on its barrier";
  const int size = engine.shape.block;
  return "block " + std::to_string((id - 1) / size) + " thread " + std::to_string((id - 1) % size) + where;
}

void check_unordered(const Cell& cell, bool write, const char* memory, Site site) {
  const auto race = [&](const char* other, uint32_t id, uint16_t where) {
    fault("race: " + std::string(write ? "write" : "read") + " of " + memory + " memory unordered with the " + other +
              " by " + by(id, where),
          site);
  };
  if (!ordered(cell.write_tick, cell.write_thread)) race("write", cell.write_thread, cell.write_site);
  if (!write) return;
  for (int i = 0; i < 2; ++i)
    if (!ordered(cell.read_tick[i], cell.read_thread[i])) race("read", cell.read_thread[i], cell.read_site);
}

// One byte's check and record.
void touch(Cell& cell, bool write, const char* memory, uint16_t where, Site site) {
  if (cell.pending)
    fault(std::string(write ? "write to" : "read of") +
              " shared memory while an asynchronous copy writes it: the wait is missing",
          site);
  if (!write && !cell.initialised) fault(std::string("read of uninitialised ") + memory + " memory", site);
  check_unordered(cell, write, memory, site);
  if (write) {
    cell.write_tick = engine.tick;
    cell.write_thread = self->id;
    cell.write_site = where;
    cell.initialised = true;
    return;
  }
  if (cell.read_thread[0] != self->id) {
    cell.read_thread[1] = cell.read_thread[0];
    cell.read_tick[1] = cell.read_tick[0];
    cell.read_thread[0] = self->id;
  }
  cell.read_tick[0] = engine.tick;
  cell.read_site = where;
}

void touch(Cell* cells, size_t count, bool write, const char* memory, Site site) {
  const uint16_t where = site_id(site);
  const Cell before = cells[0];
  touch(cells[0], write, memory, where, site);
  for (size_t i = 1; i < count; ++i)
    if (std::memcmp(&cells[i], &before, sizeof(Cell)) == 0)  // the bytes of a word have one history: checked already
      cells[i] = cells[0];
    else
      touch(cells[i], write, memory, where, site);
}

// The allocation whose memory or red zones hold the address, and the address's offset in it (negative before it).
Allocation* find(const void* address, int64_t& offset) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  auto next = allocations.upper_bound(at);
  if (next == allocations.begin()) return nullptr;
  --next;
  offset = static_cast<int64_t>(at - next->first) - static_cast<int64_t>(kRedZone);
  return offset < static_cast<int64_t>(next->second.bytes + kRedZone) ? &next->second : nullptr;
}

Cell* global_cells(const void* address, size_t bytes, const char* verb, Site site) {
  int64_t offset = 0;
  const Allocation* memory = find(address, offset);
  if (!memory) fault(std::string("global ") + verb + " at an address outside every allocation", site);
  if (offset < 0 || offset + bytes > memory->bytes)
    fault(std::string("global ") + verb + " out of bounds: " + std::to_string(bytes) + " bytes at byte " +
              std::to_string(offset) + " of '" + memory->name + "' of " + std::to_string(memory->bytes),
          site);
  return memory->cells + offset;
}

}  // namespace

unsigned char* shared_access(Block& owner, uint32_t offset, uint32_t bytes, bool write, Site site) {
  if (&owner != self->block) {
    if (!self->cluster_waited) fault("access to another block's shared memory before the first cluster barrier", site);
    if (owner.exited == static_cast<int>(owner.threads.size()))
      fault("access to the shared memory of a block that has exited", site);
    owner.remote[self->id] = {engine.tick, site};
  }
  touch(owner.cells.data() + offset, bytes, write, "shared", site);
  return owner.shared.data() + offset;
}

void check_remote_readers_done(const Block& block) {
  for (const auto& [id, access] : block.remote)
    if (!ordered(access.tick, id))
      fault("exits while block " + std::to_string((id - 1) / engine.shape.block) +
                " may still access its shared memory: a cluster barrier is missing",
            access.site);
}

void global_access(const void* address, size_t bytes, bool write, Site site) {
  Cell* cells = global_cells(address, bytes, write ? "write" : "read", site);
  touch(cells, bytes, write, "global", site);
}

void counter_access(const uint32_t* counter, bool write, Site site) {
  if (reinterpret_cast<uintptr_t>(counter) % 4) fault("misaligned counter", site);
  Cell* cells = global_cells(counter, 4, "atomic access", site);
  for (int i = 0; i < 4; ++i) {
    if (!write && !cells[i].initialised) fault("atomic read of uninitialised global memory", site);
    check_unordered(cells[i], false, "global", site);
    cells[i].initialised = true;
  }
}

// ---- copies ----

namespace {

void own(Block& block, const PendingCopy& copy, bool pending, uint32_t writer, uint16_t site) {
  for (uint32_t i = copy.offset; i < copy.offset + copy.bytes; ++i) {
    Cell& cell = block.cells[i];
    cell.pending = pending;
    cell.initialised = !pending;
    cell.write_tick = engine.tick;
    cell.write_thread = writer;
    cell.write_site = site;
  }
}

void finish(Block& block, const PendingCopy& copy, uint32_t writer) {
  std::memcpy(block.shared.data() + copy.offset, copy.from, copy.bytes);
  own(block, copy, false, writer, block.cells[copy.offset].write_site);
}

PendingCopy begin(uint32_t offset, uint32_t bytes, const void* from, Site site) {
  if (reinterpret_cast<uintptr_t>(from) % 16 || offset % 16 || bytes % 16)
    fault("an asynchronous copy needs multiples of 16 bytes, aligned on both sides", site);
  global_access(from, bytes, false, site);
  Block& block = *self->block;
  touch(block.cells.data() + offset, bytes, true, "shared", site);
  const PendingCopy copy{offset, bytes, from};
  own(block, copy, true, self->id, site_id(site));
  return copy;
}

CopyBarrierState& state_of(uint32_t offset, Site site) {
  CopyBarrierState& state = self->block->copy_barriers[offset];
  if (!state.initialised) fault("copy barrier used before init", site);
  if (!ordered(state.init_tick, state.init_thread)) fault("copy barrier used without a block_sync after init", site);
  return state;
}

void complete_phase(Block& block, uint32_t offset, CopyBarrierState& state) {
  if (state.arrivals_left || state.bytes_left) return;
  for (const PendingCopy& copy : state.copies) finish(block, copy, copy_engine_id(block.index));
  state.copies.clear();
  state.arrivals_left = 1;
  ++state.phase;
  state.completed_tick = ++engine.tick;
  wake_copy_waiters(block, offset);
}

}  // namespace

void copy_issue(uint32_t offset, const void* from, Site site) { self->copies.push_back(begin(offset, 16, from, site)); }

void copy_commit() { self->copy_groups.push_back(std::exchange(self->copies, {})); }

void copy_wait(int pending, Site) {
  auto& groups = self->copy_groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const PendingCopy& copy : groups.front()) finish(*self->block, copy, self->id);
    groups.erase(groups.begin());
  }
}

void copy_barrier_init(uint32_t offset, Site) {
  CopyBarrierState& state = self->block->copy_barriers[offset];
  state = {};
  state.initialised = true;
  state.init_tick = engine.tick;
  state.init_thread = self->id;
}

void copy_barrier_expect(uint32_t offset, int bytes, Site site) {
  CopyBarrierState& state = state_of(offset, site);
  if (!state.arrivals_left) fault("expect twice in one phase of a copy barrier", site);
  state.arrivals_left = 0;
  state.bytes_left += bytes;
  complete_phase(*self->block, offset, state);
}

void bulk_copy(uint32_t offset, uint32_t bytes, const void* from, uint32_t barrier, Site site) {
  CopyBarrierState& state = state_of(barrier, site);
  state.copies.push_back(begin(offset, bytes, from, site));
  state.bytes_left -= bytes;
  complete_phase(*self->block, barrier, state);
}

void copy_barrier_wait(uint32_t offset, int parity, Site site) {
  CopyBarrierState& state = state_of(offset, site);
  while (static_cast<int>(state.phase & 1) == parity) wait_for_copies(offset, parity, site);
  uint32_t& known = self->known[thread_key(copy_engine_id(self->block->index))];
  known = std::max(known, state.completed_tick);
}

// ---- device memory ----

void* allocate(size_t bytes, const char* name) {
  const size_t padded = (bytes + 255) / 256 * 256 + 2 * kRedZone;
  auto* raw = static_cast<unsigned char*>(std::aligned_alloc(256, padded));
  std::memset(raw, 0xff, padded);  // NaN
  auto* cells = static_cast<Cell*>(std::calloc(bytes ? bytes : 1, sizeof(Cell)));
  allocations[reinterpret_cast<uintptr_t>(raw)] = {name, bytes, cells};
  return raw + kRedZone;
}

void release(void* memory) {
  const auto at = allocations.find(reinterpret_cast<uintptr_t>(memory) - kRedZone);
  if (at == allocations.end()) return;
  std::free(at->second.cells);
  std::free(reinterpret_cast<void*>(at->first));
  allocations.erase(at);
}

namespace {

// The cells of [memory, memory + bytes), or null where that is not device memory; for the host, which must not fault.
Cell* host_cells(const void* memory, size_t bytes) {
  int64_t offset = 0;
  const Allocation* found = find(memory, offset);
  return found && offset >= 0 && offset + bytes <= found->bytes ? found->cells + offset : nullptr;
}

void mark_initialised(Cell* cells, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) cells[i] = {0, 0, {0, 0}, {0, 0}, 0, 0, true, false, 0};
}

}  // namespace

void upload(void* to, const void* from, size_t bytes) {
  if (Cell* cells = host_cells(to, bytes)) {
    std::memcpy(to, from, bytes);
    mark_initialised(cells, bytes);
  }
}

Status fill(void* memory, int value, size_t bytes) {
  Cell* cells = host_cells(memory, bytes);
  if (!cells) return {"fill_bytes leaves its allocation"};
  std::memset(memory, value, bytes);
  mark_initialised(cells, bytes);
  return {};
}

Status copy(void* to, const void* from, size_t bytes) {
  Cell* target = host_cells(to, bytes);
  if (!target || !host_cells(from, bytes)) return {"copy_bytes leaves its allocation"};
  if (uninitialised_bytes(from, bytes)) return {"copy_bytes reads uninitialised memory"};
  std::memmove(to, from, bytes);
  mark_initialised(target, bytes);
  return {};
}

size_t uninitialised_bytes(const void* memory, size_t bytes) {
  const Cell* cells = host_cells(memory, bytes);
  if (!cells) return bytes;
  return static_cast<size_t>(std::count_if(cells, cells + bytes, [](const Cell& c) { return !c.initialised; }));
}

}  // namespace attnkern::simt

// The host's side for ctypes (run.py).
extern "C" {

using attnkern::simt::settings;

void simt_configure(uint64_t seed, int sms, int shared, int capability, int64_t l2) {
  settings().seed = seed;
  auto& device = settings().device;
  device.sm_count = sms;
  device.shared_bytes_per_block = shared;
  device.shared_bytes_per_sm = shared + 1024;
  device.compute_capability = capability;
  device.l2_bytes = l2;
}
void* simt_allocate(size_t bytes, const char* name) { return attnkern::simt::allocate(bytes, name); }
void simt_release(void* memory) { attnkern::simt::release(memory); }
void simt_upload(void* to, const void* from, size_t bytes) { attnkern::simt::upload(to, from, bytes); }
size_t simt_uninitialised(const void* memory, size_t bytes) {
  return attnkern::simt::uninitialised_bytes(memory, bytes);
}

}  // extern "C"
