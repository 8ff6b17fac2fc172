#include "ops/softmax_pool/plan.h"

#include <algorithm>
#include <string>

#include "core/divide.h"
#include "core/plan_registry.h"
#include "cuda/device_query.h"

namespace attnkern::softmax_pool {
namespace {

// Tuning, apart from the algorithm.
constexpr int kMostItems = 64;             // of a tile
constexpr int kProductQueries = 16;        // of the gated product: each warp has sums of its own for all of them
constexpr int kFewQueries = 4;             // so many share what is read of a tile without tensor cores
constexpr int64_t kLeastPieceTiles = 2;    // a piece pays for its start and its merge
constexpr int64_t kChunkBytes = 32 << 20;  // of the gated scorer's hidden gradients: they stay in L2

int pack_of(const Problem& p) { return 16 / p.dtype_bytes; }

int64_t row_bytes(const Problem& p, int64_t width) { return ((width / pack_of(p)) | 1) * 16; }

int64_t array_bytes(int64_t floats) { return round_up(4 * floats, 16); }

bool many(const Problem& p, const Plan& plan) { return plan.product && p.scorer == Scorer::dot; }

// Of a block; its groups of threads hand sums over in the memory of its tiles.
int64_t shared_bytes(const Problem& p, const Plan& plan, int64_t tile) {
  const int64_t items =
      plan.stages * tile * (row_bytes(p, plan.value_width) + (p.keyed ? row_bytes(p, plan.key_width) : 0));
  const int64_t by_warp = plan.product ? array_bytes(plan.threads / 32 * tile * plan.padded_queries) : 0;
  const int64_t rows = plan.padded_queries, handed = array_bytes(int64_t{plan.threads} * 4 * pack_of(p));
  if (p.direction == Direction::forward)
    return 3 * array_bytes(rows) + std::max(items + array_bytes(tile * rows) + by_warp, handed);
  if (many(p, plan)) {  // two parts of the queries, dz, powers of two, sums of every warp
    const int64_t operands = kManyQueries * (2 * row_bytes(p, plan.key_width) + row_bytes(p, plan.value_width));
    return items + operands + array_bytes(kManyQueries) + 2 * by_warp;
  }
  const bool layered = p.scorer == Scorer::additive || p.scorer == Scorer::gated;
  return std::max(items + 2 * array_bytes(tile * rows) + (layered ? array_bytes(tile * p.sizes.hidden) : 0) + by_warp,
                  handed);
}

// Queries whose sums over `width` features a block's registers hold (Accumulator in sums.cuh).
int64_t held_queries(const Problem& p, const Plan& plan, bool one) {
  const int64_t width = p.direction == Direction::forward ? plan.value_width : plan.key_width;
  const int64_t rounds = kAccumulators / ((one ? 1 : 4) * pack_of(p));
  return plan.threads * rounds / (width / pack_of(p)) * (one ? 1 : 4);
}

// Blocks of a wave: all that the device holds at once.
int64_t slots_of(const Plan& plan, const cuda::DeviceProperties& device) {
  return int64_t{device.sm_count} * std::max(plan.blocks_per_sm, 1);
}

// Pieces of a sample: as few as fill the last wave. A piece costs a tile to start, and its partial sums are merged.
int64_t choose_pieces(const Problem& p, const Plan& plan, const cuda::DeviceProperties& device, int64_t groups) {
  const int64_t tiles = ceil_div(p.sizes.items, plan.tile), slots = slots_of(plan, device);
  const int64_t most = std::max<int64_t>(1, std::min(tiles / kLeastPieceTiles, ceil_div(2 * slots, groups)));
  int64_t best = 1;
  double least = -1;
  for (int64_t pieces = 1; pieces <= most; ++pieces) {
    const int64_t waves = ceil_div(groups * pieces, slots);
    const double time = double(waves) * (ceil_div(tiles, pieces) + 1) + (pieces > 1 ? 2.0 : 0.0);
    if (least < 0 || time < 0.97 * least) {
      best = pieces;
      least = time;
    }
  }
  return best;
}

// Tiles as long as fit. Two blocks an SM where the shortest do, so that one's loads hide the other's barriers. The
// gated product reads V and U from L2 once a tile: its tiles are long before they are two.
void choose_tile(const Problem& p, Plan& plan, const cuda::DeviceProperties& device) {
  const int64_t whole = device.shared_bytes_per_block;
  plan.stages = 2;
  if (plan.product && p.scorer == Scorer::gated) {
    plan.blocks_per_sm = 1;
    for (plan.tile = kMostItems; plan.tile > 16 && plan.tile / 2 >= p.sizes.items;) plan.tile /= 2;
    for (; plan.tile > 16; plan.tile /= 2)
      for (plan.stages = 2; plan.stages > 0; --plan.stages)
        if (shared_bytes(p, plan, plan.tile) <= whole) return;
    plan.stages = 2;
    if (shared_bytes(p, plan, plan.tile) > whole) plan.stages = 1;
    return;
  }
  const int64_t half = std::min<int64_t>(whole, device.shared_bytes_per_sm / 2 - 1024);
  plan.tile = plan.product ? 16 : 4;
  const bool two = p.direction == Direction::forward && !plan.product && shared_bytes(p, plan, plan.tile) <= half;
  const int64_t limit = two ? half : whole;
  plan.blocks_per_sm = two && plan.threads < kMostThreads ? 2 : 1;
  if (plan.product && shared_bytes(p, plan, plan.tile) > whole) plan.stages = 1;
  while (plan.tile < kMostItems && shared_bytes(p, plan, 2 * plan.tile) <= limit && plan.tile < p.sizes.items)
    plan.tile *= 2;
}

// Takes the tensor cores for 16-bit items, where a tile of 16 of them fits: for the gated scorer, and for the scores
// and sums of many queries. Backward only of a single block of these, for all queries' terms meet in an item's
// gradient.
void take_product(const Problem& p, Plan& plan, const cuda::DeviceProperties& device) {
  if (p.dtype_bytes != 2) return;
  Plan with = plan;
  with.product = true;
  const bool backward = p.direction == Direction::backward;
  with.stages = p.scorer == Scorer::gated || backward ? 1 : 2;  // at least
  if (p.scorer == Scorer::gated) {
    if (plan.padded_queries > kProductQueries || plan.threads != kProductThreads) return;
    with.value_width = with.key_width = static_cast<int>(round_up(p.sizes.features, 32));
  } else {
    if (p.scorer != Scorer::dot || p.sizes.queries <= kFewQueries) return;
    if (backward && p.sizes.queries > kManyQueries) return;
    with.value_width = static_cast<int>(round_up(p.sizes.features, kManyStep));
    with.key_width = p.keyed ? static_cast<int>(round_up(p.sizes.hidden, kManyStep)) : with.value_width;
    with.threads = kProductThreads;
    const auto [least, most] = std::minmax(with.value_width, with.key_width);
    constexpr int features = kProductThreads / 32 * kManyStep;  // a step for every warp
    if (least < features || most > kManySteps * features) return;
    with.block_queries = with.padded_queries = kManyQueries;
    with.query_blocks = static_cast<int>(ceil_div(p.sizes.queries, kManyQueries));
    with.held = true;
  }
  if (shared_bytes(p, with, 16) <= device.shared_bytes_per_block) plan = with;
}

}  // namespace

Plan make_plan(const Problem& p, const cuda::DeviceProperties& device, const Force& force) {
  Plan plan{};
  plan.force = force;
  const Sizes& n = p.sizes;
  const int64_t pack = pack_of(p);
  const bool backward = p.direction == Direction::backward;
  plan.value_width = static_cast<int>(round_up(n.features, pack));
  plan.key_width = p.keyed ? static_cast<int>(round_up(n.hidden, pack)) : plan.value_width;

  const int64_t padded = n.queries == 1 ? 1 : round_up(n.queries, 4);
  plan.block_queries = static_cast<int>(padded);
  // 256 threads, so that two blocks share an SM, where their registers hold the sums; else 512.
  plan.threads = 256;
  while (!backward && plan.threads < kMostThreads && held_queries(p, plan, padded == 1) < padded) plan.threads *= 2;
  if (!backward) plan.block_queries = static_cast<int>(std::min(padded, held_queries(p, plan, padded == 1)));
  if (plan.block_queries == 0) return plan;  // not even one: the launcher refuses
  plan.query_blocks = backward ? 1 : static_cast<int>(ceil_div(n.queries, plan.block_queries));
  if (!backward && padded > 1)  // blocks of the same size
    plan.block_queries = static_cast<int>(round_up(ceil_div(n.queries, plan.query_blocks), 4));
  plan.padded_queries = plan.block_queries;

  plan.held = !backward || p.scorer != Scorer::dot || padded <= held_queries(p, plan, padded == 1);
  take_product(p, plan, device);
  choose_tile(p, plan, device);
  if (force.tile) plan.tile = force.tile;
  plan.shared_bytes = static_cast<int>(std::min<int64_t>(shared_bytes(p, plan, plan.tile), INT32_MAX));

  const int64_t groups = std::max<int64_t>(1, (p.ragged ? 1 : n.batch) * n.heads * plan.query_blocks);
  int64_t pieces = force.pieces ? force.pieces : choose_pieces(p, plan, device, groups);
  plan.length = std::max<int64_t>(plan.tile, round_up(ceil_div(n.items, pieces), plan.tile));
  if (backward && p.scorer == Scorer::gated) {  // a chunk has units for every block of a wave
    const int64_t chunk_items = kChunkBytes / std::max<int64_t>(2 * n.hidden * p.dtype_bytes, 1);
    const int64_t share = chunk_items / slots_of(plan, device) / plan.tile * plan.tile;
    plan.length = std::min(plan.length, std::max<int64_t>(share, plan.tile));
  }
  plan.pieces = p.ragged ? 0 : std::max<int64_t>(1, ceil_div(n.items, plan.length));
  plan.units = p.ragged ? n.batch + n.items / plan.length : n.batch * plan.pieces;
  plan.block_units = 1;
  // Gradients that all samples share: as many partial sums as blocks run at once.
  if (p.summed) plan.block_units = std::max<int64_t>(1, plan.units * n.heads / slots_of(plan, device));
  if (p.scorer == Scorer::gated) plan.block_units = 1;
  const int64_t blocks = ceil_div(plan.units, plan.block_units);
  plan.slots = p.summed ? blocks : plan.units;
  plan.grid = blocks * n.heads * plan.query_blocks;
  const int64_t products = ceil_div(n.hidden, kProductSize) * ceil_div(n.features, kProductSize) * 2;
  const int64_t unit_bytes = plan.length * 2 * n.hidden * p.dtype_bytes;
  plan.chunk_units =
      std::clamp<int64_t>(kChunkBytes / std::max<int64_t>(unit_bytes, 1), 1, std::max<int64_t>(plan.units, 1));
  if (p.scorer == Scorer::gated) plan.slots = plan.chunk_units;
  plan.splits = static_cast<int>(std::clamp<int64_t>(2 * device.sm_count / std::max<int64_t>(products, 1), 1,
                                                     std::min<int64_t>(16, plan.chunk_units)));
  return plan;
}

namespace {

Problem problem_of(const Inputs& p, Direction direction) {
  return {direction, p.scorer, p.sizes, size_of(p.dtype), p.keys.data != nullptr, p.offsets != nullptr, false};
}

}  // namespace

Problem problem_of(const ForwardParams& params) { return problem_of(params, Direction::forward); }

Problem problem_of(const BackwardParams& params) {
  Problem p = problem_of(params, Direction::backward);
  p.summed = params.dw || params.dV || (params.dquery && params.query.stride_batch == 0);
  return p;
}

namespace {

PlanAnswer answer(const PlanQuery& query, Direction direction) {
  Problem p{};
  p.direction = direction;
  p.scorer = query.get<Scorer>("scorer", Scorer::given);
  p.sizes = {query.get("batch", 1),   query.get("heads", 1),    query.get("items", 1),
             query.get("queries", 1), query.get("features", 1), query.get("hidden", 0)};
  p.dtype_bytes = query.get<int>("dtype_bytes", 4);
  p.keyed = query.get<bool>("keyed", false);
  p.ragged = query.get<bool>("ragged", false);
  p.summed = query.get<bool>("summed", false);
  const cuda::DeviceProperties device = cuda::device_of(query);
  const Plan plan = make_plan(p, device, {query.get("force_pieces", 0), query.get<int>("force_tile", 0)});
  return {
      {"threads", std::to_string(plan.threads)},
      {"product", std::to_string(plan.product)},
      {"held", std::to_string(plan.held)},
      {"stages", std::to_string(plan.stages)},
      {"tile", std::to_string(plan.tile)},
      {"value_width", std::to_string(plan.value_width)},
      {"key_width", std::to_string(plan.key_width)},
      {"block_queries", std::to_string(plan.block_queries)},
      {"query_blocks", std::to_string(plan.query_blocks)},
      {"length", std::to_string(plan.length)},
      {"pieces", std::to_string(plan.pieces)},
      {"units", std::to_string(plan.units)},
      {"block_units", std::to_string(plan.block_units)},
      {"slots", std::to_string(plan.slots)},
      {"chunk_units", std::to_string(plan.chunk_units)},
      {"grid", std::to_string(plan.grid)},
      {"shared_bytes", std::to_string(plan.shared_bytes)},
      {"blocks_per_sm", std::to_string(plan.blocks_per_sm)},
  };
}

const RegisterPlan forward_plan("softmax_pool_forward",
                                [](const PlanQuery& query) { return answer(query, Direction::forward); });
const RegisterPlan backward_plan("softmax_pool_backward",
                                 [](const PlanQuery& query) { return answer(query, Direction::backward); });

}  // namespace
}  // namespace attnkern::softmax_pool
