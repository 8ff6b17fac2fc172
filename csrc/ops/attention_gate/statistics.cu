// What batch normalisation of a branch needs: moments of t, and the sums of dh, dh t and dh u.
#include "ops/attention_gate/lanes.cuh"
#include "ops/attention_gate/launch.cuh"
#include "ops/attention_gate/reduce.cuh"

namespace attnkern::attention_gate {
namespace {

// Number, mean, and sum of squares about it.
struct Moments {
  float count = 0.0f, mean = 0.0f, squares = 0.0f;

  ATTNKERN_DEVICE void merge(const Moments& other) {
    const float total = count + other.count;
    if (total == 0.0f) return;
    const float difference = other.mean - mean, share = other.count / total;
    mean += difference * share;
    squares += other.squares + difference * difference * count * share;
    count = total;
  }
  ATTNKERN_DEVICE Moments of_lane(int mask) const {
    return {shuffle_xor(count, mask), shuffle_xor(mean, mask), shuffle_xor(squares, mask)};
  }
};

// Computes   count, mean and squares about it of t = theta x, for a row of warps of a block
// Layout     x [B, C, L] or [B, L, C]; partial [slots, 3, hidden units]
// Mapping    as forward's, a pass over the hidden units a block
// Traffic    x once a pass
// Numerics   float; a lane's positions by Welford's update in order, then lanes, warps and blocks merged in order
template <class T, bool last, int Rows>
ATTNKERN_KERNEL(kMostThreads,
                sizeof(T) == 2 && Rows == kLaneRows ? 2 : 1)  // two blocks of floats spill 16 bytes on sm_100
attention_gate_moments_kernel(ATTNKERN_GRID_CONSTANT const Sizes n, ATTNKERN_GRID_CONSTANT const Plan plan,
                              ATTNKERN_GRID_CONSTANT const Work<T> work, float* partial) {
  const PassBlock own(plan);
  const WarpPlace place(plan.hidden, 8 * Rows);
  SharedArena arena;
  const Stream<T, last> stream(n, plan, work, arena, own.pass, 1);
  WarpProduct<T, Rows / 2, kLaneColumns / 2> t;
  float count = 0.0f, mean[kLaneColumns] = {}, squares[kLaneColumns] = {};
  stream.run(own.block, plan.units, [&](const Step& step, int stage) {
    stream.multiply(step, stage, place, t);
    if (!stream.completes(step)) return;
    const int positions = tile_of(n, plan, step.unit).count;
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      if (place.row + 8 * r + lane_id() / 4 >= positions) continue;
      count += 1.0f;
      const float share = 1.0f / count;
      each_unit([&](int i, int) {
        const float value = value_of(t, r, i), difference = value - mean[i];
        mean[i] += difference * share;
        squares[i] += difference * (value - mean[i]);
      });
    }
    t.clear();
  });
  float* const slot = slot_of(partial, plan, own, place, 3);
  const int64_t pitch = int64_t{plan.passes} * plan.hidden;
  each_unit([&](int i, int unit) {
    Moments m{count, mean[i], squares[i]};
#pragma unroll
    for (int mask = 4; mask < kWarpSize; mask *= 2) m.merge(m.of_lane(mask));
    if (lane_id() >= 4) return;
    store_global(slot + unit, m.count);
    store_global(slot + pitch + unit, m.mean);
    store_global(slot + 2 * pitch + unit, m.squares);
  });
}

constexpr int kMergeThreads = 128;

// Computes   mean and variance from the moments of all slots
// Layout     partial [slots, 3, hidden units] -> [F]
// Mapping    a warp a hidden unit, lanes along the slots
// Traffic    the partial moments once
// Numerics   float; every 32nd slot in order, then lanes
ATTNKERN_KERNEL(kMergeThreads, 4)
attention_gate_merge_moments_kernel(const float* partial, int64_t slots, int64_t pitch, int64_t hidden, float* mean,
                                    float* var) {
  const int64_t f = int64_t{block_index()} * warp_count() + warp_id();
  if (f >= hidden) return;
  Moments m;
  for (int64_t slot = lane_id(); slot < slots; slot += kWarpSize) {
    const float* const from = partial + slot * 3 * pitch + f;
    m.merge({load_global(from), load_global(from + pitch), load_global(from + 2 * pitch)});
  }
#pragma unroll
  for (int mask = 1; mask < kWarpSize; mask *= 2) m.merge(m.of_lane(mask));
  if (lane_id() > 0) return;
  const float var_of = m.squares / m.count;  // NaN where there is nothing
  store_global(mean + f, m.count > 0.0f ? m.mean : var_of);
  store_global(var + f, var_of);
}

// Computes   the sums of dh, dh t and dh u over the positions of a row of warps
// Layout     as forward's; partial [slots, 3, hidden units]
// Mapping    as forward's, a pass over the hidden units a block
// Traffic    x and g once a pass
// Numerics   float; a lane's positions in order, then lanes
template <class T, bool last, int Rows>
ATTNKERN_KERNEL(kMostThreads, 1)
attention_gate_sums_kernel(ATTNKERN_GRID_CONSTANT const SumsParams p, ATTNKERN_GRID_CONSTANT const Plan plan,
                           ATTNKERN_GRID_CONSTANT const Work<T> work, float* partial) {
  const PassBlock own(plan);
  const WarpPlace place(plan.hidden, 8 * Rows);
  SharedArena arena;
  const Stream<T, last> stream(p.sizes, plan, work, arena, own.pass, 1);
  WarpProduct<T, Rows / 2, kLaneColumns / 2> t, u;
  float sums[3][kLaneColumns] = {};
  const int64_t first = int64_t{own.pass} * plan.hidden + place.column;
  stream.run(own.block, plan.units, [&](const Step& step, int stage) {
    if (step.operand == work.theta)
      stream.multiply(step, stage, place, t);
    else
      stream.multiply(step, stage, place, u);
    if (!stream.completes(step)) return;
    const GateTile tile = tile_of(p.sizes, plan, step.unit);
    if (!p.phi) add_resampled(u, p, tile, place.row, first);
    const LaneGradients<Rows> dq(TileGradients(p.dq, p.sizes, tile), tile, place.row);
    each_unit([&](int i, int unit) {
      if (first + unit >= p.sizes.hidden) return;
      const HiddenUnit own_unit(p, p.theta_scale, p.phi_scale, first + unit);
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        if (!dq.real[r]) continue;
        const float a = value_of(t, r, i), b = value_of(u, r, i);
        const float dh = hidden_backward(p, dq.value[r] * own_unit.psi, own_unit.h(a, b));
        sums[0][i] += dh;
        sums[1][i] += dh * a;
        sums[2][i] += dh * b;
      }
    });
    t.clear();
    u.clear();
  });
  float* const slot = slot_of(partial, plan, own, place, 3);
  const int64_t pitch = int64_t{plan.passes} * plan.hidden;
  each_unit([&](int i, int unit) {
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      const float sum = rows_sum(sums[s][i]);
      if (lane_id() < 4) store_global(slot + s * pitch + unit, sum);
    }
  });
}

