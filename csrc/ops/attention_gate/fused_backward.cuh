// Backward in one kernel, where the maps of a tile, their gradient and both weights fit shared memory: twice an SM, so
// that one block loads as another multiplies, or once beside the next tile's maps.
#pragma once

#include "ops/attention_gate/map_gradient.cuh"

namespace attnkern::attention_gate {

// What a block has in shared memory.
template <class T>
struct FusedTile {
  Shared<T> x, g;  // of `buffers` tiles, as they lie in memory; dx and dg take their places
  Shared<T> d;
  Shared<T> dt, du;       // [positions, hidden units]
  Shared<T> weights;      // of both operands, in parts
  Shared<float> dq;       // [positions]
  Shared<float> alpha;    // [positions]
  Shared<float> partial;  // of dq: [groups of threads, positions]

  ATTNKERN_DEVICE FusedTile(const Plan& plan, int buffers, SharedArena& arena)
      : x(arena.take<T>(buffers * plan.map_size)),
        g(arena.take<T>(buffers * plan.map_size)),
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
  for (int part = 0; part < kStoredParts<T>; ++part)
    fetch_rows(to.slice(part * size, size), plan.weight_stride, w.row(part, 0), w.width, plan.hidden, w.width);
}

// dq of a tile, with what comes from y where the gate was applied, and alpha (1 where it was not).
template <class T, bool last>
ATTNKERN_DEVICE void logit_gradients(const BackwardParams& p, const Plan& plan, const FusedTile<T>& s,
                                     const Shared<T>& target, const GateTile& tile, int width) {
  constexpr int pack = pack_size<T>();
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
  for (int at = thread_index(); at < plan.tile; at += block_size()) {
    const bool real = at < tile.count;
    const int64_t l = tile.sample * product_of(p.sizes.grid) + tile.first + at;
    float gradient = real ? element_of(p.dq, l) : 0.0f, alpha = 1.0f;
    if (real && p.apply) {
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

// map = alpha d + weight^T of, rounded; the map's place in shared memory takes it. Rows of the product are rows of the
// map, so that a lane's pairs are neighbours there.
template <class T, bool last>
ATTNKERN_DEVICE void map_gradient(const Plan& plan, const FusedTile<T>& s, const Shared<T>& map, const Shared<T>& of,
                                  const Shared<T>& weights, int width, bool begins) {
  const int part = plan.hidden * plan.weight_stride, stride = row_stride<T>(plan.hidden);
  const Shared<T> weight = weights.slice(kNearest<T> * part, part);
  const int terms = width / kWarpTile, tiles = plan.tile / kWarpTile * terms;
  for (int i = warp_id(); i < tiles; i += warp_count()) {
    const int position = i / terms * kWarpTile, term = i % terms * kWarpTile;
    const Block<T> d{of, position * stride, stride}, w{weight, term, plan.weight_stride};
    WarpProduct<T, 2, 4> product;
    if constexpr (last)
      product.template multiply<Inner::along, Inner::across>(d, w, plan.hidden);
    else
      product.template multiply<Inner::across, Inner::along>(w, d, plan.hidden);
    const int first = last ? position * plan.map_stride + term : term * plan.map_stride + position;
    product.each_pair([&](int row, int column, Vec<float, 2> values) {
      const int at = first + row * plan.map_stride + column;
      if (begins) {
        const Vec<float, 2> begin = widen(s.d.template load_vec<2>(at));
#pragma unroll
        for (int v = 0; v < 2; ++v) values[v] += s.alpha.load(position + (last ? row : column + v)) * begin[v];
      }
      map.store_vec(at, narrow<T>(values));
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
// Mapping    a block: tiles of positions, one after another; a warp has 32 positions and 32 hidden units of h (16 where
//            the block is alone), two at most of the 32 x 32 blocks of dtheta and dphi, which it keeps, and some of dx
//            and dg. Where the block is alone, x and g of the next tile come beside this one's
// Traffic    x, g and d read once, dx and dg written once
// Numerics   float; dt and du rounded once, as eager's are; a tile's positions, then a block's tiles in order
template <class T, bool last, bool alone>
ATTNKERN_KERNEL(kMostThreads, 1)
attention_gate_bwd_kernel(ATTNKERN_GRID_CONSTANT const BackwardParams p, ATTNKERN_GRID_CONSTANT const Plan plan,
                          ATTNKERN_GRID_CONSTANT const Work<T> work, ATTNKERN_GRID_CONSTANT const Operand d,
                          float* partial, float* dtheta, float* dphi) {
  constexpr Inner inner = last ? Inner::along : Inner::across;
  constexpr int columns = alone ? kLaneColumns / 2 : kLaneColumns;  // hidden units of a lane
  const Sizes& n = p.sizes;
  const Operand &x = work.operands[work.theta], &g = work.operands[1 - work.theta];
  SharedArena arena;
  const FusedTile<T> s(plan, alone ? 2 : 1, arena);
  const Shared<T> theta = s.weights.slice(0, plan.weight_size),
                  phi = s.weights.slice(plan.weight_size, plan.weight_size);
  const int part = plan.hidden * plan.weight_stride, hidden_stride = row_stride<T>(plan.hidden);
  fetch_weight(theta, work.weights[work.theta], plan);
  fetch_weight(phi, work.weights[1 - work.theta], plan);

  const PassBlock own(plan);
  const WarpPlace place(plan.hidden, kWarpTile, 4 * columns);
  LaneVectors<columns> vectors;
  WarpProduct<T, 2, 4> weight_sums[kWeightTiles];
  const auto fetch_maps = [&](int64_t unit, int buffer) {
    if (unit >= plan.units) return;
    const GateTile tile = tile_of(n, plan, unit);
    fetch<T, last>(s.x.slice(buffer, plan.map_size), plan.map_stride, x, n, tile, plan.tile, 0, x.width);
    fetch<T, last>(s.g.slice(buffer, plan.map_size), plan.map_stride, g, n, tile, plan.tile, 0, g.width);
  };
  int buffer = 0;  // where a tile's x and g begin
  for (int64_t unit = block_index() - plan.blocks; unit < plan.units; unit += plan.blocks) {
    const int64_t next = unit + plan.blocks;
    const int other = alone ? plan.map_size - buffer : 0;
    async_wait<1>();  // all but d
    block_sync();
    if (alone) fetch_maps(next, other);
    async_commit();
    if (unit >= 0) {
      const GateTile tile = tile_of(n, plan, unit);
      const Shared<T> tile_x = s.x.slice(buffer, plan.map_size), tile_g = s.g.slice(buffer, plan.map_size);
      WarpProduct<T, kLaneRows / 2, columns / 2> t, u;
      const auto at = [&](int stride) { return last ? place.row * stride : place.row; };
      const auto weight = [&](const Shared<T>& w) {
        return Block<T>{w, place.column * plan.weight_stride, plan.weight_stride};
      };
      t.template multiply<inner, Inner::along, kParts<T>>({tile_x, at(plan.map_stride), plan.map_stride}, weight(theta),
                                                          x.width, part);
      u.template multiply<inner, Inner::along, kParts<T>>({tile_g, at(plan.map_stride), plan.map_stride}, weight(phi),
                                                          g.width, part);
      async_wait<1>();  // all but the next tile's x and g
      block_sync();
      logit_gradients<T, last>(p, plan, s, p.target == Target::x ? tile_x : tile_g, tile, d.width);
      block_sync();

      const LaneGradients gradients(s.dq, tile, place.row);
      const int row = place.row + lane_id() / 4;
#pragma unroll
      for (int j = 0; j < columns; j += 2) {
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
      block_sync();

      if (partial) {
#pragma unroll
        for (int i = 0; i < kWeightTiles; ++i) {
          const WeightTile of(plan, x.width, g.width, i);
          if (!of.exists) continue;
          WarpProduct<T, 2, 4> product;
          product.template multiply<Inner::across, last ? Inner::across : Inner::along>(
              {of.of_x ? s.dt : s.du, of.row, hidden_stride},
              {of.of_x ? tile_x : tile_g, last ? of.column : of.column * plan.map_stride, plan.map_stride}, plan.tile);
          weight_sums[i].add(product);
        }
        block_sync();  // x and g were read
      }
      if (p.dx.data) map_gradient<T, last>(plan, s, tile_x, s.dt, theta, x.width, p.target == Target::x && d.map.data);
      if (p.dg.data) map_gradient<T, last>(plan, s, tile_g, s.du, phi, g.width, p.target == Target::g && d.map.data);
      block_sync();  // d was read
      if (p.dx.data) put_map<T, last>(p.dx, tile_x, x, plan, tile);
      if (p.dg.data) put_map<T, last>(p.dg, tile_g, g, plan, tile);
      if (!alone) block_sync();
    }
    if (!alone) fetch_maps(next, other);
    async_commit();
    if (d.map.data && next < plan.units)
      fetch<T, last>(s.d, plan.map_stride, d, n, tile_of(n, plan, next), plan.tile, 0, d.width);
    async_commit();
    buffer = other;
  }
  async_wait();
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
