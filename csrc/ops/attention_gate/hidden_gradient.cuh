// What a tile's dq brings to t and u, and to the vectors of the hidden units.
#pragma once

#include "ops/attention_gate/lanes.cuh"

namespace attnkern::attention_gate {

// A range of units' gradients of t and u in workspace, [units, positions of a tile, hidden units] in the maps' dtype.
struct HiddenGradients {
  int64_t first, last;  // units
  int64_t pitch;        // hidden units, with padding
  void* dt;
  void* du;  // dt where no branch is normalised
};

// One branch's share: scale dh + k0 + k1 t.
struct UnitBranch {
  float scale, k0, k1;
  ATTNKERN_DEVICE UnitBranch(const Branch& b, int64_t f)
      : scale(element_of(b.scale, f, 1.0f)), k0(element_of(b.k0, f)), k1(element_of(b.k1, f)) {}
  ATTNKERN_DEVICE float of(const Branch& b, float dh, float t) const { return b.k0 ? scale * dh + k0 + k1 * t : dh; }
};

// A lane's sums over its positions.
template <int Columns = kLaneColumns>
struct LaneVectors {
  float dbias[Columns] = {}, dpsi[Columns] = {}, dpsi_bias = 0.0f;

  // Writes, or adds to, a warp's slot [3, pitch]; the warps of the first hidden units have the slot's dpsi_bias.
  ATTNKERN_DEVICE void put(float* slot, int64_t pitch, bool first, bool adds) const {
    const auto add = [&](bool own, float* to, float value) {
      if (own) store_global(to, adds ? load_global(to) + value : value);
    };
    each_unit<Columns>([&](int i, int unit) {
      add(lane_id() < 4, slot + unit, rows_sum(dbias[i]));
      add(lane_id() < 4, slot + pitch + unit, rows_sum(dpsi[i]));
    });
    const float sum = rows_sum(dpsi_bias);  // of lanes 0 to 3 the same
    add(first && lane_id() == 0, slot + 2 * pitch, sum);
  }
};

// dt, du of a lane's positions and its hidden units i, and the sums of dh and dq act(h).
template <int Rows>
struct UnitGradient {
  float dt[Rows], du[Rows];

  template <class Product, class Vectors>
  ATTNKERN_DEVICE UnitGradient(const BackwardParams& p, int64_t f, const LaneGradients<Rows>& dq, const Product& t,
                               const Product& u, int i, Vectors& sums) {
    const bool exists = f < p.sizes.hidden;
    const int64_t at = exists ? f : 0;
    const HiddenUnit unit(p, p.theta_branch.scale, p.phi_branch.scale, at);
    const UnitBranch theta(p.theta_branch, at), phi(p.phi_branch, at);
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      dt[r] = du[r] = 0.0f;
      if (!exists || !dq.real[r]) continue;
      const float a = value_of(t, r, i), b = value_of(u, r, i), h = unit.h(a, b);
      const float dh = hidden_backward(p, dq.value[r] * unit.psi, h);
      sums.dbias[i] += dh;
      sums.dpsi[i] += dq.value[r] * hidden_act(p, h);
      dt[r] = theta.of(p.theta_branch, dh, a);
      du[r] = phi.of(p.phi_branch, dh, b);
    }
  }
};

// Computes   h again, dt and du of a range of units, and a block's sums of dbias, dpsi and dpsi_bias
// Layout     as forward's; dt, du [positions, hidden units]; partial [slots, 3, hidden units]
// Mapping    as forward's, a pass over the hidden units a block
// Traffic    x and g once a pass, dt and du once
// Numerics   float; dt and du rounded once, as eager's are; sums of ranges in order
template <class T, bool last, int Rows>
ATTNKERN_KERNEL(kMostThreads, 1)
attention_gate_hidden_gradient_kernel(ATTNKERN_GRID_CONSTANT const BackwardParams p,
                                      ATTNKERN_GRID_CONSTANT const Plan plan, ATTNKERN_GRID_CONSTANT const Work<T> work,
                                      const float* dq, const HiddenGradients out, float* partial) {
  const PassBlock own(plan);
  const WarpPlace place(plan.hidden, 8 * Rows);
  SharedArena arena;
  const Stream<T, last> stream(p.sizes, plan, work, arena, own.pass, 1);
  WarpProduct<T, Rows / 2, kLaneColumns / 2> t, u;
  LaneVectors<> vectors;
  const int64_t first = int64_t{own.pass} * plan.hidden + place.column;
  stream.run(out.first + own.block, out.last, [&](const Step& step, int stage) {
    if (step.operand == work.theta)
      stream.multiply(step, stage, place, t);
    else
      stream.multiply(step, stage, place, u);
    if (!stream.completes(step)) return;
    const GateTile tile = tile_of(p.sizes, plan, step.unit);
    if (!p.phi) add_resampled(u, p, tile, place.row, first);
    const LaneGradients<Rows> gradients(TileGradients(dq, p.sizes, tile), tile, place.row);
    const int64_t row = (step.unit - out.first) * plan.tile + place.row + lane_id() / 4;
#pragma unroll
    for (int j = 0; j < kLaneColumns; j += 2) {
      const int unit = j / 2 * 8 + lane_id() % 4 * 2;
      const UnitGradient one(p, first + unit, gradients, t, u, j, vectors);
      const UnitGradient two(p, first + unit + 1, gradients, t, u, j + 1, vectors);
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        const int64_t at = (row + 8 * r) * out.pitch + first + unit;
        store_global_vec(static_cast<T*>(out.dt) + at, Vec<T, 2>{{narrow<T>(one.dt[r]), narrow<T>(two.dt[r])}});
        if (out.du != out.dt)
          store_global_vec(static_cast<T*>(out.du) + at, Vec<T, 2>{{narrow<T>(one.du[r]), narrow<T>(two.du[r])}});
      }
    }
#pragma unroll
    for (int r = 0; r < Rows; ++r) vectors.dpsi_bias += gradients.value[r];
    t.clear();
    u.clear();
  });
  if (!partial) return;
  vectors.put(slot_of(partial, plan, own, place, 3), out.pitch, first == 0, out.first > 0);
}

}  // namespace attnkern::attention_gate
