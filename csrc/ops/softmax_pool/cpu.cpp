// CPU launchers: cut the items of every head into units and give them to threads.
//
// A unit is a chunk of one sample's or bag's items. The chunks depend on the sizes alone, a unit is computed by one
// thread in a fixed order, and what several units add to is merged in their order: results have the same bits for any
// number of threads, which take units as they become free.
#include <algorithm>
#include <cstring>

#include "cpu/cache.h"
#include "cpu/share.h"
#include "ops/softmax_pool/cpu_kernels.h"

namespace attnkern::softmax_pool {
namespace {

constexpr int64_t kUnits = 64;                 // units to share among threads, where the items suffice
constexpr int64_t kUnitBytes = 1 << 18;        // of items; a unit's partial sums and their merge then cost little
constexpr int64_t kRowTileBytes = 1 << 16;     // a tile is read two to four times: from L2 at worst
constexpr int64_t kGatedTile = 96;             // eight register tiles of 12 rows; 200 KB of hidden rows of 2 x 256
constexpr int64_t kColumnTileBytes = 1 << 18;  // sums along items want rows of 1 KB

bool is_columns(const Inputs& p) {
  return p.sizes.features == 1 ? p.values.stride_item == 1 : p.values.stride_feature != 1;
}

int64_t item_bytes(const Inputs& p) {
  return (p.sizes.features + (p.keys.data ? p.sizes.hidden : 0)) * size_of(p.dtype);
}

int64_t total_bytes(const Inputs& p) {
  return item_bytes(p) * p.sizes.items * p.sizes.heads * (p.offsets ? 1 : p.sizes.batch);
}

// What the work is worth in bytes of items that are merely read: a hidden layer takes 2 K multiplications an element.
int64_t work_bytes(const Inputs& p) {
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

  cpu::Arena lane_arena(int64_t lane) const {
    return cpu::Arena(scratch ? static_cast<std::byte*>(scratch) + lane * scratch_bytes : nullptr);
  }

  void* at(void* base, int64_t index, int64_t width) const {
    return base ? static_cast<std::byte*>(base) + index * width * size : nullptr;
  }
};

// ---- forward

struct ForwardCall : Call<ForwardParams> {
  void *parts = nullptr, *panels = nullptr;
  int64_t part_size = round_up(p.sizes.queries, 16) * 2 + round_up(p.sizes.queries * p.sizes.features, 16);

  size_t carve(void* workspace) {
    cpu::Arena arena(workspace);
    take_common(arena);
    panels = take_panels(arena, false);
    parts = arena.take(cut.parts * p.sizes.heads * part_size, size);
    lane_scratch(0, &scratch_bytes);
    scratch = arena.take(lanes, scratch_bytes);
    return static_cast<size_t>(arena.used());
  }

  Scratch lane_scratch(int64_t lane, int64_t* bytes = nullptr) const {
    const Sizes& n = p.sizes;
    cpu::Arena arena = lane_arena(lane);
    Scratch s{};
    s.tile = cut.tile;
    s.scores = arena.take(n.queries * cut.tile, size);
    s.rows = arena.take(n.queries * n.features, size);
    s.largest = arena.take(n.queries, size);
    s.total = arena.take(n.queries, size);
    if (p.scorer == Scorer::gated) {
      s.staged = arena.take(cut.tile * (round_up(n.features, 2) + 16), size);
      s.hidden = arena.take(cut.tile * (hidden_columns(p) + 16), size);
      s.panels = panels;
    }
    if (bytes) *bytes = arena.used();
    return s;
  }

  Partial part(int64_t index) const {
    const int64_t queries = round_up(p.sizes.queries, 16);
    void* base = at(parts, index, part_size);
    return {base, at(base, 1, queries), at(base, 2, queries)};
  }

