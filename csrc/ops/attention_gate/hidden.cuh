// The loop of every kernel that needs h: t = theta x and u = phi g of tiles of positions, in a block's registers.
#pragma once

#include "cuda/activation.cuh"
#include "ops/attention_gate/weights.cuh"

namespace attnkern::attention_gate {

// theta x and phi g, in the order in which a tile takes them; phi is missing where g is resampled or not wanted.
template <class T>
struct Work {
  using Element = T;
  Operand operands[2];
  SplitWeight<T> weights[2];
  int count;
  int theta;  // which of them
};

struct Step {
  int64_t unit;
  int pass, operand, chunk;
};

template <class T, bool last>
struct Stream {
  const Sizes& n;
  const Plan& plan;
  const Work<T>& work;
  int first_pass, end_pass;
  Shared<T> maps, weights;

  ATTNKERN_DEVICE Stream(const Sizes& sizes, const Plan& plan_, const Work<T>& work_, SharedArena& arena, int pass,
                         int passes)
      : n(sizes),
        plan(plan_),
        work(work_),
        first_pass(pass),
        end_pass(pass + passes),
        maps(arena.take<T>(kStages * plan.map_size)),
        weights(arena.take<T>((plan.whole ? work.count : kStages) * plan.weight_size)) {}

  // body(step, stage) for every chunk of the units from `first` to `end` in steps of plan.blocks; two chunks are on
  // their way ahead of it.
  template <class Body>
  ATTNKERN_DEVICE void run(int64_t first, int64_t end, const Body& body) const {
    Step ahead{first, first_pass, 0, 0};
    if (plan.whole)
      for (int o = 0; o < work.count; ++o) fetch_weights(o, first_pass, 0, o);
    for (int stage = 0; stage < kStages - 1; ++stage) start(ahead, end, stage);
    int stage = 0;
    for (Step step{first, first_pass, 0, 0}; step.unit < end; next(step)) {
      async_wait<kStages - 2>();
      block_sync();  // this chunk is there, and the one before was read
      start(ahead, end, stage ? stage - 1 : kStages - 1);
      body(step, stage);
      stage = stage + 1 < kStages ? stage + 1 : 0;
    }
    async_wait();
  }

  // Of the last chunk of the last map: what a pass over a tile adds up is complete.
  ATTNKERN_DEVICE bool completes(const Step& s) const {
    return s.operand + 1 == work.count && s.chunk + 1 == chunks(s.operand);
  }

  ATTNKERN_DEVICE Shared<T> map(int stage) const { return maps.slice(stage * plan.map_size, plan.map_size); }

  // product += the chunk's [positions, hidden units] at this warp's place.
  template <class Product>
  ATTNKERN_DEVICE void multiply(const Step& s, int stage, const WarpPlace& place, Product& product) const {
    constexpr Inner inner = last ? Inner::along : Inner::across;
    const int from = plan.whole ? s.operand : stage;
    const Block<T> a{map(stage), last ? place.row * plan.map_stride : place.row, plan.map_stride};
    const Block<T> b{weights.slice(from * plan.weight_size, plan.weight_size), place.column * plan.weight_stride,
                     plan.weight_stride};
    product.template multiply<inner, Inner::along, kParts<T>>(a, b, depth(s), plan.hidden * plan.weight_stride);
  }

