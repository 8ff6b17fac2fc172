// A lane's share of a tile: 4 or 8 positions, 8 hidden units, and what it adds up over tiles.
#pragma once

#include "ops/attention_gate/hidden.cuh"

namespace attnkern::attention_gate {

constexpr int kLaneRows = 4, kLaneColumns = 8;  // positions (8 of a tall warp) and hidden units of a lane

// The block's pass over the hidden units, and its number among the blocks of that pass.
struct PassBlock {
  int pass;
  int64_t block;
  ATTNKERN_DEVICE explicit PassBlock(const Plan& plan)
      : pass(static_cast<int>(block_index() / plan.blocks)), block(block_index() % plan.blocks) {}
};

// The partial sums of this warp's row of warps: [slots, arrays, hidden units].
ATTNKERN_DEVICE float* slot_of(float* partial, const Plan& plan, const PassBlock& own, const WarpPlace& place,
                               int arrays) {
  const int64_t slot = own.block * (plan.tile / plan.warp_tile) + place.row / plan.warp_tile;
  return partial + slot * arrays * plan.passes * plan.hidden + own.pass * plan.hidden + place.column;
}

// The sum of the lanes that have the same hidden units.
ATTNKERN_DEVICE float rows_sum(float value) {
#pragma unroll
  for (int mask = 4; mask < kWarpSize; mask *= 2) value += shuffle_xor(value, mask);
  return value;
}

// f(i, unit) for this lane's hidden units: i is its own, `unit` the warp's.
template <int Columns = kLaneColumns, class F>
ATTNKERN_DEVICE void each_unit(const F& f) {
#pragma unroll
  for (int i = 0; i < Columns; ++i) f(i, i / 2 * 8 + lane_id() % 4 * 2 + i % 2);
}

// Element of a lane's row r and hidden unit i.
template <class Product>
ATTNKERN_DEVICE float value_of(const Product& product, int r, int i) {
  return product.sum[r / 2][i / 2].values[r % 2 * 2 + i % 2];
}

// What a hidden unit is made of besides t and u.
struct HiddenUnit {
  float bias, psi, theta_scale, phi_scale;
  ATTNKERN_DEVICE HiddenUnit(const Inputs& p, const void* theta, const void* phi, int64_t f)
      : bias(element_of(p.bias, f)),
        psi(element_of(p.psi, f)),
        theta_scale(element_of(theta, f, 1.0f)),
        phi_scale(element_of(phi, f, 1.0f)) {}
  ATTNKERN_DEVICE float h(float t, float u) const { return theta_scale * t + phi_scale * u + bias; }
};

// dq of a tile's positions in global memory; null: 0.
struct TileGradients {
  const void* dq;
  int64_t first;
  ATTNKERN_DEVICE TileGradients(const void* dq_, const Sizes& n, const GateTile& tile)
      : dq(dq_), first(tile.sample * product_of(n.grid) + tile.first) {}
  ATTNKERN_DEVICE float load(int at) const { return element_of(dq, first + at); }
};

// dq of a lane's positions, 0 beyond the tile's. `tile_dq` has that of the tile, in shared or in global memory.
template <int Rows = kLaneRows>
struct LaneGradients {
  float value[Rows];
  bool real[Rows];
  template <class From>
  ATTNKERN_DEVICE LaneGradients(const From& tile_dq, const GateTile& tile, int row) {
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const int at = row + 8 * r + lane_id() / 4;
      real[r] = at < tile.count;
      value[r] = real[r] ? tile_dq.load(at) : 0.0f;
    }
  }
};

}  // namespace attnkern::attention_gate
