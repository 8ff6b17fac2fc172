// Backward: one pass over the items, then the sums of blocks; the gated scorer goes through its hidden layer in chunks.
#include <algorithm>
#include <utility>

#include "ops/softmax_pool/backward.cuh"
#include "ops/softmax_pool/hidden.cuh"
#include "ops/softmax_pool/many_queries_backward.cuh"

namespace attnkern::softmax_pool {
namespace {

// dq (held queries from `first` on) from or to the sums of this block.
template <class Acc, class F>
ATTNKERN_DEVICE void each_held(Acc& dq, const Sizes& n, int first, const F& f) {
  dq.each([&](int m, int k, auto&& value) {
    if (first + m < n.queries && k < n.hidden) f((first + m) * n.hidden + k, value);
  });
}

struct NoRows {
  ATTNKERN_DEVICE NoRows(SharedArena&, const Plan&) {}
};

// Computes   p = softmax(l), dl = p (dp - delta), de = scale dl + dscores; dvalues = sum_m p dz and, through the
//            scorer, dkeys (dvalues where there are none) and a block's sums of dquery, dw, db_V, db_U
// Layout     values [B, H, N, D] or [B, H, D, N], keys likewise; dz [B, H, M, D]
// Mapping    a block: consecutive pieces of the items, a head, all queries. Tiles of items in shared memory, two
//            stages; a warp scores 4 items, a thread owns features of dvalues and dkeys (of 4 items) and of dquery
// Traffic    items once, their gradients once; queries, dz and weights from L2 once a tile, many queries once a piece
// Numerics   float; dquery by tiles in order
//            Many queries of 16-bit items: all five products on the tensor cores (many_queries_backward.cuh)
template <class T, class ScorerT, int Rows>
ATTNKERN_KERNEL(kProductThreads, 1)  // at 128 registers, for two blocks an SM, it spills up to 1128 bytes
softmax_pool_bwd_kernel(ATTNKERN_GRID_CONSTANT const BackwardParams p, ATTNKERN_GRID_CONSTANT const Plan plan,
                        const Sums sums, const Hidden hidden, const T* packed, const Deltas deltas) {
  constexpr bool product = std::is_same_v<ScorerT, GatedProductScorer>;
  constexpr bool gated = ScorerT::kind == Scorer::gated, dot = ScorerT::kind == Scorer::dot;
  constexpr bool additive = ScorerT::kind == Scorer::additive, many = std::is_same_v<ScorerT, ManyQueriesScorer>;
  constexpr bool held = std::is_same_v<ScorerT, DotScorer> || many;
  constexpr int pack = pack_size<T>();
  const Sizes& n = p.sizes;
  const int64_t block = block_index() / n.heads, head = block_index() % n.heads;
  const bool keyed = p.keys.data != nullptr;
  const int stride = plan.padded_queries, queries = static_cast<int>(n.queries);

  SharedArena arena;
  const Stages<T> value_tiles = take_stages<T>(arena, plan.stages, plan.tile, plan.value_width);
  const Stages<T> key_tiles = keyed ? take_stages<T>(arena, plan.stages, plan.tile, plan.key_width) : value_tiles;
  const int scores = plan.tile * stride * (many ? warp_count() : 1);  // many: of every warp's features
  const Shared<float> weights = arena.take<float>(scores), grads = arena.take<float>(scores);
  const Shared<float> units = arena.take<float>(additive || gated ? plan.tile * static_cast<int>(n.hidden) : 0);
  const Shared<float> by_warp = arena.take<float>(product ? warp_count() * plan.tile * stride : 0);

  const int groups = additive || gated ? HiddenThreads::groups_of(n.hidden, block_size()) : 1;
  const bool shared_query = p.query.stride_batch == 0;
  Gradient<T> g{p, weights, grads, units, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  if (sums.dw) g.dw = sums.dw + (block * n.heads + head) * groups * (gated ? n.queries : 1) * n.hidden;
  if (sums.db_V) g.db_V = sums.db_V + block * groups * n.hidden;
  if (sums.db_U) g.db_U = sums.db_U + block * groups * n.hidden;

  std::conditional_t<many, ManyRows<T>, NoRows> rows(arena, plan);
  std::conditional_t<many, ManySums<T, false>, Accumulator<T, Rows>> dq;
  if constexpr (held) dq.start(stride, plan.key_width);

  const int64_t begin = hidden.first + block * plan.block_units, rest = hidden.last - begin;
  const int64_t end = begin + (rest < plan.block_units ? rest : plan.block_units);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Piece piece = piece_of(p, plan, unit);
    const int64_t batch = items_batch(p, piece.sample), row = (piece.sample * n.heads + head) * n.queries;
    const Span<const T*> value_items = span_of<T>(p.values, batch, head, n.features);
    const Span<const T*> key_items = keyed ? span_of<T>(p.keys, batch, head, n.hidden) : value_items;
    const Matrix<T> dz =
        matrix<pack, T>(static_cast<const T*>(p.dz) + row * n.features, n.features, n.queries, n.features);
    if (sums.dquery)  // dot: the units of a block share the query, whose sums outlast them
      g.dquery = sums.dquery + ((shared_query ? block : unit) * n.heads + head) * groups * n.queries * n.hidden;
    const auto count_of = [&](int64_t item) {
      return static_cast<int>(piece.end - item < plan.tile ? piece.end - item : plan.tile);
    };
    const auto start_tile = [&](int64_t item, int stage) {
      if (item < piece.end) {
        fetch(value_tiles[stage], value_items, item, count_of(item));
        if (keyed) fetch(key_tiles[stage], key_items, item, count_of(item));
      }
      async_commit();
    };

    int stage = 0;
    block_sync();  // the tiles of the unit before were read
    if constexpr (many)
      rows.load(matrix<4, float>(row_of(p.query, piece.sample, head, 0), p.query.stride_query, queries, n.hidden),
                dz.data, dz.features);
    start_tile(piece.begin, 0);
    for (int64_t item = piece.begin; item < piece.end; item += plan.tile, stage ^= plan.stages - 1) {
      async_wait();
      block_sync();  // this tile is there, and the other stage was read
      if (plan.stages == 2) start_tile(item + plan.tile, stage ^ 1);
      const Tile<T> x = value_tiles[stage], keys = key_tiles[stage];
      const View<T> view{p, piece.sample, head, 0, queries, x, keys, item, count_of(item), weights, stride};
      if constexpr (gated) {
        float* const layer = hidden.layer + block * plan.tile * 2 * n.hidden;
        g.layer = layer;
        g.gradients = static_cast<T*>(hidden.gradients) +
                      ((unit - hidden.first) * plan.length + item - piece.begin) * 2 * n.hidden;
        const auto keep = [&](int t, int k, float a, float b) {
          store_global(layer + int64_t{t} * 2 * n.hidden + k, a);
          if (p.U) store_global(layer + (int64_t{t} * 2 + 1) * n.hidden + k, b);
        };
        if constexpr (product)
          ScorerT::score(view, packed, by_warp, keep);
        else
          ScorerT::template score<T>(view, keep);
      } else if constexpr (many) {
        rows.score(x, keys, weights, grads);
      } else {
        ScorerT::template score<Rows>(view);
      }
      if constexpr (!many) sum_features<Rows>(x, dz, [&](int t, int m, float dp) { grads.store(t * stride + m, dp); });
      block_sync();

      for (int m = warp_id(); m < stride; m += warp_count()) {
        const bool real = m < queries;
        const Logits<T> logits(view, real ? m : 0);
        const int64_t at = ((batch * n.heads + head) * n.queries + m) * n.items + item;
        const auto of_row = [&](const void* data) {
          return real ? load_global(static_cast<const float*>(data) + row + m) : 0.0f;
        };
        const float largest = of_row(p.top), top = of_row(static_cast<const float*>(p.top) + rows_of(p));
        const float delta = of_row(deltas.delta), left = of_row(deltas.left);
        const int64_t peak = real ? load_global(deltas.peaks + row + m) : -1;
        for (int t = lane_id(); t < plan.tile; t += kWarpSize) {
          float weight = 0.0f, de = 0.0f;
          if (real && t < view.count) {
            const float l = logits.logit(t, weights.load(t * stride + m) + logits.c);
            const bool itself = item + t == peak;  // its weight is known, however its logit was rounded this time
            weight = itself ? top : expf(l - largest) * top;
            const float dl = weight * (itself ? left : grads.load(t * stride + m) - delta);
            if (p.dlogits) store_global(static_cast<float*>(p.dlogits) + at + t, dl);
            de = logits.scale * dl;
            if (p.dscores) de += load_global(static_cast<const float*>(p.dscores) + at + t);
          }
          weights.store(t * stride + m, weight);
          grads.store(t * stride + m, de);
        }
      }
      block_sync();

      if constexpr (dot) {
        const auto plainly = [](int) { return 1.0f; };
        if constexpr (held) {
          if (p.dquery) dq.add(keys, grads, stride, plainly);
        } else {
          const int most = Accumulator<T, Rows>::capacity(plan.key_width);
          for (int first = 0; first < stride && p.dquery; first += most) {
            dq.start(stride - first < most ? stride - first : most, plan.key_width, false);
            each_held(dq, n, first, [&](int64_t i, float& value) { value = load_global(g.dquery + i); });
            dq.add(keys, grads.slice(first, grads.count - first), stride, plainly);
            each_held(dq, n, first, [&](int64_t i, float value) { store_global(g.dquery + i, value); });
          }
        }
      }
      if constexpr (additive) add_additive(g, view);
      if constexpr (gated) {
        add_gated(g, view, units);
        for (int i = thread_index(); i < view.count * queries && hidden.weights; i += block_size()) {
          const int64_t to = (unit - hidden.first) * plan.length + item - piece.begin;
          store_global(static_cast<T*>(hidden.weights) + to * queries + i,
                       narrow<T>(weights.load(i / queries * stride + i % queries)));
        }
      }
      if constexpr (!gated) {  // whose dvalues wait for the products with V and U
        const Span<T*> dvalues = span_of<T>(p.dvalues, batch, head, n.features);
        const Span<T*> dkeys = span_of<T>(p.dkeys, batch, head, n.hidden);
        block_sync();  // x and the keys were read: their gradients take their place
        if constexpr (many) {
          if (dvalues.data) rows.put_gradients(x, true, !keyed, weights, grads);
          if (keyed && dkeys.data) rows.put_gradients(keys, false, true, weights, grads);
        } else {
          put_gradients<ScorerT>(g, view, dz);
        }
        block_sync();
        if (dvalues.data) put(x, dvalues, item, view.count);
        if (keyed && dkeys.data) put(keys, dkeys, item, view.count);
      }
      if (plan.stages == 1) {
        block_sync();  // the only tile was read
        start_tile(item + plan.tile, 0);
      }
    }
    async_wait();
  }
  if constexpr (held)
    if (p.dquery) {
      block_sync();  // the tiles' memory carries the groups' sums
      dq.merge_groups(Shared<float>::at(0, dq.groups > 1 ? dq.slots * Rows * pack : 0));
      each_held(dq, n, 0, [&](int64_t i, float value) { store_global(g.dquery + i, value); });
    }
}

// ------------------------------------------------------------------ launchers

struct Carved {
  Sums sums{};
  Hidden hidden{};
  void* packed = nullptr;  // V and U, for the tensor cores
  float* dV = nullptr;     // dV and dU [splits, 2, K, D]
  Deltas deltas{};
  float *rest_z = nullptr, *rest_top = nullptr;  // the pool of the rest
  size_t rest, sums_bytes, bytes;  // where that works, and after it backward: its sums come first, to be cleared
};

ForwardParams rest_of(const BackwardParams& p, const Carved& c) {
  ForwardParams rest{p};
  rest.z = c.rest_z;
  rest.top = c.rest_top;
  rest.whole = p.top;
  rest.peaks = c.deltas.peaks;
  if (p.workspace) rest.workspace = static_cast<char*>(p.workspace) + c.rest;
  return rest;
}

Plan rest_plan(const ForwardParams& rest, const Plan& plan, const cuda::DeviceProperties& device) {
  return make_plan(problem_of(rest), device, plan.force);
}

int64_t groups_of(const BackwardParams& p, const Plan& plan) {
  const bool layered = p.scorer == Scorer::additive || p.scorer == Scorer::gated;
  return layered ? HiddenThreads::groups_of(p.sizes.hidden, plan.threads) : 1;
}

bool shares_query(const BackwardParams& p) { return p.query.stride_batch == 0; }

Carved carve(const BackwardParams& p, const Plan& plan, const cuda::DeviceProperties& device, void* base) {
  const Sizes& n = p.sizes;
  Carver carver{base};
  Carved c{};
  c.deltas = {carver.take<float>(rows_of(p)), carver.take<float>(rows_of(p)), carver.take<int64_t>(rows_of(p))};
  c.rest_z = carver.take<float>(rows_of(p) * n.features);
  c.rest_top = carver.take<float>(2 * rows_of(p));
  c.rest = carver.bytes;
  const ForwardParams rest = rest_of(p, c);
  const size_t rest_bytes = c.rest + forward_workspace_cuda(rest, rest_plan(rest, plan, device));
  const auto finish = [&] {
    c.bytes = std::max(carver.bytes, rest_bytes);
    return c;
  };
  if (p.scorer == Scorer::given) return finish();
  const int64_t groups = groups_of(p, plan);
  if (p.dquery)
    c.sums.dquery =
        carver.take<float>((shares_query(p) ? plan.slots : plan.units) * n.heads * groups * n.queries * n.hidden);
  if (p.dw)
    c.sums.dw =
        carver.take<float>(plan.slots * n.heads * groups * (p.scorer == Scorer::gated ? n.queries : 1) * n.hidden);
  if (p.db_V) c.sums.db_V = carver.take<float>(plan.slots * groups * n.hidden);
  if (p.db_U) c.sums.db_U = carver.take<float>(plan.slots * groups * n.hidden);
  if (p.dV) c.dV = carver.take<float>(plan.splits * 2 * n.hidden * n.features);
  c.sums_bytes = carver.bytes - c.rest;
  if (p.scorer == Scorer::gated) {
    const int64_t rows = plan.chunk_units * plan.length;
    if (plan.product) c.packed = carver.take<uint16_t>(packed_size(n.hidden, plan.value_width));
    const int64_t bytes = size_of(p.dtype), blocks = (plan.chunk_units + plan.block_units - 1) / plan.block_units;
    c.hidden.layer = carver.take<float>(blocks * plan.tile * 2 * n.hidden);
    c.hidden.gradients = carver.take<char>(rows * 2 * n.hidden * bytes);
    if (p.dvalues.data) c.hidden.weights = carver.take<char>(rows * n.queries * bytes);
  }
  return finish();
}

template <class T, class S>
Status launch_gated(const BackwardParams& p, const Plan& plan, const Carved& c, void* stream) {
  const bool one = plan.padded_queries == 1;
  T* const packed = static_cast<T*>(c.packed);
  if constexpr (std::is_same_v<S, GatedProductScorer>)
    if (const Status status = launch_pack<T>(p, plan, packed, stream); !status.ok()) return status;
  for (int64_t first = 0; first < plan.units; first += plan.chunk_units) {
    Hidden hidden = c.hidden;
    hidden.first = first;
    hidden.last = first + plan.chunk_units < plan.units ? first + plan.chunk_units : plan.units;
    const int64_t blocks = (hidden.last - first + plan.block_units - 1) / plan.block_units;
    const LaunchConfig config{blocks, plan.threads, plan.shared_bytes};
    Status status =
        one ? launch(softmax_pool_bwd_kernel<T, S, 1>, config, stream, p, plan, c.sums, hidden, packed, c.deltas)
            : launch(softmax_pool_bwd_kernel<T, S, 4>, config, stream, p, plan, c.sums, hidden, packed, c.deltas);
    if (status.ok() && p.dvalues.data) status = launch_hidden_values<T>(p, plan, hidden, stream);
    if (status.ok() && p.dV) status = launch_hidden_weights<T>(p, plan, hidden, c.dV, stream);
    if (!status.ok()) return status;
  }
  return {};
}

// What a call without samples writes: parameters that it shares with others have gradients of zero.
Status clear_gradients(const BackwardParams& p, void* stream) {
  const Sizes& n = p.sizes;
  const int64_t shared = shares_query(p) ? n.heads * n.queries * n.hidden : 0, matrix = n.hidden * n.features;
  const std::pair<void*, int64_t> outputs[] = {
      {p.dquery, shared}, {p.dV, matrix},     {p.dU, matrix},
      {p.db_V, n.hidden}, {p.db_U, n.hidden}, {p.dw, (p.scorer == Scorer::gated ? n.queries : 1) * n.hidden}};
  for (const auto& [out, count] : outputs) {
    if (out == nullptr) continue;
    if (const Status status = fill_bytes(out, 0, count * sizeof(float), stream); !status.ok()) return status;
  }
  return {};
}

// The pool of the rest, of which a call without peaks runs no block to its end, then what its rows leave.
Status launch_deltas(const BackwardParams& p, const Plan& plan, const Carved& c, const cuda::DeviceProperties& device,
                     void* stream) {
  const ForwardParams rest = rest_of(p, c);
  Status status = fill_bytes(c.deltas.peaks, 0xff, rows_of(p) * sizeof(int64_t), stream);
  if (status.ok()) status = launch_forward_cuda(rest, rest_plan(rest, plan, device), stream);
  return status.ok() ? launch_delta(p, c.rest_z, c.rest_top, c.deltas, stream) : status;
}

Status launch_reductions(const BackwardParams& p, const Plan& plan, const Carved& c, void* stream) {
  const Sizes& n = p.sizes;
  const int64_t groups = groups_of(p, plan), queries = p.scorer == Scorer::gated ? n.queries : 1;
  const auto to = [](void* out) { return static_cast<float*>(out); };
  Reduction list[6];
  if (p.dquery)
    list[0] = {c.sums.dquery,
               to(p.dquery),
               n.queries * n.hidden,
               (shares_query(p) ? 1 : n.batch) * n.heads,
               n.heads,
               groups,
               shares_query(p) ? plan.slots : 0};
  if (p.dw) list[1] = {c.sums.dw, to(p.dw), queries * n.hidden, 1, 1, n.heads * groups, plan.slots};
  if (p.db_V) list[2] = {c.sums.db_V, to(p.db_V), n.hidden, 1, 1, groups, plan.slots};
  if (p.db_U) list[3] = {c.sums.db_U, to(p.db_U), n.hidden, 1, 1, groups, plan.slots};
  if (p.dV) list[4] = {c.dV, to(p.dV), n.hidden * n.features, 1, 2, 1, plan.splits};
  if (p.dU) list[5] = {c.dV + n.hidden * n.features, to(p.dU), n.hidden * n.features, 1, 2, 1, plan.splits};
  for (const Reduction& r : list) {
    if (r.out == nullptr) continue;
    if (const Status status = launch_reduce(p, plan, r, stream); !status.ok()) return status;
  }
  return {};
}

}  // namespace

size_t backward_workspace_cuda(const BackwardParams& p, const Plan& plan) {
  cuda::DeviceProperties device;
  return device_properties(device).ok() ? carve(p, plan, device, nullptr).bytes : 0;
}

Status launch_backward_cuda(const BackwardParams& p, const Plan& plan, void* stream) {
  if (p.sizes.batch == 0) return clear_gradients(p, stream);
  cuda::DeviceProperties device;
  if (const Status status = device_properties(device); !status.ok()) return status;
  if (!fits(plan, device)) return kTooLarge;
  const Carved c = carve(p, plan, device, p.workspace);
  if (const Status status = launch_deltas(p, plan, c, device, stream); !status.ok()) return status;
  if (const Status status = fill_bytes(static_cast<char*>(p.workspace) + c.rest, 0, c.sums_bytes, stream); !status.ok())
    return status;
  const Status status = visit_scorer(p.dtype, p.scorer, plan, [&](auto type, auto scorer) -> Status {
    using T = decltype(type);
    using S = decltype(scorer);
    if constexpr (S::kind == Scorer::gated) {
      return launch_gated<T, S>(p, plan, c, stream);
    } else {
      const LaunchConfig config{plan.grid, plan.threads, plan.shared_bytes};
      const Hidden all{0, plan.units};
      const T* const packed = nullptr;
      if constexpr (std::is_same_v<S, DotScorer> && sizeof(T) == 2)
        if (plan.product)
          return launch(softmax_pool_bwd_kernel<T, ManyQueriesScorer, kManyQueries>, config, stream, p, plan, c.sums,
                        all, packed, c.deltas);
      if constexpr (!std::is_same_v<S, DotManyScorer>)
        if (plan.padded_queries == 1)
          return launch(softmax_pool_bwd_kernel<T, S, 1>, config, stream, p, plan, c.sums, all, packed, c.deltas);
      return launch(softmax_pool_bwd_kernel<T, S, 4>, config, stream, p, plan, c.sums, all, packed, c.deltas);
    }
  });
  return status.ok() ? launch_reductions(p, plan, c, stream) : status;
}

size_t backward_workspace_cuda(const BackwardParams& p) {
  cuda::DeviceProperties device;
  if (!device_properties(device).ok()) return 0;
  return backward_workspace_cuda(p, make_plan(problem_of(p), device));
}

Status launch_backward_cuda(const BackwardParams& p, void* stream) {
  cuda::DeviceProperties device;
  if (const Status status = device_properties(device); !status.ok()) return status;
  return launch_backward_cuda(p, make_plan(problem_of(p), device), stream);
}

}  // namespace attnkern::softmax_pool