  void run() const {
    const int64_t heads = p.sizes.heads;
    read_offsets();
    pack(panels, false);
    cpu::share(pool, lanes, cut.spans * heads, [&](int64_t i, int64_t lane) {
      with_unit(i, [&](const Unit& unit, const Bag& own, int64_t index) {
        const Scratch s = lane_scratch(lane);
        if (own.count == 1) return kernels.pool(p, unit, s, nullptr);
        const Partial to = part((own.first_part + index) * heads + unit.h);
        kernels.pool(p, unit, s, &to);
      });
    });
    if (!cut.parts && !p.offsets && p.sizes.items) return;
    cpu::share(pool, lanes, p.sizes.batch * heads, [&](int64_t i, int64_t) {
      const Bag own = bag(i / heads);
      if (own.count == 1) return;
      const int64_t h = i % heads;
      kernels.merge(p, i / heads, h, part(own.first_part * heads + h), part_size * heads, own.count);
    });
  }
};

// ---- backward

struct BackwardCall : Call<BackwardParams> {
  void *query_parts = nullptr, *group_sums = nullptr, *panels = nullptr, *panels_back = nullptr;
  int64_t groups = 0, group_size = 0;
  bool shared_query = p.dquery && p.query.stride_batch == 0 && p.sizes.batch != 1;

  int64_t query_size() const { return p.sizes.queries * p.sizes.hidden; }

  // f(gradient, its elements) for those that all samples add to
  template <class F>
  void each_shared(const F& f) const {
    const Sizes& n = p.sizes;
    if (shared_query) f(p.dquery, n.heads * query_size());
    if (p.dw) f(p.dw, p.scorer == Scorer::gated ? n.queries * n.hidden : n.hidden);
    for (void* bias : {p.db_V, p.db_U})
      if (bias) f(bias, n.hidden);
    for (void* weight : {p.dV, p.dU})
      if (weight) f(weight, n.hidden * n.features);
  }

  // Groups of units sum these apart: few enough that the sums stay small beside the items.
  void choose_groups() {
    const Sizes& n = p.sizes;
    const int64_t units = cut.spans * n.heads;
    each_shared([&](void*, int64_t elements) { group_size += round_up(elements, 16); });
    groups = units;
    if (!group_size) return;
    const int64_t bytes = total_bytes(p);
    groups = 8;
    while (groups < kUnits && 2 * groups * group_size * size <= bytes / 8) groups *= 2;
    groups = std::min(groups, units);
  }

  size_t carve(void* workspace) {
    cpu::Arena arena(workspace);
    take_common(arena);
    choose_groups();
    panels = take_panels(arena, false);
    if (p.dvalues.data) panels_back = take_panels(arena, true);
    const bool by_row = p.dquery && !shared_query;
    query_parts = arena.take(by_row ? cut.parts * p.sizes.heads * query_size() : 0, size);
    group_sums = arena.take(group_size ? groups * group_size : 0, size);
    lane_scratch(0, &scratch_bytes);
    scratch = arena.take(lanes, scratch_bytes);
    return static_cast<size_t>(arena.used());
  }

  Scratch lane_scratch(int64_t lane, int64_t* bytes = nullptr) const {
    const Sizes& n = p.sizes;
    cpu::Arena arena = lane_arena(lane);
    Scratch s{};
    s.tile = cut.tile;
    s.streaming = 2 * total_bytes(p) > cpu::l3_bytes();
    s.scores = arena.take(2 * n.queries * cut.tile, size);
    s.rows = arena.take(2 * n.queries * n.features, size);
    s.coefficients = arena.take(2 * n.queries * cut.tile, size);
    s.deltas = arena.take(2 * n.queries, size);
    if (p.scorer == Scorer::additive) {
      s.items = arena.take(cut.tile * n.hidden, size);
      s.query_sums = arena.take(n.queries, 64);
    }
    if (p.scorer == Scorer::gated) {
      s.items = arena.take(cut.tile * (round_up(n.features, kBlockColumns) + 16), size);
      s.staged = arena.take(cut.tile * (round_up(n.features, 2) + 16), size);
      s.hidden = arena.take(cut.tile * (hidden_columns(p) + 16), size);
      s.products = arena.take(cut.tile * hidden_columns(p), size);
      if (p.dtype == DType::bfloat16)
        s.rounded = arena.take(cut.tile * (hidden_columns(p) + 16 + round_up(n.features, kBlockColumns) / 2), size);
      s.panels = panels;
      s.panels_back = panels_back;
    }
    if (bytes) *bytes = arena.used();
    return s;
  }

