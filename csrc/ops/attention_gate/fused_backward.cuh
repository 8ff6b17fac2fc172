// Backward in one kernel, where the maps of a tile, their gradient and both weights fit shared memory twice an SM.
#pragma once

#include "ops/attention_gate/map_gradient.cuh"

namespace attnkern::attention_gate {

// What a block has in shared memory.
template <class T>
struct FusedTile {
  Shared<T> x, g, d;      // maps as they lie in memory; dx and dg take the places of x and g
  Shared<T> dt, du;       // [positions, hidden units]
  Shared<T> weights;      // of both operands, in parts
  Shared<float> dq;       // [positions]
  Shared<float> alpha;    // [positions]
  Shared<float> partial;  // of dq: [groups of threads, positions]

  ATTNKERN_DEVICE FusedTile(const Plan& plan, SharedArena& arena)
      : x(arena.take<T>(plan.map_size)),
        g(arena.take<T>(plan.map_size)),
        d(arena.take<T>(plan.map_size)),
        dt(arena.take<T>(plan.tile * row_stride<T>(plan.hidden))),
        du(arena.take<T>(plan.tile * row_stride<T>(plan.hidden))),
        weights(arena.take<T>(2 * plan.weight_size)),
        dq(arena.take<float>(plan.tile)),
        alpha(arena.take<float>(plan.tile)),
        partial(arena.take<float>(block_size() * pack_size<T>())) {}
};

// Starts copying a whole weight, a part after the other.
template <class T>
ATTNKERN_DEVICE void fetch_weight(const Shared<T>& to, const SplitWeight<T>& w, const Plan& plan) {
  const int size = plan.hidden * plan.weight_stride;
  for (int part = 0; part < kParts<T>; ++part)
    fetch_rows(to.slice(part * size, size), plan.weight_stride, w.row(part, 0), w.width, plan.hidden, w.width);
}

// dq of a tile, with what comes from y where the gate was applied, and alpha (1 where it was not).
template <class T, bool last>
ATTNKERN_DEVICE void logit_gradients(const BackwardParams& p, const Plan& plan, const FusedTile<T>& s,
                                     const GateTile& tile, int width) {
  constexpr int pack = pack_size<T>();
  const Shared<T>& target = p.target == Target::x ? s.x : s.g;
  const int groups = last ? 1 : block_size() / (plan.tile / pack);
  if (p.apply) {
    if constexpr (last) {
      for (int at = thread_index(); at < tile.count; at += block_size()) {
        float sum = 0.0f;
        for (int c = 0; c < width; c += pack) {
          const Vec<float, pack> a = widen(target.template load_vec<pack>(at * plan.map_stride + c));
          const Vec<float, pack> b = widen(s.d.template load_vec<pack>(at * plan.map_stride + c));
#pragma unroll
          for (int v = 0; v < pack; ++v) sum += a[v] * b[v];
        }
        s.partial.store(at, sum);
      }
    } else {
      const int at = thread_index() % (plan.tile / pack) * pack, group = thread_index() / (plan.tile / pack);
      Vec<float, pack> sum{};
      for (int c = group; c < width; c += groups) {
        const Vec<float, pack> a = widen(target.template load_vec<pack>(c * plan.map_stride + at));
        const Vec<float, pack> b = widen(s.d.template load_vec<pack>(c * plan.map_stride + at));
#pragma unroll
        for (int v = 0; v < pack; ++v) sum[v] += a[v] * b[v];
      }
      s.partial.store_vec(group * plan.tile + at, sum);
    }
    block_sync();
  }
  for (int at = thread_index(); at < tile.count; at += block_size()) {
    const int64_t l = tile.sample * product_of(p.sizes.grid) + tile.first + at;
    float gradient = element_of(p.dq, l), alpha = 1.0f;
    if (p.apply) {
      float sum = 0.0f;
      for (int i = 0; i < groups; ++i) sum += s.partial.load(i * plan.tile + at);
      alpha = sigmoid(element_of(p.q, l));
      const float own = alpha * (1.0f - alpha) * sum;
      gradient = p.dq ? gradient + own : own;
    }
    s.dq.store(at, gradient);
    s.alpha.store(at, alpha);
  }
}

// This warp's tiles of [hidden units, terms of theta and then of phi].
struct WeightTile {
  bool of_x, exists;
  int row, column;
  ATTNKERN_DEVICE WeightTile(const Plan& plan, int theta_width, int phi_width, int i) {
    const int rows = plan.hidden / kWarpTile, theta_columns = theta_width / kWarpTile;
    const int at = warp_id() + i * warp_count(), block = at / rows;
    of_x = block < theta_columns;
    exists = block < theta_columns + phi_width / kWarpTile;
    row = at % rows * kWarpTile;
    column = (of_x ? block : block - theta_columns) * kWarpTile;
  }
};

// map = alpha d + weight^T of, rounded; the map's place in shared memory takes it.
template <class T, bool last>
ATTNKERN_DEVICE void map_gradient(const Plan& plan, const FusedTile<T>& s, const Shared<T>& map, const Shared<T>& of,
                                  const Shared<T>& weight, int width, int count, bool begins) {
  const int columns = width / kWarpTile, tiles = plan.tile / kWarpTile * columns;
  for (int i = warp_id(); i < tiles; i += warp_count()) {
    const int row = i / columns * kWarpTile, column = i % columns * kWarpTile;
    const int stride = row_stride<T>(plan.hidden);
    WarpProduct<T, 2, 4> product;
    product.template multiply<Inner::along, Inner::across, kParts<T>>({of, row * stride, stride},
                                                                      {weight, column, plan.weight_stride}, plan.hidden,
                                                                      plan.hidden * plan.weight_stride);
    product.each([&](int r, int c, float value) {
      const int p = row + r, k = column + c, at = last ? p * plan.map_stride + k : k * plan.map_stride + p;
      if (p >= count) return;
      map.store(at, narrow<T>(begins ? s.alpha.load(p) * widen(s.d.load(at)) + value : value));
    });
  }
}

template <class T, bool last>
ATTNKERN_DEVICE void put_map(const Map& out, const Shared<T>& from, const Operand& o, const Plan& plan,
                             const GateTile& tile) {
  const Plane<T*> to = plane_of<T, last>(out, tile.sample, o.channels, o.length);
  each_pack<T, last>(static_cast<int>(o.channels), tile.count, to.vector, [&](int c, int p, auto width) {
    constexpr int pack = decltype(width)::value;
    const int i = last ? p * plan.map_stride + c : c * plan.map_stride + p;
    store_global_vec<Cache::streaming>(to.at(c, tile.first + p), from.template load_vec<pack>(i));
  });
}

// Computes   everything that BackwardParams asks for
// Layout     maps [B, C, L] or [B, L, C]; partial [slots, 3, hidden units]; dtheta, dphi [blocks, F, C]
// Mapping    a block: tiles of positions, one after another; a warp has 32 positions and 32 hidden units of h, two at
//            most of the 32 x 32 blocks of dtheta and dphi, which it keeps, and some of dx and dg
// Traffic    x, g and d read once, dx and dg written once
// Numerics   float; dt and du rounded once, as eager's are; a tile's positions, then a block's tiles in order
template <class T, bool last>
ATTNKERN_KERNEL(kMostThreads, 1)
attention_gate_bwd_kernel(ATTNKERN_GRID_CONSTANT const BackwardParams p, ATTNKERN_GRID_CONSTANT const Plan plan,
                          ATTNKERN_GRID_CONSTANT const Work<T> work, ATTNKERN_GRID_CONSTANT const Operand d,
                          float* partial, float* dtheta, float* dphi) {
  constexpr Inner inner = last ? Inner::along : Inner::across;
  const Sizes& n = p.sizes;
  const Operand &x = work.operands[work.theta], &g = work.operands[1 - work.theta];
  SharedArena arena;
  const FusedTile<T> s(plan, arena);
  const Shared<T> theta = s.weights.slice(0, plan.weight_size),
                  phi = s.weights.slice(plan.weight_size, plan.weight_size);
  const int part = plan.hidden * plan.weight_stride, hidden_stride = row_stride<T>(plan.hidden);
  fetch_weight(theta, work.weights[work.theta], plan);
  fetch_weight(phi, work.weights[1 - work.theta], plan);

  const PassBlock own(plan);
  const WarpPlace place(plan.hidden);
  LaneVectors vectors;
  WarpProduct<T, 2, 4> weight_sums[kWeightTiles];
  for (int64_t unit = block_index(); unit < plan.units; unit += plan.blocks) {
    const GateTile tile = tile_of(n, plan, unit);
    fetch<T, last>(s.x, plan.map_stride, x, n, tile, plan.tile, 0, x.width);
    fetch<T, last>(s.g, plan.map_stride, g, n, tile, plan.tile, 0, g.width);
    if (d.map.data) fetch<T, last>(s.d, plan.map_stride, d, n, tile, plan.tile, 0, d.width);
    async_commit();
    async_wait();
    block_sync();
    logit_gradients<T, last>(p, plan, s, tile, d.width);
    block_sync();

    {
      WarpProduct<T, kLaneRows / 2, kLaneColumns / 2> t, u;
      const auto at = [&](int stride) { return last ? place.row * stride : place.row; };
      const auto weight = [&](const Shared<T>& w) {
        return Block<T>{w, place.column * plan.weight_stride, plan.weight_stride};
      };
      t.template multiply<inner, Inner::along, kParts<T>>({s.x, at(plan.map_stride), plan.map_stride}, weight(theta),
                                                          x.width, part);
      u.template multiply<inner, Inner::along, kParts<T>>({s.g, at(plan.map_stride), plan.map_stride}, weight(phi),
                                                          g.width, part);
      const LaneGradients gradients(s.dq, tile, place.row);
      const int row = place.row + lane_id() / 4;
#pragma unroll
      for (int j = 0; j < kLaneColumns; j += 2) {
        const int f = place.column + j / 2 * 8 + lane_id() % 4 * 2;
        const UnitGradient one(p, f, gradients, t, u, j, vectors);
        const UnitGradient two(p, f + 1, gradients, t, u, j + 1, vectors);
#pragma unroll
        for (int r = 0; r < kLaneRows; ++r) {
          const int to = (row + 8 * r) * hidden_stride + f;
          s.dt.store_vec(to, Vec<T, 2>{{narrow<T>(one.dt[r]), narrow<T>(two.dt[r])}});
          s.du.store_vec(to, Vec<T, 2>{{narrow<T>(one.du[r]), narrow<T>(two.du[r])}});
        }
      }
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) vectors.dpsi_bias += gradients.value[r];
    }
    block_sync();

    if (partial) {
#pragma unroll
      for (int i = 0; i < kWeightTiles; ++i) {
        const WeightTile of(plan, x.width, g.width, i);
        if (!of.exists) continue;
        WarpProduct<T, 2, 4> product;
        product.template multiply<Inner::across, last ? Inner::across : Inner::along>(
            {of.of_x ? s.dt : s.du, of.row, hidden_stride},
            {of.of_x ? s.x : s.g, last ? of.column : of.column * plan.map_stride, plan.map_stride}, plan.tile);
        weight_sums[i].add(product);
      }
      block_sync();  // x and g were read
    }
    if (p.dx.data)
      map_gradient<T, last>(plan, s, s.x, s.dt, theta, x.width, tile.count, p.target == Target::x && d.map.data);
    if (p.dg.data)
      map_gradient<T, last>(plan, s, s.g, s.du, phi, g.width, tile.count, p.target == Target::g && d.map.data);
    block_sync();
    if (p.dx.data) put_map<T, last>(p.dx, s.x, x, plan, tile);
    if (p.dg.data) put_map<T, last>(p.dg, s.g, g, plan, tile);
    block_sync();
  }
  if (!partial) return;
  vectors.put(slot_of(partial, plan, own, place, 3), plan.hidden, place.column == 0, false);
#pragma unroll
  for (int i = 0; i < kWeightTiles; ++i) {
    const WeightTile of(plan, x.width, g.width, i);
    if (!of.exists) continue;
    const int64_t channels = of.of_x ? n.channels : n.gating;
    float* const to = (of.of_x ? dtheta : dphi) + own.block * n.hidden * channels;
    weight_sums[i].each([&](int row, int column, float value) {
      row += of.row;
      column += of.column;
      if (row < n.hidden && column < channels) store_global(to + row * channels + column, value);
    });
  }
}

}  // namespace attnkern::attention_gate