 private:
  ATTNKERN_DEVICE int chunks(int operand) const {
    return plan.whole ? 1 : (work.operands[operand].width + plan.chunk - 1) / plan.chunk;
  }
  ATTNKERN_DEVICE int depth(const Step& s) const {
    return at_most(work.operands[s.operand].width - s.chunk * plan.chunk, plan.chunk);
  }
  ATTNKERN_DEVICE void next(Step& s) const {
    if (++s.chunk < chunks(s.operand)) return;
    s.chunk = 0;
    if (++s.operand < work.count) return;
    s.operand = 0;
    if (++s.pass < end_pass) return;
    s.pass = first_pass;
    s.unit += plan.blocks;
  }
  ATTNKERN_DEVICE void fetch_weights(int operand, int pass, int term, int slot) const {
    const SplitWeight<T>& w = work.weights[operand];
    const int width = plan.whole ? w.width : at_most(w.width - term, plan.chunk),
              size = plan.hidden * plan.weight_stride;
    for (int part = 0; part < kParts<T>; ++part)
      fetch_rows(weights.slice(slot * plan.weight_size + part * size, size), plan.weight_stride,
                 w.row(part, int64_t{pass} * plan.hidden) + term, w.width, plan.hidden, width);
  }
  ATTNKERN_DEVICE void start(Step& ahead, int64_t end, int stage) const {
    if (ahead.unit < end) {
      const int term = ahead.chunk * plan.chunk;
      fetch<T, last>(map(stage), plan.map_stride, work.operands[ahead.operand], n, tile_of(n, plan, ahead.unit),
                     plan.tile, term, depth(ahead));
      if (!plan.whole) fetch_weights(ahead.operand, ahead.pass, term, stage);
      next(ahead);
    }
    async_commit();
  }
};

// ------------------------------------------------------------------ the hidden layer

ATTNKERN_DEVICE float hidden_act(const Inputs& p, float h) {
  if (p.act == HiddenAct::softplus) return softplus(h);
  return activation(p.act == HiddenAct::relu ? Act::relu : Act::leaky_relu, h, static_cast<float>(p.slope));
}

// grad act'(h); relu's 0 also stops a grad that is not finite, as torch's does.
ATTNKERN_DEVICE float hidden_backward(const Inputs& p, float grad, float h) {
  if (p.act == HiddenAct::softplus) return h > 20.0f ? grad : grad * sigmoid(h);
  return activation_backward(p.act == HiddenAct::relu ? Act::relu : Act::leaky_relu, grad, h,
                             static_cast<float>(p.slope));
}

// Element i of an array of floats, or `otherwise` where there is none.
ATTNKERN_DEVICE float element_of(const void* data, int64_t i, float otherwise = 0.0f) {
  return data ? load_global(static_cast<const float*>(data) + i) : otherwise;
}

// The two positions of g, along one dim, that a position of the grid lies between. Where they are one it has the whole
// weight: 0 times infinity would be NaN.
struct Tap {
  int64_t near, far;
  float near_weight, far_weight;
  int count;

  ATTNKERN_DEVICE Tap(const Inputs& p, int dim, int64_t q) {
    for (int d = 0; d < dim; ++d) q += p.sizes.grid[d];
    const float* const weights = static_cast<const float*>(p.tap_weights) + 2 * q;
    near = load_global(p.taps + 2 * q);
    far = load_global(p.taps + 2 * q + 1);
    near_weight = load_global(weights);
    far_weight = load_global(weights + 1);
    count = near == far ? 1 : 2;
    if (count == 1) near_weight += far_weight;
  }
  ATTNKERN_DEVICE int64_t at(int i) const { return i ? far : near; }
  ATTNKERN_DEVICE float weight(int i) const { return i ? far_weight : near_weight; }
};

// product += g resampled, at the positions from `row` and the hidden units from `f` on.
template <class T, int Rows, int Columns>
ATTNKERN_DEVICE void add_resampled(WarpProduct<T, Rows, Columns>& product, const Inputs& p, const GateTile& tile,
                                   int row, int64_t f) {
  const Sizes& n = p.sizes;
  const int g = lane_id() / 4, c = lane_id() % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2 * Rows; ++r) {
    const int64_t at = row + 8 * r + g, l = tile.first + at;
    if (at >= tile.count) continue;
    const Tap a(p, 0, l / n.grid[2] / n.grid[1]), b(p, 1, l / n.grid[2] % n.grid[1]), e(p, 2, l % n.grid[2]);
#pragma unroll 1
    for (int i = 0; i < a.count * b.count * e.count; ++i) {
      const int k = i % e.count, j = i / e.count % b.count, h = i / e.count / b.count;
      const int64_t position = (a.at(h) * n.g[1] + b.at(j)) * n.g[2] + e.at(k);
      const float weight = a.weight(h) * b.weight(j) * e.weight(k);
      const T* const from = static_cast<const T*>(p.g.data) + tile.sample * p.g.stride_batch +
                            (f + c) * p.g.stride_channel + position * p.g.stride_position;
#pragma unroll
      for (int j = 0; j < Columns; ++j)
#pragma unroll
        for (int v = 0; v < 2; ++v)
          if (f + 8 * j + c + v < n.hidden)
            product.sum[r / 2][j].values[r % 2 * 2 + v] +=
                weight * widen(load_global(from + (8 * j + v) * p.g.stride_channel));
    }
  }
}

}  // namespace attnkern::attention_gate