  // Where unit `index` of a bag sums the gradient of its own query.
  void* query_sum(const Unit& unit, const Bag& own, int64_t index) const {
    const int64_t heads = p.sizes.heads;
    if (own.count == 1) return at(p.dquery, unit.b * heads + unit.h, query_size());
    return at(query_parts, (own.first_part + index) * heads + unit.h, query_size());
  }

  Sums sums_of(const Unit& unit, const Bag& own, int64_t index, int64_t group) const {
    Sums sums{};
    std::byte* next = static_cast<std::byte*>(at(group_sums, group, group_size));
    const auto take = [&](void* gradient, int64_t elements) {
      void* here = gradient ? next : nullptr;
      if (gradient) next += round_up(elements, 16) * size;
      return here;
    };
    const Sizes& n = p.sizes;
    if (shared_query) sums.dquery = at(take(p.dquery, n.heads * query_size()), unit.h, query_size());
    sums.dw = take(p.dw, p.scorer == Scorer::gated ? n.queries * n.hidden : n.hidden);
    sums.db_V = take(p.db_V, n.hidden);
    sums.db_U = take(p.db_U, n.hidden);
    sums.dV = take(p.dV, n.hidden * n.features);
    sums.dU = take(p.dU, n.hidden * n.features);
    if (p.dquery && !shared_query) {
      sums.dquery = query_sum(unit, own, index);
      std::memset(sums.dquery, 0, query_size() * size);
    }
    return sums;
  }

  void run() const {
    const int64_t units = cut.spans * p.sizes.heads;
    read_offsets();
    pack(panels, false);
    pack(panels_back, true);
    cpu::share(pool, lanes, groups, [&](int64_t group, int64_t lane) {
      if (group_size) std::memset(at(group_sums, group, group_size), 0, group_size * size);
      for (int64_t i = units * group / groups; i < units * (group + 1) / groups; ++i)
        with_unit(i, [&](const Unit& unit, const Bag& own, int64_t index) {
          kernels.unpool(p, unit, lane_scratch(lane), sums_of(unit, own, index, group));
        });
    });
    sum_groups();
    sum_queries();
  }

  void sum_groups() const {
    constexpr int64_t kPiece = 1 << 12;
    int64_t before = 0;
    each_shared([&](void* out, int64_t elements) {
      cpu::share(pool, lanes, ceil_div(elements, kPiece), [&](int64_t i, int64_t) {
        const int64_t n = std::min(kPiece, elements - i * kPiece);
        kernels.add(accumulation(p.dtype), at(group_sums, 1, before + i * kPiece), group_size, groups,
                    at(out, i, kPiece), n);
      });
      before += round_up(elements, 16);
    });
  }

  void sum_queries() const {
    if (!p.dquery || shared_query || (!cut.parts && !p.offsets && p.sizes.items)) return;
    const int64_t heads = p.sizes.heads;
    cpu::share(pool, lanes, p.sizes.batch * heads, [&](int64_t i, int64_t) {
      const Bag own = bag(i / heads);
      if (own.count != 1)
        kernels.add(accumulation(p.dtype), at(query_parts, own.first_part * heads + i % heads, query_size()),
                    heads * query_size(), own.count, at(p.dquery, i, query_size()), query_size());
    });
  }
};

}  // namespace

size_t forward_workspace_cpu(const ForwardParams& params, const ThreadPool& pool) {
  return ForwardCall{{params, pool, cpu_kernels(cpu::Isa::scalar)}}.carve(nullptr);
}

size_t backward_workspace_cpu(const BackwardParams& params, const ThreadPool& pool) {
  return BackwardCall{{params, pool, cpu_kernels(cpu::Isa::scalar)}}.carve(nullptr);
}

Status launch_forward_cpu(const ForwardParams& params, const ThreadPool& pool) {
  if (const char* error = cpu::isa_error()) return {error};
  ForwardCall call{{params, pool, cpu_kernels(cpu::active_isa())}};
  call.carve(params.workspace);
  call.run();
  return {};
}

Status launch_backward_cpu(const BackwardParams& params, const ThreadPool& pool) {
  if (const char* error = cpu::isa_error()) return {error};
  BackwardCall call{{params, pool, cpu_kernels(cpu::active_isa())}};
  call.carve(params.workspace);
  call.run();
  return {};
}

}  // namespace attnkern::softmax_pool
