#include "ops/squeeze_excite/plan.h"

#include <algorithm>
#include <numeric>
#include <string>

#include "core/divide.h"
#include "core/plan_registry.h"
#include "cuda/device_query.h"

namespace attnkern::squeeze_excite {
namespace {

// Tuning, apart from the algorithm. Times in microseconds, as predicted for an H200 (4.3 TB/s copy, 132 SMs).
constexpr double kDeviceRate = 4.3e6;      // bytes a microsecond, measured copy
constexpr double kBusiestSm = 2.0;         // an SM alone draws at most so many times its share of kDeviceRate
constexpr double kWeightRate = 1.0e5;      // bytes a microsecond that one block draws from L2
constexpr double kBarrier = 2.0;           // between the last byte loaded and the first stored: MLP latency
constexpr double kClusterBarrier = 0.3;    // more per doubling of the cluster
constexpr int64_t kPieceBytes = 64 << 10;  // of a work item: 64 KB, 2 us of one SM's share
constexpr int64_t kLeastPieceBytes = 16 << 10;
constexpr int64_t kMostPieces = 1024;       // of a sample, so that partial sums stay small beside the map;
constexpr int64_t kMostElements = 1 << 30;  // but more where a piece would outgrow its 32-bit offsets
constexpr int64_t kMostChannels = 2048;  // that a work item touches: their sums and coefficients are in shared memory
constexpr double kL2Rate = 5.5e6;        // bytes a microsecond that all SMs draw from L2: weights once a sample
constexpr double kBatchedCost = 10;      // microseconds of three more launches and two small products

int64_t array_bytes(int64_t floats) { return round_up(4 * floats, 16); }

// Bytes of the arrays of piece.cuh, in its order.
int64_t shared_bytes(const Problem& p, const Plan& plan) {
  const int64_t own = plan.channels_own * (p.width > p.channels ? 2 : 1);
  return plan.held_bytes + array_bytes(plan.scratch * plan.threads) +
         array_bytes(int64_t{plan.sums} * plan.channels_here) * (p.channels_last ? 1 : 2) +
         (1 + plan.sums) * array_bytes(plan.channels_here) + 2 * array_bytes(own) + array_bytes(plan.exchange) +
         array_bytes(plan.hidden) + 2 * array_bytes(2);
}

// Words of a thread's accesses or columns between two barriers; flags of the mask, a byte an access, need most.
int scratch_of(const Problem& p, const Plan& plan) {
  if (p.maskable) return 8;
  if (p.channels_last) return plan.vector;
  return plan.sums == 1 ? kForwardUnroll : plan.sums * kBackwardUnroll;
}

bool mask_fits(const Problem& p, const Plan& plan) {
  return !p.maskable || plan.vector == 1 || plan.chunk / plan.vector <= 4 * plan.scratch * plan.threads;
}

void mlp_arrays(const Problem& p, Plan& plan, int64_t own) {
  const bool backward = p.direction == Direction::backward;
  plan.channels_own = static_cast<int>(own);
  plan.exchange = static_cast<int>(p.layers == 2 ? p.hidden : p.layers == 1 && !backward ? p.width : 0);
  plan.hidden = static_cast<int>(p.layers == 2 ? p.hidden : p.layers == 1 && backward ? p.width : 0);
}

// Pieces end where an access and a byte of the mask do: 8 bits of a row share a byte, written by one block.
int64_t granularity(const Problem& p, int vector) {
  if (p.channels_last) return 0;  // whole rows
  const int64_t access = std::max(vector, p.maskable ? 8 : 1);
  if (p.maskable && p.length % 8 != 0) return std::lcm<int64_t>(p.length, vector);
  return access;
}

int vector_of(const Problem& p) {
  const int wide = 16 / p.dtype_bytes;
  if (!p.aligned) return 1;
  if (p.channels_last) return p.channels % wide == 0 ? wide : 1;
  return p.length >= wide ? wide : 1;
}

void cut(const Problem& p, Plan& plan, int64_t target) {
  if (p.channels_last) {
    plan.chunk = std::max<int64_t>(1, target / plan.block_columns) * plan.block_columns;
    plan.pieces = ceil_div(p.channels, plan.block_columns) * ceil_div(p.length * plan.block_columns, plan.chunk);
    plan.channels_here = static_cast<int>(plan.block_columns);
  } else {
    plan.chunk = round_up(std::max<int64_t>(1, target), granularity(p, plan.vector));
    plan.pieces = ceil_div(p.channels * p.length, plan.chunk);
    plan.channels_here = static_cast<int>(std::min(p.channels, plan.chunk / p.length + 2));
  }
}

struct Candidate {
  Plan plan;
  double time;
};

// The sample over `cluster` blocks; time < 0 where it does not fit.
Candidate resident(const Problem& p, const Device& device, int cluster, int doublings, const Force& force) {
  Candidate c{{}, -1};
  Plan& plan = c.plan;
  plan.strategy = Strategy::resident;
  plan.cluster = cluster;
  plan.vector = vector_of(p);
  plan.sums = p.direction == Direction::forward ? 1 : 2;
  plan.block_columns = p.columns();
  plan.chunk_samples = 1;
  const int64_t elements = p.channels * p.length;
  if (elements * p.dtype_bytes > int64_t{device.shared_bytes_per_block} * cluster) return c;
  cut(p, plan, p.channels_last ? ceil_div(p.length, cluster) * p.channels : ceil_div(elements, cluster));
  plan.pieces = cluster;
  plan.scratch = scratch_of(p, plan);
  plan.held_bytes = static_cast<int>(round_up(plan.chunk * p.dtype_bytes, 16));
  mlp_arrays(p, plan,
             p.channels_last ? ceil_div(p.channels, cluster) : std::min(p.channels, plan.chunk / p.length + 1));
  // Two blocks of 256 threads share an SM where they fit: one loads while the other runs its MLP. Else one of 512.
  for (const int blocks : {2, 1}) {
    plan.threads = force.threads ? force.threads : 512 / blocks;
    plan.blocks_per_sm = blocks;
    const int64_t bytes = shared_bytes(p, plan);
    const int64_t limit = std::min<int64_t>(device.shared_bytes_per_block, device.shared_bytes_per_sm / blocks - 1024);
    if (bytes > limit) continue;
    if (!mask_fits(p, plan)) continue;
    plan.shared_bytes = static_cast<int>(bytes);
    plan.grid = std::min<int64_t>(p.batch, 1 << 20) * cluster;
    const int trips = p.direction == Direction::forward ? 2 : 3;
    const int64_t slots = int64_t{device.clusters[doublings]} * blocks;
    if (slots <= 0) return c;
    const double weights = static_cast<double>(p.hidden ? 2 * p.hidden : p.channels) * p.channels * p.weight_bytes;
    const double pause = kBarrier + kClusterBarrier * doublings + weights / cluster / kWeightRate;
    c.time = 0;
    for (int64_t left = p.batch; left > 0; left -= slots) {
      const int64_t now = std::min(left, slots);
      if (now == slots && left > 4 * slots) {  // whole waves cost the same: skip to the last ones
        const int64_t whole = (left - slots) / slots;
        c.time += whole * (slots * double(elements) * p.dtype_bytes * trips / kDeviceRate + pause / blocks);
        left -= whole * slots;
      }
      const double sms = std::min<double>(device.sm_count, double(std::min(left, slots)) * cluster);
      const double rate = kDeviceRate * std::min(1.0, sms * kBusiestSm / device.sm_count);
      c.time += std::min(left, slots) * double(elements) * p.dtype_bytes * trips / rate + pause / blocks;
    }
    return c;
  }
  return c;
}

Plan streamed(const Problem& p, const Device& device, Strategy strategy, const Force& force) {
  Plan plan{};
  plan.strategy = strategy;
  plan.cluster = 1;
  plan.threads = force.threads ? force.threads : 256;
  plan.blocks_per_sm = 2;
  plan.vector = vector_of(p);
  plan.sums = p.direction == Direction::forward ? 1 : 2;
  plan.block_columns = p.channels_last ? std::min(p.channels, kMostChannels) : p.columns();
  const int64_t elements = p.channels * p.length;
  // Two items an SM at least, so that small batches fill the device.
  const int64_t share = ceil_div(std::max<int64_t>(p.batch, 1) * elements, 4 * device.sm_count) * p.dtype_bytes;
  int64_t target = std::clamp(share, kLeastPieceBytes, kPieceBytes) / p.dtype_bytes;
  target = std::min(std::max(target, ceil_div(elements, kMostPieces)), kMostElements);
  if (force.chunk) target = force.chunk;
  if (!p.channels_last) target = std::min({target, elements, kMostChannels * p.length});
  cut(p, plan, target);
  plan.scratch = scratch_of(p, plan);
  if (!mask_fits(p, plan)) {
    plan.vector = 1;  // rows of an odd length that only fill a whole access many at a time
    cut(p, plan, target);
  }
  if (strategy != Strategy::batched) mlp_arrays(p, plan, p.channels);
  plan.shared_bytes = static_cast<int>(std::min<int64_t>(shared_bytes(p, plan), INT32_MAX));
  plan.grid =
      std::min<int64_t>(std::max<int64_t>(p.batch, 1) * plan.pieces, int64_t{device.sm_count} * plan.blocks_per_sm);
  // A third of L2 for x (and dy) of the two chunks in flight: their outputs pass through it too.
  const int64_t sample = elements * p.dtype_bytes * plan.sums;
  plan.chunk_samples =
      std::clamp<int64_t>(device.l2_bytes / 6 / std::max<int64_t>(sample, 1), 1, std::max<int64_t>(p.batch, 1));
  return plan;
}

}  // namespace

Plan make_plan(const Problem& p, const Device& device, const Force& force) {
  const int64_t sample = p.channels * p.length * p.dtype_bytes;
  const double weights = double(p.hidden ? 2 * p.hidden : p.width) * p.channels * p.weight_bytes * (p.layers > 0);
  const auto wants = [&](Strategy s) { return force.strategy == static_cast<int>(s); };
  const bool free = force.strategy < 0;

  // The weights of every sample through L2, against one more trip of the map.
  const bool heavy = p.batch * weights / kL2Rate > kBatchedCost + double(p.batch) * sample / kDeviceRate;
  if (wants(Strategy::batched) || (free && (!p.squeezes || heavy)))
    return streamed(p, device, Strategy::batched, force);

  if (free || wants(Strategy::resident)) {
    Candidate best{{}, -1};
    for (int doublings = 0; doublings < 5; ++doublings) {
      const int cluster = 1 << doublings;
      if (cluster > 1 && (device.compute_capability < 90 || device.clusters[doublings] <= 0)) break;
      if (force.cluster && force.cluster != cluster) continue;
      const Candidate c = resident(p, device, cluster, doublings, force);
      if (c.time >= 0 && (best.time < 0 || c.time < best.time)) best = c;
    }
    if (best.time >= 0) return best.plan;
  }

  const bool in_l2 = sample <= device.l2_bytes / 3;
  const Strategy kept = !free && !wants(Strategy::resident) ? static_cast<Strategy>(force.strategy)
                        : in_l2                             ? Strategy::chunked
                                                            : Strategy::streaming;
  const Plan plan = streamed(p, device, kept, force);
  // So many channels that one block cannot hold their MLP.
  if (plan.shared_bytes > std::min(device.shared_bytes_per_block, device.shared_bytes_per_sm / 2 - 1024))
    return streamed(p, device, Strategy::batched, force);
  return plan;
}

namespace {

template <class Pointer>
bool aligned(const MapOf<Pointer>& map, const Problem& p) {
  if (map.data == nullptr) return true;
  const int64_t access = 16 / p.dtype_bytes;
  const bool base = reinterpret_cast<uintptr_t>(map.data) % 16 == 0;
  const bool samples = p.batch <= 1 || map.stride_batch % access == 0;
  const bool adjacent = map.stride_row == p.columns() && p.rows() * p.columns() % access == 0;
  const bool rows = p.columns() % access == 0 && (p.rows() == 1 || map.stride_row % access == 0);
  return base && samples && (adjacent || rows);
}

Problem problem_of(const Inputs& in, Direction direction) {
  Problem p{};
  p.direction = direction;
  p.channels_last = in.layout == Layout::channels_last;
  p.batch = in.sizes.batch;
  p.channels = in.sizes.channels;
  p.length = in.sizes.length;
  p.hidden = in.sizes.hidden;
  p.width = in.sizes.width;
  p.dtype_bytes = size_of(in.dtype);
  p.weight_bytes = size_of(in.weight_dtype);
  p.layers = in.w1 == nullptr ? 0 : in.w2 == nullptr ? 1 : 2;
  p.squeezes = direction == Direction::backward || in.src == nullptr;
  return p;
}

}  // namespace

Problem problem_of(const ForwardParams& params) {
  Problem p = problem_of(params, Direction::forward);
  p.maskable = params.mask != nullptr;
  p.aligned = aligned(params.x, p) && aligned(params.residual, p) && aligned(params.y, p);
  return p;
}

Problem problem_of(const BackwardParams& params) {
  Problem p = problem_of(params, Direction::backward);
  p.aligned = aligned(params.x, p) && aligned(params.residual, p) && aligned(params.dy, p) && aligned(params.dx, p) &&
              aligned(params.dresidual, p);
  return p;
}

namespace {

PlanAnswer answer(const PlanQuery& query, Direction direction) {
  Problem p{};
  p.direction = direction;
  p.batch = query.get("batch", 1);
  p.channels = query.get("channels", 1);
  p.length = query.get("length", 1);
  p.hidden = query.get("hidden", 0);
  p.width = query.get("width", p.channels);
  p.dtype_bytes = query.get<int>("dtype_bytes", 4);
  p.weight_bytes = query.get<int>("weight_bytes", p.dtype_bytes);
  p.channels_last = query.get<bool>("channels_last", false);
  p.layers = query.get<int>("layers", p.hidden ? 2 : 1);
  p.squeezes = direction == Direction::backward || query.get<bool>("squeezes", true);
  p.maskable = query.get<bool>("mask", false);
  const int64_t access = 16 / p.dtype_bytes;
  p.aligned = query.get<bool>("aligned", (p.channels_last ? p.channels : p.channels * p.length) % access == 0);
  Device device{cuda::device_of(query)};
  const char* const names[5] = {"clusters_1", "clusters_2", "clusters_4", "clusters_8", "clusters_16"};
  for (int i = 0; i < 5; ++i) device.clusters[i] = query.get<int>(names[i], device.clusters[i]);
  Force force;
  force.strategy = query.get<int>("force_strategy", -1);
  force.cluster = query.get<int>("force_cluster", 0);
  const Plan plan = make_plan(p, device, force);
  const char* const strategies[4] = {"resident", "chunked", "streaming", "batched"};
  return {
      {"strategy", strategies[static_cast<int>(plan.strategy)]},
      {"threads", std::to_string(plan.threads)},
      {"vector", std::to_string(plan.vector)},
      {"cluster", std::to_string(plan.cluster)},
      {"chunk", std::to_string(plan.chunk)},
      {"pieces", std::to_string(plan.pieces)},
      {"block_columns", std::to_string(plan.block_columns)},
      {"chunk_samples", std::to_string(plan.chunk_samples)},
      {"grid", std::to_string(plan.grid)},
      {"blocks_per_sm", std::to_string(plan.blocks_per_sm)},
      {"shared_bytes", std::to_string(plan.shared_bytes)},
  };
}

const RegisterPlan forward_plan("squeeze_excite_forward",
                                [](const PlanQuery& query) { return answer(query, Direction::forward); });
const RegisterPlan backward_plan("squeeze_excite_backward",
                                 [](const PlanQuery& query) { return answer(query, Direction::backward); });

}  // namespace
}  // namespace attnkern::squeeze_excite
