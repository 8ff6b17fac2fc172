// What a CPU launcher's call is: how positions are cut into units, what threads share, and how units' sums are merged.
//
// A unit is a run of positions of one sample. The runs depend on the sizes alone, a unit is computed by one thread in a
// fixed order, and what several units add to is merged in their order: results have the same bits for any number of
// threads, which take units as they become free.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/cache.h"
#include "cpu/share.h"
#include "ops/attention_gate/cpu_kernels.h"

namespace attnkern::attention_gate {

constexpr int64_t kUnits = 64;            // units to share among threads, where there are so many tiles
constexpr int64_t kRuns = 8;              // of units a thread, so that few tiles are waited for
constexpr int64_t kSlabUnits = 16;        // where each has a part of dg, that meets the next in two rows or planes of g
constexpr int64_t kMergePiece = 1 << 12;  // elements of the weights' gradients

// How the positions of a batch are cut, the same for any number of threads: all its units.
inline Units cut(int64_t batch, int64_t positions, int64_t tile, int64_t wanted) {
  const int64_t tiles = std::max<int64_t>(1, ceil_div(positions, tile));
  const int64_t length = tile * ceil_div(tiles, ceil_div(tiles, std::max<int64_t>(1, ceil_div(tiles * batch, wanted))));
  const int64_t per_sample = ceil_div(positions, length);
  return {length, per_sample, positions, 0, per_sample * batch};
}

// The most positions of g along its last dim beside a run of at most `length` of the grid's.
inline int64_t coarse_range(const Inputs& p, int64_t length) {
  const Sizes& n = p.sizes;
  const int64_t* taps = p.taps + 2 * (n.grid[0] + n.grid[1]);
  length = std::min(length, n.grid[2]);
  int64_t range = 1;
  for (int64_t q = 0; q < n.grid[2]; ++q) {
    if (q && (taps[2 * q] < taps[2 * q - 2] || taps[2 * q + 1] < taps[2 * q - 1])) return n.g[2];
    range = std::max(range, taps[2 * std::min(q + length, n.grid[2]) - 1] - taps[2 * q] + 1);
  }
  return range;
}

// The positions of g that a unit lies between.
inline Range slab_of(const Inputs& p, const Unit& u) {
  const Sizes& n = p.sizes;
  const int64_t first = u.begin / n.grid[2], last = (u.end - 1) / n.grid[2];
  const int64_t first_plane = first / n.grid[1], last_plane = last / n.grid[1];
  const Range planes = taps_of(p, 0, first_plane, last_plane + 1);
  const Range rows =
      first_plane == last_plane ? taps_of(p, 1, first % n.grid[1], last % n.grid[1] + 1) : Range{0, n.g[1]};
  const Range columns =
      first == last ? taps_of(p, 2, u.begin % n.grid[2], (u.end - 1) % n.grid[2] + 1) : Range{0, n.g[2]};
  return {(planes.begin * n.g[1] + rows.begin) * n.g[2] + columns.begin,
          ((planes.end - 1) * n.g[1] + rows.end - 1) * n.g[2] + columns.end};
}

// One operator call over the logits' grid: what all of them share.
struct Call {
  const Inputs& p;
  const ThreadPool& pool;
  const CpuKernels& kernels;
  bool split, backward;  // t and u apart; with room for gradients
  bool slabbed = false;  // dg is summed in slabs
  int64_t maps = 1;      // of the larger size that are read and written, for their traffic
  bool with_d = false;   // dy of the target is read twice

  const Sizes& n = p.sizes;
  int64_t size = size_of(accumulation(p.dtype)), positions = volume(n.grid);
  bool last = channels_last(p.x), widened = p.dtype != accumulation(p.dtype);
  bool copies_x = !last || widened || volume(n.kernel) != 1, copies_g = p.phi && (!last || widened);
  int64_t width = padded(n.hidden), ld = leading(n.hidden);
  int64_t tile = tile_size();
  Units units = cut(n.batch, positions, tile, slabbed ? kSlabUnits : kUnits);
  int64_t lanes = cpu::lanes_for(pool, units.last, map_bytes() * (1 + n.hidden / 8));
  int64_t range = p.phi || !p.taps ? 0 : coarse_range(p, tile);

  Weights weights{};
  void* scratch = nullptr;  // a lane's at multiples of scratch_bytes
  int64_t scratch_bytes = 0;

  int64_t target_channels() const { return p.target == Target::x ? n.channels : n.gating; }
  int64_t map_bytes() const { return n.batch * (n.channels * volume(n.x) + n.gating * volume(n.g)) * size_of(p.dtype); }
  // What a tile's operands and hidden rows take should stay in L2.
  int64_t tile_size() const {
    const int64_t floats = 2 * (terms(n) + (p.phi ? n.gating : n.hidden) + (with_d ? target_channels() : 0)) +
                           (1 + split + (backward && !last)) * ld;
    return std::clamp<int64_t>(cpu::l2_bytes() * 3 / 4 / (floats * size) / 16 * 16, 64, 128);
  }