struct Carved {
  SplitSpace weights;
  float* partial;
  size_t bytes;
};

Carved carve(const Inputs& p, const Plan& plan, void* base) {
  Carver carver{base};
  Carved c;
  c.weights = take_split(carver, p, plan);
  c.partial = carver.take<float>(plan.slots * 3 * plan.passes * plan.hidden);
  c.bytes = carver.bytes;
  return c;
}

template <class Params, class Launch>
Status launch_statistics(const Params& p, const Plan& plan, void* stream, const Launch& launch_kernel) {
  cuda::DeviceProperties device;
  if (const Status status = device_properties(device); !status.ok()) return status;
  if (!fits(plan, device)) return kTooLarge;
  const Carved c = carve(p, plan, p.workspace);
  const LaunchConfig config{plan.passes * plan.blocks, plan.threads, plan.shared_bytes};
  return visit(p.dtype, is_last(p.x), [&](auto type, auto last) -> Status {
    using T = decltype(type);
    Work<T> work;
    if (const Status status = make_work(p, plan, c.weights, work, stream); !status.ok()) return status;
    return visit_rows<T>(plan, [&](auto rows) { return launch_kernel(last, rows, config, work, c.partial); });
  });
}

}  // namespace

size_t moments_workspace_cuda(const MomentsParams& p, const Plan& plan) { return carve(p, plan, nullptr).bytes; }
size_t sums_workspace_cuda(const SumsParams& p, const Plan& plan) { return carve(p, plan, nullptr).bytes; }

