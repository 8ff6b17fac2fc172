// What forward and backward on the CPU share: how the items are cut into units, and how threads take them.
#pragma once

#include <algorithm>

#include "cpu/share.h"
#include "ops/softmax_pool/cpu_kernels.h"

namespace attnkern::softmax_pool {

constexpr int64_t kUnits = 64;                 // units to share among threads, where the items suffice
constexpr int64_t kUnitBytes = 1 << 18;        // of items; a unit's partial sums and their merge then cost little
constexpr int64_t kRowTileBytes = 1 << 16;     // a tile is read two to four times: from L2 at worst
constexpr int64_t kGatedTile = 96;             // eight register tiles of 12 rows; 200 KB of hidden rows of 2 x 256
constexpr int64_t kColumnTileBytes = 1 << 18;  // sums along items want rows of 1 KB

inline bool is_columns(const Inputs& p) {
  return p.sizes.features == 1 ? p.values.stride_item == 1 : p.values.stride_feature != 1;
}

inline int64_t item_bytes(const Inputs& p) {
  return (p.sizes.features + (p.keys.data ? p.sizes.hidden : 0)) * size_of(p.dtype);
}

inline int64_t total_bytes(const Inputs& p) {
  return item_bytes(p) * p.sizes.items * p.sizes.heads * (p.offsets ? 1 : p.sizes.batch);
}

// What the work is worth in bytes of items that are merely read: a hidden layer takes 2 K multiplications an element.
inline int64_t work_bytes(const Inputs& p) {
  return total_bytes(p) * (p.scorer == Scorer::gated ? 1 + p.sizes.hidden / 8 : 1);
}

// How the items are cut, the same for any number of threads.
struct Cut {
  int64_t tile, chunk;
  int64_t spans;  // chunks of all samples or bags, some of them empty
  int64_t parts;  // at most so many are of rows that have several

  explicit Cut(const Inputs& p) {
    const Sizes& n = p.sizes;
    const int64_t bytes = std::max<int64_t>(1, item_bytes(p));
    tile = std::clamp<int64_t>((is_columns(p) ? kColumnTileBytes : kRowTileBytes) / bytes / 16 * 16, 16, 256);
    if (p.scorer == Scorer::gated) tile = kGatedTile;
    const int64_t rows = n.heads * (p.offsets ? 1 : n.batch);
    chunk = std::max(
        {16 * n.queries, (p.scorer == Scorer::gated ? 0 : kUnitBytes / bytes), ceil_div(n.items * rows, kUnits), tile});
    if (!p.offsets && n.items) chunk = ceil_div(n.items, ceil_div(n.items, chunk));  // equal ones
    chunk = round_up(chunk, tile);
    const int64_t total = p.offsets ? n.items : n.items * n.batch;
    spans = total / chunk + n.batch;
    parts = n.items <= chunk ? 0 : 2 * total / chunk + 1;
  }
};

// A sample's or bag's items and chunks.
struct Bag {
  int64_t begin, end;  // in the row of all samples' items
  int64_t first_span, first_part, count;
};

// One operator call: what forward and backward share.
template <class Params>
struct Call {
  const Params& p;
  const ThreadPool& pool;
  const CpuKernels& kernels;
  Cut cut{p};
  int64_t size = size_of(accumulation(p.dtype));
  int64_t* bounds = nullptr;  // of bags: offsets that stay within 0..N and do not decrease
  int64_t lanes = 1;          // threads that take units
  void* scratch = nullptr;    // a lane's at multiples of scratch_bytes
  int64_t scratch_bytes = 0;

  void take_common(cpu::Arena& arena) {
    const Sizes& n = p.sizes;
    bounds = static_cast<int64_t*>(arena.take(p.offsets ? n.batch + 1 : 0, sizeof(int64_t)));
    lanes = cpu::lanes_for(pool, cut.spans * n.heads, work_bytes(p));
  }

  void read_offsets() const {
    if (!p.offsets) return;
    int64_t last = 0;
    for (int64_t b = 0; b <= p.sizes.batch; ++b)
      bounds[b] = last = std::clamp<int64_t>(p.offsets[b], last, p.sizes.items);
  }

  Bag bag(int64_t b) const {
    const int64_t begin = p.offsets ? bounds[b] : b * p.sizes.items;
    const int64_t end = p.offsets ? bounds[b + 1] : begin + p.sizes.items;
    return {begin, end, begin / cut.chunk + b, 2 * begin / cut.chunk, ceil_div(end - begin, cut.chunk)};
  }

  // f(unit, bag) for unit i of spans x heads, if it has items
  template <class F>
  void with_unit(int64_t i, const F& f) const {
    const int64_t span = i / p.sizes.heads;
    int64_t b = 0;  // the last whose first span is not beyond
    for (int64_t end = p.sizes.batch; end - b > 1;) {
      const int64_t middle = b + (end - b) / 2;
      (bag(middle).first_span <= span ? b : end) = middle;
    }
    const Bag own = bag(b);
    if (span - own.first_span >= own.count) return;
    const int64_t start = p.offsets ? own.begin : 0, begin = start + (span - own.first_span) * cut.chunk;
    f(Unit{b, i % p.sizes.heads, begin, std::min(begin + cut.chunk, start + own.end - own.begin)}, own,
      span - own.first_span);
  }

  void* take_panels(cpu::Arena& arena, bool back) const {
    if (p.scorer != Scorer::gated) return nullptr;
    const int64_t columns = hidden_columns(p), features = p.sizes.features;
    return arena.take(back ? columns * round_up(features, kBlockColumns) : columns * features, size);
  }

  void pack(void* panels, bool back) const {
    if (!panels) return;
    cpu::share(pool, lanes, ceil_div(back ? p.sizes.features : hidden_columns(p), kBlockColumns),
               [&](int64_t block, int64_t) { kernels.pack(p, back, block, panels); });
  }

  // Whether one of the M rows of sample and head `i` has a peak.
  bool any_peak(const void* top, int64_t i) const {
    const int64_t rows = rows_of(p);
    for (int64_t row = i * p.sizes.queries; row < (i + 1) * p.sizes.queries; ++row)
      if (size == sizeof(double) ? has_peak<double>(top, rows, row) : has_peak<float>(top, rows, row)) return true;
    return false;
  }

  cpu::Arena lane_arena(int64_t lane) const {
    return cpu::Arena(scratch ? static_cast<std::byte*>(scratch) + lane * scratch_bytes : nullptr);
  }

  void* at(void* base, int64_t index, int64_t width) const {
    return base ? static_cast<std::byte*>(base) + index * width * size : nullptr;
  }
};

}  // namespace attnkern::softmax_pool