  void take_weights(cpu::Arena& arena) {
    const auto take = [&](int64_t inner) {
      void* columns = arena.take(round_up(inner, 2) * ld, size);
      return Weight{columns, arena.take(width * leading(inner), size), 1};
    };
    weights.theta = take(terms(n));
    if (p.phi) weights.phi = take(n.gating);
    weights.vectors = arena.take(kVectors * width, size);
  }
  void take_scratch(cpu::Arena& arena) {
    lane_scratch(0, &scratch_bytes);
    scratch = arena.take(lanes, scratch_bytes);
  }

  Scratch lane_scratch(int64_t lane, int64_t* bytes = nullptr) const {
    cpu::Arena arena(scratch ? static_cast<std::byte*>(scratch) + lane * scratch_bytes : nullptr);
    Scratch s{};
    s.tile = tile;
    s.ld = leading(tile);
    s.streaming = maps * map_bytes() > 2 * cpu::l3_bytes();
    const auto operand = [&](int64_t channels) {
      return arena.take(last ? tile * leading(channels) : channels * s.ld, size);
    };
    for (int i = 0; i < 2; ++i) {
      if (copies_x && (i == 0 || volume(n.kernel) == 1)) s.x[i] = operand(terms(n));
      if (copies_g) s.g[i] = operand(n.gating);
      if (with_d && (!last || widened)) s.d[i] = operand(target_channels());
    }
    s.t = arena.take(tile * ld, size);
    if (split) s.u = arena.take(tile * ld, size);
    if (backward && !last) s.columns = arena.take(width * s.ld, size);
    for (void** row : {&s.alpha, &s.dq, &s.dalpha}) *row = arena.take(tile, size);
    if (volume(n.kernel) != 1) s.line = arena.take(tile * n.kernel[2], size);
    if (p.dtype == DType::bfloat16) {
      const int64_t most = std::max(terms(n), p.phi ? n.gating : 0);
      s.pairs = arena.take(last ? tile / 2 * leading(most) : round_up(most, 2) / 2 * s.ld, size);
      for (int i = 0; backward && i < 1 + split; ++i) s.rounded[i] = arena.take(tile * ld, size);
    }
    if (range) {
      s.coarse = arena.take(range * ld, size);
      s.coarse_ld = leading(range);
      s.coarse_columns = arena.take(width * s.coarse_ld, size);
    }
    if (bytes) *bytes = arena.used();
    return s;
  }

  void* at(void* base, int64_t elements) const { return static_cast<std::byte*>(base) + elements * size; }

  // f(some units, scratch); how many at once changes no result
  template <class F>
  void each_units(const F& f) const {
    const int64_t runs = std::min(units.last, lanes == 1 ? 1 : kRuns * lanes);
    cpu::share(pool, lanes, runs, [&](int64_t i, int64_t lane) { f(part(i, runs), lane_scratch(lane)); });
  }
  Units part(int64_t i, int64_t of) const {
    Units some = units;
    some.first = units.last * i / of;
    some.last = units.last * (i + 1) / of;
    return some;
  }
};

// Units that sum the weights' gradients, or vectors, together: few enough that the sums stay small beside the maps.
struct Groups {
  int64_t count = 0, elements = 0;
  void* data = nullptr;

  // `elements` of all sums of one group
  void take(cpu::Arena& arena, const Call& call, int64_t all) {
    elements = all;
    count = 8;
    while (count < kUnits && 2 * count * elements * call.size <= call.map_bytes() / 16) count *= 2;
    count = std::max<int64_t>(1, std::min(count, call.units.last));
    data = arena.take(count * elements, call.size);
  }
  // f(group's units, sums, scratch)
  template <class F>
  void each(const Call& call, const F& f) const {
    cpu::share(call.pool, call.lanes, count, [&](int64_t group, int64_t lane) {
      void* own = call.at(data, group * elements);
      std::memset(own, 0, static_cast<size_t>(elements * call.size));
      f(call.part(group, count), own, call.lane_scratch(lane));
    });
  }
  // out = the sum over groups of n elements from `first`; out may be the first group's
  void add(const Call& call, int64_t first, int64_t n, void* out) const {
    cpu::share(call.pool, call.lanes, ceil_div(n, kMergePiece), [&](int64_t i, int64_t) {
      const int64_t at = i * kMergePiece;
      call.kernels.add(accumulation(call.p.dtype), call.at(data, first + at), elements, count, call.at(out, at),
                       std::min(kMergePiece, n - at));
    });
  }
};

}  // namespace attnkern::attention_gate
