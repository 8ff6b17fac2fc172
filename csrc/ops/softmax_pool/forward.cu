// Forward: pieces of the items are pooled side by side, then merged in order.
#include "ops/softmax_pool/launch.cuh"
#include "ops/softmax_pool/many_queries.cuh"

namespace attnkern::softmax_pool {
namespace {

struct Nothing {};

// What a piece leaves where its sample has more than one: [units, H, M] and [units, H, M, D].
struct Partial {
  float *largest, *sum, *z;
};

// lse and top of a row, from its largest logit and sum of exponentials.
ATTNKERN_DEVICE void store_row(const ForwardParams& p, int64_t row, float largest, float total) {
  const bool none = total == 0.0f;
  if (p.lse) store_global(static_cast<float*>(p.lse) + row, none ? -INFINITY : logf(total) + largest);
  store_global(static_cast<float*>(p.top) + row, none ? 0.0f : largest);
  store_global(static_cast<float*>(p.top) + rows_of(p) + row, none ? 0.0f : 1.0f / total);
}

// The pool of the rest (params.h): whether a row has a peak, the item whose logit is above all others by its weight.
ATTNKERN_DEVICE bool has_peak(const ForwardParams& p, int64_t row) {
  return load_global(static_cast<const float*>(p.whole) + rows_of(p) + row) > kPeaked;
}
// What only the peak's logit is above.
ATTNKERN_DEVICE float peak_bound(const ForwardParams& p, int64_t row) {
  const auto* whole = static_cast<const float*>(p.whole) + row;
  return has_peak(p, row) ? load_global(whole) + logf(kPeak / load_global(whole + rows_of(p))) : INFINITY;
}

// Computes   z = sum_n p v, lse, top, raw scores; of a piece p = exp(l - largest) and z unnormalised
// Layout     values [B, H, N, D] or [B, H, D, N], keys likewise; z [B, H, M, D]
// Mapping    a block: a piece of the items, a head, a block of queries. Tiles of items in shared memory, two stages; a
//            warp scores 4 items with its lanes along the features, a warp a query makes the weights, a thread owns
//            features of z in registers
// Traffic    items once; queries and weights from L2 once a tile, many queries once
// Numerics   float; sums of a tile, then of tiles in order; running maximum
//            Many queries of 16-bit items: both products on the tensor cores (many_queries.cuh)
template <class T, class ScorerT, int Queries>
ATTNKERN_KERNEL(ScorerT::threads, 1)
softmax_pool_fwd_kernel(ATTNKERN_GRID_CONSTANT const ForwardParams p, ATTNKERN_GRID_CONSTANT const Plan plan,
                        const Partial partial, const T* packed) {
  constexpr bool gated = std::is_same_v<ScorerT, GatedProductScorer>, many = std::is_same_v<ScorerT, ManyQueriesScorer>;
  const int64_t heads = p.sizes.heads, queries = p.sizes.queries, features = p.sizes.features;
  const int block = block_index() % plan.query_blocks;
  const int64_t head = block_index() / plan.query_blocks % heads, unit = block_index() / plan.query_blocks / heads;
  const Piece piece = piece_of(p, plan, unit);
  const bool keyed = p.keys.data != nullptr;
  const int stride = plan.padded_queries;

  SharedArena arena;
  const Shared<float> largest = arena.take<float>(stride), sum = arena.take<float>(stride),
                      factor = arena.take<float>(stride);
  const int reused = arena.offset;  // after the last tile, groups of threads hand their sums over in what follows
  const Stages<T> values = take_stages<T>(arena, plan.stages, plan.tile, plan.value_width);
  const Stages<T> keys = keyed ? take_stages<T>(arena, plan.stages, plan.tile, plan.key_width) : values;
  const Shared<float> e = arena.take<float>(plan.tile * stride);
  const Shared<float> by_warp = arena.take<float>(gated || many ? warp_count() * plan.tile * stride : 0);

  const Span<const T*> value_items = span_of<T>(p.values, items_batch(p, piece.sample), head, features);
  const Span<const T*> key_items =
      keyed ? span_of<T>(p.keys, items_batch(p, piece.sample), head, p.sizes.hidden) : value_items;
  const int64_t query = Queries == 1 ? 0 : int64_t{block} * plan.block_queries;  // the plan pads several to 4
  const int64_t left = queries - query;
  const int own = static_cast<int>(left < plan.block_queries ? left : plan.block_queries);

  const auto row_of = [&](int m) { return (piece.sample * heads + head) * queries + query + m; };
  if (p.whole) {
    bool any = false;
    for (int m = 0; m < own; ++m) any |= has_peak(p, row_of(m));
    if (!any) return;
  }

  const auto count_of = [&](int64_t item) {
    const int64_t rest = piece.end - item;
    return static_cast<int>(rest < plan.tile ? rest : plan.tile);
  };
  const auto start_tile = [&](int64_t item, int stage) {
    if (item < piece.end) {
      fetch(values[stage], value_items, item, count_of(item));
      if (keyed) fetch(keys[stage], key_items, item, count_of(item));
    }
    async_commit();
  };

  std::conditional_t<many, ManySums<T, true>, Accumulator<T, Queries>> z;
  z.start(stride, plan.value_width);
  std::conditional_t<many, ManyQueries<T>, Nothing> parts;
  if constexpr (many)
    parts.load(matrix<2, float>(softmax_pool::row_of(p.query, piece.sample, head, query), p.query.stride_query, own,
                                p.sizes.hidden),
               factor);
  for (int m = thread_index(); m < stride; m += block_size()) {
    largest.store(m, -INFINITY);
    sum.store(m, 0.0f);
  }

  int stage = 0;
  start_tile(piece.begin, 0);
  for (int64_t item = piece.begin; item < piece.end; item += plan.tile, stage ^= plan.stages - 1) {
    async_wait();
    block_sync();  // this tile is there, and the other stage was read
    if (plan.stages == 2) start_tile(item + plan.tile, stage ^ 1);
    const View<T> view{p, piece.sample, head, query, own, values[stage], keys[stage], item, count_of(item), e, stride};
    if constexpr (gated)
      ScorerT::score(view, packed, by_warp, [](int, int, float, float) {});
    else if constexpr (many)
      parts.score(view, by_warp);
    else
      ScorerT::template score<Queries>(view);
    block_sync();
    for (int m = warp_id(); m < stride; m += warp_count()) {
      const bool real = m < own;
      const Logits<T> logits(view, real ? m : 0);
      float* const out =
          p.scores_out && real
              ? static_cast<float*>(p.scores_out) +
                    ((items_batch(p, piece.sample) * heads + head) * queries + query + m) * p.sizes.items + item
              : nullptr;
      const float bound = p.whole && real ? peak_bound(p, row_of(m)) : INFINITY;
      float top = -INFINITY;
      for (int t = lane_id(); t < plan.tile; t += kWarpSize) {
        float l = -INFINITY;
        if (real && t < view.count) {
          const float score = e.load(t * stride + m) + logits.c;
          if (out) store_global(out + t, score);
          l = logits.logit(t, score);
          if (l > bound) {
            store_global(p.peaks + row_of(m), item + t);
            l = -INFINITY;
          }
        }
        e.store(t * stride + m, l);
        top = l > top ? l : top;
      }
      const float before = largest.load(m);
      top = group_max(top);
      top = before > top ? before : top;
      float total = 0.0f;
      for (int t = lane_id(); t < plan.tile; t += kWarpSize) {
        const float l = e.load(t * stride + m);
        const float weight = l == -INFINITY ? 0.0f : expf(l - top);  // NaN passes
        e.store(t * stride + m, weight);
        total += weight;
      }
      total = warp_sum(total);
      warp_sync();  // all lanes have read what lane 0 writes
      if (lane_id() == 0) {
        const float scale = before == -INFINITY ? 0.0f : expf(before - top);
        factor.store(m, scale);
        largest.store(m, top);
        sum.store(m, sum.load(m) * scale + total);
      }
    }
    block_sync();
    z.add(values[stage], e, stride, [&](int m) { return factor.load(m); });
    if (plan.stages == 1) {
      block_sync();  // the only tile was read
      start_tile(item + plan.tile, 0);
    }
  }
  async_wait();
  block_sync();  // no thread reads the tiles any more
  z.merge_groups(Shared<float>::at(reused, z.groups > 1 ? z.slots * Queries * pack_size<T>() : 0));

  const Units units = units_of(p, plan, piece.sample);
  const bool whole = units.last - units.first == 1;
  const int64_t at = (unit * heads + head) * queries + query;
  z.each([&](int m, int d, float value) {
    if (m >= own || d >= features) return;
    const float total = sum.load(m);
    if (!whole)
      store_global(partial.z + (at + m) * features + d, value);
    else
      store_global(static_cast<float*>(p.z) + row_of(m) * features + d, total == 0.0f ? 0.0f : value / total);
  });
  for (int m = thread_index(); m < own; m += block_size()) {
    const float total = sum.load(m), top = largest.load(m);
    if (!whole) {
      store_global(partial.largest + at + m, top);
      store_global(partial.sum + at + m, total);
    } else {
      store_row(p, row_of(m), top, total);
    }
  }
}

constexpr int kMergeThreads = 128;

// Computes   lse = log sum_s exp(largest_s) sum_s, top;  z = sum_s exp(largest_s - lse) z_s
// Layout     partial [units, H, M] and [units, H, M, D]; z [B, H, M, D]
// Mapping    a block: a row of z, 128 of its features; a sample of one piece has its result already
// Traffic    the partial sums once
// Numerics   float; pieces in order
template <class T>
ATTNKERN_KERNEL(kMergeThreads, 4)
softmax_pool_merge_kernel(ATTNKERN_GRID_CONSTANT const ForwardParams p, ATTNKERN_GRID_CONSTANT const Plan plan,
                          const Partial partial, int blocks) {
  const int64_t features = p.sizes.features, rows = p.sizes.heads * p.sizes.queries;
  const int64_t row = block_index() / blocks, sample = row / rows, own = row % rows;
  const Units units = units_of(p, plan, sample);
  if (units.last - units.first == 1 || (p.whole && !has_peak(p, row))) return;
  float top = -INFINITY;
  for (int64_t u = units.first + lane_id(); u < units.last; u += kWarpSize) {
    const float l = load_global(partial.largest + u * rows + own);
    top = l > top ? l : top;
  }
  top = group_max(top);
  const int64_t d = int64_t{block_index() % blocks} * kMergeThreads + thread_index();
  float total = 0.0f, z = 0.0f;
#pragma unroll 4
  for (int64_t u = units.first; u < units.last; ++u) {
    const float largest = load_global(partial.largest + u * rows + own);
    const float factor = largest == -INFINITY ? 0.0f : expf(largest - top);
    total += factor * load_global(partial.sum + u * rows + own);
    if (d < features) z += factor * load_global(partial.z + (u * rows + own) * features + d);
  }
  if (d < features) store_global(static_cast<float*>(p.z) + row * features + d, total == 0.0f ? 0.0f : z / total);
  if (d == 0) store_row(p, row, top, total);
}

struct Carved {
  Partial partial{};
  void* packed = nullptr;  // V and U, for the tensor cores
  size_t bytes;
};

bool merges(const ForwardParams& p, const Plan& plan) { return p.offsets || plan.pieces > 1; }

Carved carve(const ForwardParams& p, const Plan& plan, void* base) {
  Carver carver{base};
  Carved c{};
  if (merges(p, plan)) {
    const int64_t rows = plan.units * p.sizes.heads * p.sizes.queries;
    c.partial.largest = carver.take<float>(rows);
    c.partial.sum = carver.take<float>(rows);
    c.partial.z = carver.take<float>(rows * p.sizes.features);
  }
  if (plan.product && p.scorer == Scorer::gated)
    c.packed = carver.take<uint16_t>(packed_size(p.sizes.hidden, plan.value_width));
  c.bytes = carver.bytes;
  return c;
}

}  // namespace

size_t forward_workspace_cuda(const ForwardParams& p, const Plan& plan) { return carve(p, plan, nullptr).bytes; }

Status launch_forward_cuda(const ForwardParams& p, const Plan& plan, void* stream) {
  if (p.sizes.batch == 0) return {};
  cuda::DeviceProperties device;
  if (const Status status = device_properties(device); !status.ok()) return status;
  if (!fits(plan, device)) return kTooLarge;
  const Carved c = carve(p, plan, p.workspace);
  const Status status = visit_scorer(p.dtype, p.scorer, plan, [&](auto type, auto scorer) -> Status {
    using T = decltype(type);
    using S = std::conditional_t<std::is_same_v<decltype(scorer), DotManyScorer>, DotScorer, decltype(scorer)>;
    const LaunchConfig config{plan.grid, plan.threads, plan.shared_bytes};
    T* const packed = static_cast<T*>(c.packed);
    if constexpr (std::is_same_v<S, GatedProductScorer>)
      if (const Status status = launch_pack<T>(p, plan, packed, stream); !status.ok()) return status;
    if constexpr (std::is_same_v<S, DotScorer> && sizeof(T) == 2)
      if (plan.product)
        return launch(softmax_pool_fwd_kernel<T, ManyQueriesScorer, kManyQueries>, config, stream, p, plan, c.partial,
                      packed);
    return plan.padded_queries == 1
               ? launch(softmax_pool_fwd_kernel<T, S, 1>, config, stream, p, plan, c.partial, packed)
               : launch(softmax_pool_fwd_kernel<T, S, 4>, config, stream, p, plan, c.partial, packed);
  });
  if (!status.ok() || !merges(p, plan)) return status;
  return visit_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t rows = p.sizes.batch * p.sizes.heads * p.sizes.queries;
    const int blocks = static_cast<int>((p.sizes.features + kMergeThreads - 1) / kMergeThreads);
    return launch(softmax_pool_merge_kernel<T>, {rows * blocks, kMergeThreads}, stream, p, plan, c.partial, blocks);
  });
}

size_t forward_workspace_cuda(const ForwardParams& p) {
  cuda::DeviceProperties device;
  if (!device_properties(device).ok()) return 0;
  return forward_workspace_cuda(p, make_plan(problem_of(p), device));
}

Status launch_forward_cuda(const ForwardParams& p, void* stream) {
  cuda::DeviceProperties device;
  if (const Status status = device_properties(device); !status.ok()) return status;
  return launch_forward_cuda(p, make_plan(problem_of(p), device), stream);
}

}  // namespace attnkern::softmax_pool
