// The gradient of a resampled g: the adjoint of what hidden.cuh's Tap does.
#pragma once

#include "cuda/launch.cuh"
#include "ops/attention_gate/hidden_gradient.cuh"

namespace attnkern::attention_gate {

constexpr int kResampleThreads = 128;

// Of each position of g along each dim in turn, the positions of the grid that may lie beside it.
struct Beside {
  int64_t begin, end;
};

// Computes   every Beside
// Layout     [g1 + g2 + g3]
// Mapping    a thread a position of a dim
// Traffic    the taps of the dim once a thread
// Numerics   none
ATTNKERN_KERNEL(kResampleThreads, 4)
attention_gate_beside_kernel(ATTNKERN_GRID_CONSTANT const Inputs p, Beside* out) {
  const Sizes& n = p.sizes;
  const int64_t i = int64_t{block_index()} * kResampleThreads + thread_index();
  if (i >= n.g[0] + n.g[1] + n.g[2]) return;
  const int dim = i < n.g[0] ? 0 : i < n.g[0] + n.g[1] ? 1 : 2;
  const int64_t own = i - (dim > 0 ? n.g[0] : 0) - (dim > 1 ? n.g[1] : 0);
  int64_t begin = 0, end = 0;
  for (int64_t q = 0; q < n.grid[dim]; ++q) {
    const Tap tap(p, dim, q);
    if (tap.near != own && tap.far != own) continue;
    if (end == 0) begin = q;
    end = q + 1;
  }
  store_global(&out[i].begin, begin);
  store_global(&out[i].end, end);
}

// f(q, weight) for the positions of the grid along a dim that `own` is beside.
template <class F>
ATTNKERN_DEVICE void each_beside(const Inputs& p, const Beside* beside, int dim, int64_t own, const F& f) {
  const Beside* const at = beside + own + (dim > 0 ? p.sizes.g[0] : 0) + (dim > 1 ? p.sizes.g[1] : 0);
  const int64_t end = load_global(&at->end);
  for (int64_t q = load_global(&at->begin); q < end; ++q) {
    const Tap tap(p, dim, q);
    for (int i = 0; i < tap.count; ++i)
      if (tap.at(i) == own) f(q, tap.weight(i));
  }
}

// Computes   dg = the sum over the grid of weights times du, of whole samples
// Layout     du [positions, hidden units], units as the range has them; dg the map's own
// Mapping    a thread an element of dg, neighbours along the hidden units
// Traffic    du 2^dims times, from cache; dg once
// Numerics   float; positions of the grid in order, one rounding
template <class T>
ATTNKERN_KERNEL(kResampleThreads, 4)
attention_gate_resample_gradient_kernel(ATTNKERN_GRID_CONSTANT const BackwardParams p,
                                        ATTNKERN_GRID_CONSTANT const Plan plan,
                                        ATTNKERN_GRID_CONSTANT const HiddenGradients range, const Beside* beside) {
  const Sizes& n = p.sizes;
  const int64_t length = product_of(n.g), samples = (range.last - range.first) / plan.tiles;
  const int64_t i = int64_t{block_index()} * kResampleThreads + thread_index();
  if (i >= samples * length * n.hidden) return;
  const int64_t f = i % n.hidden, l = i / n.hidden % length, sample = i / n.hidden / length;
  const T* const du = static_cast<const T*>(range.du) + sample * plan.tiles * plan.tile * range.pitch + f;
  float sum = 0.0f;
  each_beside(p, beside, 0, l / n.g[2] / n.g[1], [&](int64_t q1, float w1) {
    each_beside(p, beside, 1, l / n.g[2] % n.g[1], [&](int64_t q2, float w2) {
      each_beside(p, beside, 2, l % n.g[2], [&](int64_t q3, float w3) {
        const int64_t q = (q1 * n.grid[1] + q2) * n.grid[2] + q3;  // a sample's tiles stand one after another
        sum += w1 * w2 * w3 * widen(load_global(du + q * range.pitch));
      });
    });
  });
  const int64_t at =
      (range.first / plan.tiles + sample) * p.dg.stride_batch + f * p.dg.stride_channel + l * p.dg.stride_position;
  store_global(static_cast<T*>(p.dg.data) + at, narrow<T>(sum));
}

inline Status launch_beside(const BackwardParams& p, Beside* out, void* stream) {
  const int64_t positions = p.sizes.g[0] + p.sizes.g[1] + p.sizes.g[2];
  return launch(attention_gate_beside_kernel, {(positions + kResampleThreads - 1) / kResampleThreads, kResampleThreads},
                stream, p, out);
}

template <class T>
Status launch_resample_gradient(const BackwardParams& p, const Plan& plan, const HiddenGradients& range,
                                const Beside* beside, void* stream) {
  const int64_t elements = (range.last - range.first) / plan.tiles * product_of(p.sizes.g) * p.sizes.hidden;
  return launch(attention_gate_resample_gradient_kernel<T>,
                {(elements + kResampleThreads - 1) / kResampleThreads, kResampleThreads}, stream, p, plan, range,
                beside);
}

}  // namespace attnkern::attention_gate
