#include "ops/attention_gate/plan.h"

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "core/divide.h"
#include "core/plan_registry.h"
#include "cuda/device_query.h"

namespace attnkern::attention_gate {
namespace {

// Tuning, apart from the algorithm.
constexpr int kWarps = kMostThreads / 32;
constexpr int kMostChunk = 128;            // terms of a chunk that is not a whole map
constexpr int kMostBlocks = 4;             // of an SM that a plan counts on
constexpr int64_t kChunkBytes = 24 << 20;  // of hidden gradients, which stay in L2
constexpr int kMostSplits = 64;
constexpr int kMostColumns = 256;  // terms of a block of a gradient's product, for panels of 99 KB at most

int64_t volume_of(const int64_t (&size)[3]) { return size[0] * size[1] * size[2]; }

// Terms of theta x, and of phi g where that is a product.
struct Widths {
  int64_t theta, phi;
};

Widths widths_of(const Problem& p) {
  const Sizes& n = p.sizes;
  const bool product = !p.resampled && p.task != Task::moments;
  return {round_up(volume_of(n.kernel) * round_up(n.channels, kStep), kWarpTile),
          product ? round_up(n.gating, kWarpTile) : 0};
}

// product.cuh's row_stride.
int64_t row_stride(const Problem& p, int64_t width) {
  const int64_t pack = 16 / p.dtype_bytes;
  return (width / pack | 1) * pack;
}

int64_t in_packs(int64_t bytes) { return round_up(bytes, 16); }

// Parts of a weight: of the hidden layer's product, and with the nearest number beside them.
int64_t parts_of(const Problem& p) { return p.dtype_bytes == 2 ? 2 : 1; }
int64_t stored_parts_of(const Problem& p) { return p.dtype_bytes == 2 ? 3 : 1; }

// Shared memory of a block with plan's tile, hidden, whole and chunk; fills in what follows from them.
int64_t lay_out(const Problem& p, Plan& plan, int64_t parts) {
  const Widths widths = widths_of(p);
  const int64_t widest = std::max(widths.theta, widths.phi), maps = widths.phi ? 2 : 1;
  const int64_t chunk = plan.whole ? widest : plan.chunk;
  const int64_t map_stride = row_stride(p, p.last ? chunk : plan.tile), weight_stride = row_stride(p, chunk);
  const int64_t map_size = (p.last ? plan.tile : chunk) * map_stride, weight_size = parts * plan.hidden * weight_stride;
  const int64_t scores =
      p.task == Task::forward ? in_packs(4 * plan.hidden / kWarpTile * plan.tile) + 4 * plan.tile : 0;
  const int64_t bytes = in_packs(kStages * map_size * p.dtype_bytes) +
                        in_packs((plan.whole ? maps : kStages) * weight_size * p.dtype_bytes) + scores;
  const auto narrow = [](int64_t value) { return static_cast<int>(std::min<int64_t>(value, INT32_MAX)); };
  plan.chunk = narrow(chunk);
  plan.map_stride = narrow(map_stride);
  plan.map_size = narrow(map_size);
  plan.weight_stride = narrow(weight_stride);
  plan.weight_size = narrow(weight_size);
  plan.shared_bytes = narrow(bytes);
  return bytes;
}

// Threads of a block, a warp 32 hidden units of a product, or 16.
int threads_of(const Plan& plan) { return (plan.alone ? 2 : 1) * plan.tile / plan.warp_tile * plan.hidden; }

// The same of a block of the fused backward, by lay_out's strides: x and g of a tile or two, d, dt and du, both
// weights; dq, alpha and what dq is added up from.
int64_t lay_out_fused(const Problem& p, Plan& plan) {
  lay_out(p, plan, stored_parts_of(p));
  const int64_t rows = plan.tile * row_stride(p, plan.hidden), maps = plan.alone ? 5 : 3;
  const int64_t bytes = maps * in_packs(int64_t{plan.map_size} * p.dtype_bytes) + 2 * in_packs(rows * p.dtype_bytes) +
                        in_packs(2 * int64_t{plan.weight_size} * p.dtype_bytes) + 2 * in_packs(4 * plan.tile) +
                        in_packs(int64_t{4} * threads_of(plan) * 16 / p.dtype_bytes);
  plan.shared_bytes = static_cast<int>(std::min<int64_t>(bytes, INT32_MAX));
  return bytes;
}

// Hidden units of a pass beside `tile` positions: as many as the block's warps have products for, in even passes.
void choose_hidden(const Problem& p, Plan& plan, int tile, int warps = kMostThreads / 32) {
  const int64_t all = round_up(p.sizes.hidden, kWarpTile), most = int64_t{kWarpTile} * warps / (tile / plan.warp_tile);
  plan.tile = tile;
  plan.passes = static_cast<int>(ceil_div(all, most));
  plan.hidden = static_cast<int>(round_up(ceil_div(all, plan.passes), kWarpTile));
}

// Positions that leave no tile mostly empty, nor more than a quarter of the device without one.
int most_positions(const Problem& p, const cuda::DeviceProperties& device) {
  const int64_t length = volume_of(p.sizes.grid);
  int tile = kMostTile;
  while (tile > kWarpTile && (tile / 2 >= length || 4 * p.sizes.batch * ceil_div(length, tile) < 3 * device.sm_count))
    tile /= 2;
  return tile;
}

// The longest tile of which two blocks share an SM, by memory and by registers, or else one of eight warps alone, and
// whose warps have room for the sums of the weights' gradients. A map too small for such tiles takes few of them: five
// launches cost more.
void choose_fused(const Problem& p, Plan& plan, int64_t half, int64_t whole, int longest, const Force& force) {
  const bool ranges = force.chunk || force.chunk_units;
  if (p.task != Task::backward || p.resampled || volume_of(p.sizes.kernel) > 1 || ranges) return;
  const Widths widths = widths_of(p);
  for (const bool alone : {false, true})
    for (int tile = force.tile ? force.tile : std::max(longest, 2 * kWarpTile); tile >= kWarpTile; tile /= 2) {
      choose_hidden(p, plan, tile);
      plan.alone = alone;
      const int rows = plan.hidden / kWarpTile, warps = threads_of(plan) / 32;
      const int64_t sums = rows * (widths.theta + widths.phi) / kWarpTile;
      plan.fused = (alone || !force.alone) && plan.passes == 1 && (alone ? warps == kWarps : 2 * warps <= kWarps) &&
                   sums <= kWeightTiles * warps && lay_out_fused(p, plan) <= (alone ? whole : half);
      if (plan.fused) return;
      if (force.tile) break;
    }
  plan.alone = false;
}

// The longest chunk that fits; tells whether one does.
bool choose_chunk(const Problem& p, Plan& plan, int tile, int warps, int64_t limit, const Force& force) {
  choose_hidden(p, plan, tile, warps);
  for (int chunk = force.chunk ? force.chunk : kMostChunk; chunk >= kWarpTile; chunk /= 2) {
    plan.chunk = chunk;
    if (lay_out(p, plan, parts_of(p)) <= limit) return true;
  }
  return false;
}

// Terms that a position costs in chunks: a tile reads all weights, a pass the maps again.
double terms_read(const Problem& p, const Plan& plan) {
  return plan.passes * (1 + double(parts_of(p)) * plan.hidden / plan.tile);
}

// Whole maps and weights where they fit: the longest tile that lets two blocks share an SM, or that fits at all. Else
// chunks, of the tile that reads least from L2, by as many warps as do.
void choose_tile(const Problem& p, Plan& plan, const cuda::DeviceProperties& device, const Force& force) {
  const int64_t whole = device.shared_bytes_per_block;
  const int64_t half = std::min<int64_t>(whole, device.shared_bytes_per_sm / 2 - 1024);
  const int longest = force.tile ? force.tile : most_positions(p, device), least = force.tile ? force.tile : kWarpTile;
  plan.whole = true;
  choose_fused(p, plan, half, whole, longest, force);
  if (plan.fused) return;
  for (const int64_t limit : {half, whole})
    for (int tile = longest; tile >= std::min(2 * least, longest) && !force.chunk; tile /= 2) {
      choose_hidden(p, plan, tile);
      if (plan.passes == 1 && lay_out(p, plan, parts_of(p)) <= limit) return;
    }
  plan.whole = false;
  const int tallest = p.dtype_bytes == 2 ? 2 * kWarpTile : kWarpTile;
  const auto cost = [&](const Plan& plan) { return std::tuple(terms_read(p, plan), -threads_of(plan), plan.tile); };
  for (int warps = kWarps; warps > 0; warps /= 2) {
    std::optional<Plan> best;
    for (int height = force.warp_tile ? std::min(force.warp_tile, tallest) : kWarpTile; height <= tallest; height *= 2)
      for (int tile = longest; tile >= std::max(least, height); tile /= 2) {
        plan.warp_tile = height;
        if (tile <= warps * height && choose_chunk(p, plan, tile, warps, whole, force) &&
            (!best || cost(plan) < cost(*best)))
          best = plan;
      }
    if (!best) continue;
    plan = *best;
    return;
  }
}

}  // namespace

Plan make_plan(const Problem& p, const cuda::DeviceProperties& device, const Force& force) {
  Plan plan{};
  plan.warp_tile = kWarpTile;
  const Sizes& n = p.sizes;
  choose_tile(p, plan, device, force);
  plan.threads = threads_of(plan);
  const bool few = plan.warp_tile == kWarpTile && (p.task == Task::forward || p.task == Task::moments);
  const int registers = few ? 128 : 255;  // of a thread, at most
  plan.blocks_per_sm = static_cast<int>(
      std::clamp<int64_t>(std::min<int64_t>(device.shared_bytes_per_sm / (int64_t{plan.shared_bytes} + 1024),
                                            65536 / (registers * plan.threads)),
                          1, kMostBlocks));
  plan.tiles = ceil_div(volume_of(n.grid), plan.tile);
  plan.units = n.batch * plan.tiles;
  const int64_t all = std::max<int64_t>(plan.units, 1), pitch = int64_t{plan.passes} * plan.hidden;
  const int64_t sample = p.resampled ? plan.tiles : 1;  // the way back to g takes whole samples
  const int64_t fitting = kChunkBytes / (plan.tile * pitch * p.dtype_bytes) / sample * sample;
  plan.chunk_units = std::min(std::max(force.chunk_units ? round_up(force.chunk_units, sample) : fitting, sample), all);
  const int64_t range = p.task == Task::backward && !plan.fused ? plan.chunk_units : all;
  const int64_t passes = p.task == Task::forward ? 1 : plan.passes;  // a block of forward takes all of them
  plan.blocks = std::min<int64_t>(range, std::max<int64_t>(1, int64_t{device.sm_count} * plan.blocks_per_sm / passes));
  plan.slots = plan.blocks * (plan.tile / plan.warp_tile);
  plan.rows = pitch % 128 == 0 ? 128 : pitch % 64 == 0 ? 64 : 32;
  const Widths widths = widths_of(p);
  const int area = kWarps * kWarpTile * (p.dtype_bytes == 2 ? 2 : 1) * kWarpTile;  // map_gradient.cuh's warps
  plan.map_columns = std::min(area / plan.tile, kMostColumns);
  plan.weight_columns = std::min(area / plan.rows, kMostColumns);
  const int64_t products = pitch / plan.rows * ceil_div(std::max(widths.theta, widths.phi), plan.weight_columns);
  plan.splits =
      static_cast<int>(std::clamp<int64_t>(2 * device.sm_count / products, 1, std::min<int64_t>(kMostSplits, range)));
  return plan;
}

Problem problem_of(const ForwardParams& p) {
  return {Task::forward, p.sizes, size_of(p.dtype), p.x.stride_position != 1, p.phi == nullptr};
}
Problem problem_of(const BackwardParams& p) {
  return {Task::backward, p.sizes, size_of(p.dtype), p.x.stride_position != 1, p.phi == nullptr};
}
Problem problem_of(const MomentsParams& p) {
  return {Task::moments, p.sizes, size_of(p.dtype), p.x.stride_position != 1, false};
}
Problem problem_of(const SumsParams& p) {
  return {Task::sums, p.sizes, size_of(p.dtype), p.x.stride_position != 1, p.phi == nullptr};
}

namespace {

PlanAnswer answer(const PlanQuery& query, Task task) {
  Problem p{};
  p.task = task;
  const int64_t kernel = query.get("kernel", 1), length = query.get("length", 1);  // along one dim
  p.sizes.batch = query.get("batch", 1);
  p.sizes.channels = query.get("channels", 1);
  p.sizes.gating = query.get("gating", p.sizes.channels);
  p.sizes.hidden = query.get("hidden", 1);
  for (int d = 0; d < 3; ++d) {
    p.sizes.x[d] = d == 2 ? length : 1;
    p.sizes.kernel[d] = d == 2 ? kernel : 1;
    p.sizes.grid[d] = p.sizes.g[d] = p.sizes.x[d] / p.sizes.kernel[d];
  }
  p.dtype_bytes = query.get<int>("dtype_bytes", 4);
  p.last = query.get<bool>("channels_last", false);
  p.resampled = query.get<bool>("resampled", false);
  const cuda::DeviceProperties device = cuda::device_of(query);
  const Plan plan = make_plan(
      p, device,
      {query.get<int>("force_tile", 0), query.get<int>("force_warp_tile", 0), query.get<int>("force_chunk", 0),
       query.get("force_chunk_units", 0), query.get<bool>("force_alone", false)});
  return {
      {"threads", std::to_string(plan.threads)},
      {"tile", std::to_string(plan.tile)},
      {"warp_tile", std::to_string(plan.warp_tile)},
      {"hidden", std::to_string(plan.hidden)},
      {"passes", std::to_string(plan.passes)},
      {"whole", std::to_string(plan.whole)},
      {"fused", std::to_string(plan.fused)},
      {"alone", std::to_string(plan.alone)},
      {"chunk", std::to_string(plan.chunk)},
      {"tiles", std::to_string(plan.tiles)},
      {"units", std::to_string(plan.units)},
      {"blocks", std::to_string(plan.blocks)},
      {"slots", std::to_string(plan.slots)},
      {"chunk_units", std::to_string(plan.chunk_units)},
      {"map_columns", std::to_string(plan.map_columns)},
      {"rows", std::to_string(plan.rows)},
      {"weight_columns", std::to_string(plan.weight_columns)},
      {"splits", std::to_string(plan.splits)},
      {"shared_bytes", std::to_string(plan.shared_bytes)},
      {"blocks_per_sm", std::to_string(plan.blocks_per_sm)},
  };
}

const RegisterPlan forward_plan("attention_gate_forward",
                                [](const PlanQuery& query) { return answer(query, Task::forward); });
const RegisterPlan backward_plan("attention_gate_backward",
                                 [](const PlanQuery& query) { return answer(query, Task::backward); });
const RegisterPlan moments_plan("attention_gate_moments",
                                [](const PlanQuery& query) { return answer(query, Task::moments); });
const RegisterPlan sums_plan("attention_gate_sums", [](const PlanQuery& query) { return answer(query, Task::sums); });

}  // namespace
}  // namespace attnkern::attention_gate
