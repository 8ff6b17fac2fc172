// Gradients of theta and phi from those of t and u.
#pragma once

#include "ops/attention_gate/map_gradient.cuh"

namespace attnkern::attention_gate {

template <class T, bool last>
int weight_gradient_bytes(int rows, int columns) {
  return shared_bytes<T>(kStages * panel_size<T>(kPanel<T>, rows)) +
         shared_bytes<T>(kStages * (last ? panel_size<T>(kPanel<T>, columns) : panel_size<T>(columns, kPanel<T>)));
}

// Computes   sums += d map^T over the units of a split
// Layout     d [positions, hidden units]; the map's own; sums [splits, hidden units, terms]
// Mapping    a block: a split of the range, the plan's `rows` hidden units and `weight_columns` terms; panels of 32
//            (float: 16) positions
// Traffic    the map once a block of hidden units, d once a block of terms, from L2
// Numerics   float; positions of a unit, units, then ranges in order
template <class T, bool last>
ATTNKERN_KERNEL(kMostThreads, 1)
attention_gate_weight_gradient_kernel(ATTNKERN_GRID_CONSTANT const Sizes n, ATTNKERN_GRID_CONSTANT const Plan plan,
                                      ATTNKERN_GRID_CONSTANT const Operand o, const T* d,
                                      ATTNKERN_GRID_CONSTANT const HiddenGradients range, float* sums) {
  const int columns = plan.weight_columns;
  const int64_t term_blocks = (o.width + columns - 1) / columns, hidden_blocks = range.pitch / plan.rows;
  const int term = static_cast<int>(block_index() % term_blocks) * columns;
  const int64_t first = block_index() / term_blocks % hidden_blocks * plan.rows;
  const int64_t split = block_index() / term_blocks / hidden_blocks;
  const int terms = at_most(o.width - term, columns);
  const int64_t share = (range.last - range.first + plan.splits - 1) / plan.splits;
  const int64_t begin = range.first + split * share, rest = range.last - begin;
  const int64_t units = rest < 0 ? 0 : rest < share ? rest : share;
  const int panels = plan.tile / kPanel<T>;  // of a unit

  constexpr Inner inner = last ? Inner::across : Inner::along;
  const int a_size = panel_size<T>(kPanel<T>, plan.rows), a_stride = row_stride<T>(plan.rows);
  const int b_size = last ? panel_size<T>(kPanel<T>, columns) : panel_size<T>(columns, kPanel<T>);
  const int b_stride = row_stride<T>(last ? columns : kPanel<T>);
  SharedArena arena;
  const Shared<T> a = arena.take<T>(kStages * a_size), b = arena.take<T>(kStages * b_size);
  const WarpPlace place(columns, kWarpTile, kProductWidth<T>);
  WarpProduct<T, 2, kProductWidth<T> / 8> product, total;
  const auto start = [&](int64_t i, int stage) {
    const int64_t unit = begin + i / panels;
    const int panel = static_cast<int>(i % panels) * kPanel<T>;
    GateTile tile = tile_of(n, plan, unit);
    tile.first += panel;
    tile.count = at_most(tile.count - panel, kPanel<T>);
    fetch_rows(a.slice(stage * a_size, a_size), a_stride,
               d + ((unit - range.first) * plan.tile + panel) * range.pitch + first, range.pitch, kPanel<T>, plan.rows);
    fetch<T, last>(b.slice(stage * b_size, b_size), b_stride, o, n, tile, kPanel<T>, term,
                   multiple_of(terms, kProductWidth<T>));
  };
  each_panel(units * panels, start, [&](int64_t i, int stage) {
    if (place.column >= terms) return;
    product.template multiply<Inner::across, inner>(
        {a.slice(stage * a_size, a_size), place.row, a_stride},
        {b.slice(stage * b_size, b_size), last ? place.column : place.column * b_stride, b_stride}, kPanel<T>);
    if (i % panels + 1 < panels) return;
    total.add(product);
    product.clear();
  });
  float* const out = sums + (split * range.pitch + first) * o.width + term;
  total.each([&](int row, int column, float value) {
    column += place.column;
    if (column >= terms) return;
    float* const to = out + (place.row + row) * o.width + column;
    store_global(to, range.first ? load_global(to) + value : value);
  });
}

// Computes   a weight's gradient from the sums of all splits
// Layout     [splits, hidden units, terms] -> [F, C k1 k2 k3]
// Mapping    a thread an element
// Traffic    the sums once
// Numerics   float; splits in order
ATTNKERN_KERNEL(kElementThreads, 4)
attention_gate_put_weight_kernel(const float* sums, int64_t hidden, int64_t pitch, int splits, const Operand o,
                                 float* out) {
  const int64_t i = int64_t{block_index()} * kElementThreads + thread_index();
  const int64_t f = i / o.width;
  if (f >= hidden) return;
  const Term k(o, static_cast<int>(i % o.width));
  if (k.channel >= o.channels) return;
  float sum = 0.0f;
#pragma unroll 4
  for (int s = 0; s < splits; ++s) sum += load_global(sums + s * pitch * o.width + i);
  store_global(out + (f * o.channels + k.channel) * o.patch + k.patch, sum);
}

template <class T, bool last>
Status launch_weight_gradient(const BackwardParams& p, const Plan& plan, const Operand& o, const void* d,
                              const HiddenGradients& range, float* sums, void* stream) {
  const int columns = plan.weight_columns;
  const int64_t blocks = plan.splits * (range.pitch / plan.rows) * ((o.width + columns - 1) / columns);
  return launch(attention_gate_weight_gradient_kernel<T, last>,
                {blocks, product_threads<T>(plan.rows, columns), weight_gradient_bytes<T, last>(plan.rows, columns)},
                stream, p.sizes, plan, o, static_cast<const T*>(d), range, sums);
}

inline Status launch_put_weight(const BackwardParams& p, const Plan& plan, const Operand& o, const float* sums,
                                void* out, void* stream) {
  const int64_t hidden = p.sizes.hidden, elements = hidden * o.width;
  return launch(attention_gate_put_weight_kernel, {(elements + kElementThreads - 1) / kElementThreads, kElementThreads},
                stream, sums, hidden, int64_t{plan.passes} * plan.hidden, plan.splits, o, static_cast<float*>(out));
}

}  // namespace attnkern::attention_gate
