// Forward.
#include "ops/attention_gate/launch.cuh"

namespace attnkern::attention_gate {
namespace {

// y = alpha target of a tile. The target is in `tile` (rows `stride` apart), or null there and read from memory.
template <class T, bool last>
ATTNKERN_DEVICE void gate_tile(const ForwardParams& p, const GateTile& tile, const Shared<float>& alpha,
                               const Shared<T>* in_tile, int stride) {
  const Sizes& n = p.sizes;
  const bool of_x = p.target == Target::x;
  const int64_t channels = of_x ? n.channels : n.gating, length = product_of(n.grid);
  const Plane<const T*> from = plane_of<const T, last>(of_x ? p.x : p.g, tile.sample, channels, length);
  const Plane<T*> to = plane_of<T, last>(p.y, tile.sample, channels, length);
  each_pack<T, last>(static_cast<int>(channels), tile.count, to.vector && (in_tile || from.vector),
                     [&](int c, int at, auto width) {
                       constexpr int pack = decltype(width)::value;
                       const int i = last ? at * stride + c : c * stride + at;
                       Vec<T, pack> values;
                       if (in_tile)
                         values = in_tile->template load_vec<pack>(i);
                       else
                         values = load_global_vec<pack, Cache::streaming>(from.at(c, tile.first + at));
                       Vec<float, pack> factors;
                       if constexpr (!last) factors = alpha.template load_vec<pack>(at);
#pragma unroll
                       for (int v = 0; v < pack; ++v)
                         values[v] = narrow<T>((last ? alpha.load(at) : factors[v]) * widen(values[v]));
                       store_global_vec<Cache::streaming>(to.at(c, tile.first + at), values);
                     });
}

// Computes   q = psi . act(theta x + phi g + bias) + psi_bias, y = sigmoid(q) target
// Layout     x [B, C, L] or [B, L, C], g likewise or resampled [B, F, ...]; q [B, L]
// Mapping    a block: tiles of positions, one after another. Chunks of terms come to shared memory two ahead; a warp
//            has 32 positions and 32 hidden units, a lane 4 and 8 of them; or 64, and a lane 8
// Traffic    x, g and y once where the plan is whole; else the target once more, from L2, and the weights once a tile
// Numerics   float; 16-bit maps times weights in two 16-bit parts; hidden units of a lane, of 4 lanes, of warps in
// order
template <class T, bool last, int rows>
ATTNKERN_KERNEL(kMostThreads, rows == kLaneRows ? 2 : 1)
attention_gate_fwd_kernel(ATTNKERN_GRID_CONSTANT const ForwardParams p, ATTNKERN_GRID_CONSTANT const Plan plan,
                          ATTNKERN_GRID_CONSTANT const Work<T> work) {
  constexpr int columns = kLaneColumns / 2;  // blocks of 8 hidden units
  const Sizes& n = p.sizes;
  const WarpPlace place(plan.hidden, 8 * rows);
  SharedArena arena;
  const Stream<T, last> stream(n, plan, work, arena, 0, plan.passes);
  const Shared<float> partial = arena.take<float>(plan.hidden / kWarpTile * plan.tile);
  const Shared<float> alpha = arena.take<float>(plan.tile);
  const int g = lane_id() / 4, c = lane_id() % 4 * 2;

  WarpProduct<T, rows / 2, columns> h;
  float score[rows] = {};
  stream.run(block_index(), plan.units, [&](const Step& step, int stage) {
    stream.multiply(step, stage, place, h);
    if (!stream.completes(step)) return;
    const GateTile tile = tile_of(n, plan, step.unit);
    const int64_t first = int64_t{step.pass} * plan.hidden + place.column;
    if (!p.phi) add_resampled(h, p, tile, place.row, first);
#pragma unroll
    for (int j = 0; j < columns; ++j)
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const int64_t f = first + 8 * j + c + v;
        if (f >= n.hidden) continue;
        const float bias = element_of(p.bias, f), psi = element_of(p.psi, f);
#pragma unroll
        for (int r = 0; r < rows; ++r) score[r] += psi * hidden_act(p, h.sum[r / 2][j].values[r % 2 * 2 + v] + bias);
      }
    h.clear();
    if (step.pass + 1 < plan.passes) return;

#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const float sum = group_sum<4>(score[r]);
      if (c == 0) partial.store(place.column / kWarpTile * plan.tile + place.row + 8 * r + g, sum);
      score[r] = 0.0f;
    }
    block_sync();
    for (int t = thread_index(); t < tile.count; t += block_size()) {
      float q = 0.0f;
      for (int w = 0; w < plan.hidden / kWarpTile; ++w) q += partial.load(w * plan.tile + t);
      q += element_of(p.psi_bias, 0);
      store_global(static_cast<float*>(p.q) + tile.sample * product_of(n.grid) + tile.first + t, q);
      alpha.store(t, sigmoid(q));
    }
    if (!p.apply) return;
    block_sync();
    const Shared<T> map = stream.map(stage);
    gate_tile<T, last>(p, tile, alpha, plan.whole ? &map : nullptr, plan.map_stride);
  });
}

size_t carve(const ForwardParams& p, const Plan& plan, SplitSpace& space) {
  Carver carver{p.workspace};
  space = take_split(carver, p, plan);
  return carver.bytes;
}

}  // namespace

size_t forward_workspace_cuda(const ForwardParams& p, const Plan& plan) {
  SplitSpace space;
  ForwardParams counted = p;
  counted.workspace = nullptr;
  return carve(counted, plan, space);
}

Status launch_forward_cuda(const ForwardParams& p, const Plan& plan, void* stream) {
  if (p.sizes.batch == 0) return {};
  cuda::DeviceProperties device;
  if (const Status status = device_properties(device); !status.ok()) return status;
  if (!fits(plan, device)) return kTooLarge;
  SplitSpace space;
  carve(p, plan, space);
  return visit(p.dtype, is_last(p.x), [&](auto type, auto last) -> Status {
    using T = decltype(type);
    Work<T> work;
    if (const Status status = make_work(p, plan, space, work, stream); !status.ok()) return status;
    return visit_rows<T>(plan, [&](auto rows) {
      return launch(attention_gate_fwd_kernel<T, decltype(last)::value, decltype(rows)::value>,
                    {plan.blocks, plan.threads, plan.shared_bytes}, stream, p, plan, work);
    });
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

}  // namespace attnkern::attention_gate
