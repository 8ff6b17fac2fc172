// CPU launchers: cut the items of every head into units and give them to threads.
//
// A unit is a chunk of one sample's or bag's items. The chunks depend on the sizes alone, a unit is computed by one
// thread in a fixed order, and what several units add to is merged in their order: results have the same bits for any
// number of threads, which take units as they become free.
#include <algorithm>
#include <cstring>

#include "cpu/cache.h"
#include "ops/softmax_pool/cpu_call.h"

namespace attnkern::softmax_pool {
namespace {

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

  // Of the rest, what has rows with a peak.
  bool wanted(int64_t b, int64_t h) const { return !p.whole || any_peak(p.whole, (b * p.sizes.heads + h)); }

  void run() const {
    const int64_t heads = p.sizes.heads;
    read_offsets();
    pack(panels, false);
    cpu::share(pool, lanes, cut.spans * heads, [&](int64_t i, int64_t lane) {
      with_unit(i, [&](const Unit& unit, const Bag& own, int64_t index) {
        if (!wanted(unit.b, unit.h)) return;
        const Scratch s = lane_scratch(lane);
        if (own.count == 1) return kernels.pool(p, unit, s, nullptr);
        const Partial to = part((own.first_part + index) * heads + unit.h);
        kernels.pool(p, unit, s, &to);
      });
    });
    if (!cut.parts && !p.offsets && p.sizes.items) return;
    cpu::share(pool, lanes, p.sizes.batch * heads, [&](int64_t i, int64_t) {
      const Bag own = bag(i / heads);
      const int64_t h = i % heads;
      if (own.count == 1 || !wanted(i / heads, h)) return;
      kernels.merge(p, i / heads, h, part(own.first_part * heads + h), part_size * heads, own.count);
    });
  }
};

// ---- backward

struct BackwardCall : Call<BackwardParams> {
  void *query_parts = nullptr, *group_sums = nullptr, *panels = nullptr, *panels_back = nullptr;
  int64_t groups = 0, group_size = 0;
  bool shared_query = p.dquery && p.query.stride_batch == 0 && p.sizes.batch != 1;
  bool peaked = false;
  ForwardParams rest{p};  // the pool of the rest, in the memory that backward then works in

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
    const int64_t rows = rows_of(p);
    rest.z = arena.take(rows * p.sizes.features, size);
    rest.top = arena.take(2 * rows, size);
    rest.peaks = static_cast<int64_t*>(arena.take(rows, sizeof(int64_t)));
    rest.whole = p.top;
    rest.workspace = arena.take(0, size);
    const int64_t rest_bytes = arena.used() + static_cast<int64_t>(rest_call().carve(nullptr));
    take_common(arena);
    choose_groups();
    panels = take_panels(arena, false);
    if (p.dvalues.data) panels_back = take_panels(arena, true);
    const bool by_row = p.dquery && !shared_query;
    query_parts = arena.take(by_row ? cut.parts * p.sizes.heads * query_size() : 0, size);
    group_sums = arena.take(group_size ? groups * group_size : 0, size);
    lane_scratch(0, &scratch_bytes);
    scratch = arena.take(lanes, scratch_bytes);
    return static_cast<size_t>(std::max(arena.used(), rest_bytes));
  }

  ForwardCall rest_call() const { return {{rest, pool, kernels}}; }

  void pool_rest() {
    for (int64_t i = 0; i < p.sizes.batch * p.sizes.heads && !peaked; ++i) peaked = any_peak(p.top, i);
    if (!peaked) return;
    std::fill_n(rest.peaks, rows_of(p), int64_t{-1});
    ForwardCall call = rest_call();
    call.carve(rest.workspace);
    call.run();
  }

  Scratch lane_scratch(int64_t lane, int64_t* bytes = nullptr) const {
    const Sizes& n = p.sizes;
    cpu::Arena arena = lane_arena(lane);
    Scratch s{};
    s.tile = cut.tile;
    s.peaks = peaked ? rest.peaks : nullptr;
    s.rest_z = rest.z;
    s.rest_top = rest.top;
    s.streaming = 2 * total_bytes(p) > cpu::l3_bytes();
    s.scores = arena.take(2 * n.queries * cut.tile, size);
    s.rows = arena.take(2 * n.queries * n.features, size);
    s.coefficients = arena.take(2 * n.queries * cut.tile, size);
    s.deltas = arena.take(3 * n.queries, sizeof(int64_t));
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

  void run() {
    const int64_t units = cut.spans * p.sizes.heads;
    pool_rest();
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