Status launch_moments_cuda(const MomentsParams& p, const Plan& plan, void* stream) {
  if (p.sizes.batch > 0) {
    const Status status = launch_statistics(
        p, plan, stream, [&](auto last, auto rows, const auto& config, const auto& work, float* partial) {
          using T = typename std::remove_cvref_t<decltype(work)>::Element;
          return launch(attention_gate_moments_kernel<T, decltype(last)::value, decltype(rows)::value>, config, stream,
                        p.sizes, plan, work, partial);
        });
    if (!status.ok()) return status;
  }
  const int warps = kMergeThreads / kWarpSize;
  return launch(attention_gate_merge_moments_kernel, {(p.sizes.hidden + warps - 1) / warps, kMergeThreads}, stream,
                carve(p, plan, p.workspace).partial, p.sizes.batch ? plan.slots : 0, int64_t{plan.passes} * plan.hidden,
                p.sizes.hidden, static_cast<float*>(p.mean), static_cast<float*>(p.var));
}

Status launch_sums_cuda(const SumsParams& p, const Plan& plan, void* stream) {
  if (p.sizes.batch > 0) {
    const Status status = launch_statistics(
        p, plan, stream, [&](auto last, auto rows, const auto& config, const auto& work, float* partial) {
          using T = typename std::remove_cvref_t<decltype(work)>::Element;
          return launch(attention_gate_sums_kernel<T, decltype(last)::value, decltype(rows)::value>, config, stream, p,
                        plan, work, partial);
        });
    if (!status.ok()) return status;
  }
  const int64_t pitch = int64_t{plan.passes} * plan.hidden;
  const auto to = [](void* out) { return static_cast<float*>(out); };
  return launch_reduce({carve(p, plan, p.workspace).partial,
                        {to(p.dh), to(p.dht), to(p.dhu)},
                        3,
                        p.sizes.hidden,
                        pitch,
                        3 * pitch,
                        p.sizes.batch ? plan.slots : 0},
                       stream);
}

size_t moments_workspace_cuda(const MomentsParams& p) {
  cuda::DeviceProperties device;
  if (!device_properties(device).ok()) return 0;
  return moments_workspace_cuda(p, make_plan(problem_of(p), device));
}

Status launch_moments_cuda(const MomentsParams& p, void* stream) {
  cuda::DeviceProperties device;
  if (const Status status = device_properties(device); !status.ok()) return status;
  return launch_moments_cuda(p, make_plan(problem_of(p), device), stream);
}

size_t sums_workspace_cuda(const SumsParams& p) {
  cuda::DeviceProperties device;
  if (!device_properties(device).ok()) return 0;
  return sums_workspace_cuda(p, make_plan(problem_of(p), device));
}

Status launch_sums_cuda(const SumsParams& p, void* stream) {
  cuda::DeviceProperties device;
  if (const Status status = device_properties(device); !status.ok()) return status;
  return launch_sums_cuda(p, make_plan(problem_of(p), device), stream);
}

}  // namespace attnkern::attention_gate
