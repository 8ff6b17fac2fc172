// Gradients of the maps from those of t and u.
#pragma once

#include "cuda/launch.cuh"
#include "ops/attention_gate/hidden_gradient.cuh"

namespace attnkern::attention_gate {

// Columns of a warp's product; it has 32 rows. Wide ones read less of d, but floats have no registers for them.
template <class T>
constexpr int kProductWidth = sizeof(T) == 2 ? 2 * kWarpTile : kWarpTile;
template <class T>
constexpr int product_threads(int rows, int columns) {
  return rows * columns / kProductWidth<T>;
}
// Hidden units or positions that a block of a gradient's product takes at once.
template <class T>
constexpr int kPanel = 64 / static_cast<int>(sizeof(T));

// A map's gradient begins with alpha d (logits given) or d; data is null where it begins with 0.
struct Beginning {
  ConstMap d;
  const float* logits;
};

// `panels` panels one after another, two ahead: start(i, stage) has copies on their way, use(i, stage) multiplies.
template <class Start, class Use>
ATTNKERN_DEVICE void each_panel(int64_t panels, const Start& start, const Use& use) {
  const auto begin = [&](int64_t i, int stage) {
    if (i < panels) start(i, stage);
    async_commit();
  };
  for (int stage = 0; stage < kStages - 1; ++stage) begin(stage, stage);
  int stage = 0;
  for (int64_t i = 0; i < panels; ++i) {
    async_wait<kStages - 2>();
    block_sync();  // this panel is there, and the one before was read
    begin(i + kStages - 1, stage ? stage - 1 : kStages - 1);
    use(i, stage);
    stage = stage + 1 < kStages ? stage + 1 : 0;
  }
  async_wait();
  block_sync();
}

template <class T>
ATTNKERN_HOST_DEVICE constexpr int panel_size(int rows, int columns) {
  return rows * row_stride<T>(columns);
}

// Rows of the result in shared memory lie as in the map.
template <bool last>
ATTNKERN_HOST_DEVICE constexpr int result_stride(int tile, int columns) {
  return row_stride<float>(last ? columns : tile);
}

template <class T, bool last>
int map_gradient_bytes(int tile, int columns) {
  const int panels = shared_bytes<T>(kStages * panel_size<T>(tile, kPanel<T>)) +
                     shared_bytes<T>(kStages * panel_size<T>(kPanel<T>, columns));
  const int result = shared_bytes<float>((last ? tile : columns) * result_stride<last>(tile, columns));
  return panels > result ? panels : result;
}

// Computes   d map = beginning + weight^T d, over the patches of a range of units
// Layout     d [positions, hidden units]; weight to nearest [hidden units, terms]; the map's own
// Mapping    a block: a unit's positions and plan.map_columns terms; panels of 32 (float: 16) hidden units
// Traffic    d and the weights from L2; the beginning and the result once
// Numerics   float; hidden units in order, one rounding
template <class T, bool last>
ATTNKERN_KERNEL(kMostThreads, 2)
attention_gate_map_gradient_kernel(ATTNKERN_GRID_CONSTANT const Sizes n, ATTNKERN_GRID_CONSTANT const Plan plan,
                                   ATTNKERN_GRID_CONSTANT const Operand o, const SplitWeight<T> weight, const T* d,
                                   ATTNKERN_GRID_CONSTANT const HiddenGradients range,
                                   ATTNKERN_GRID_CONSTANT const Beginning beginning,
                                   ATTNKERN_GRID_CONSTANT const Map out) {
  const int columns = plan.map_columns;
  const int blocks = (o.width + columns - 1) / columns, term = static_cast<int>(block_index() % blocks) * columns;
  const int64_t unit = range.first + block_index() / blocks;
  const int terms = at_most(o.width - term, columns);
  const GateTile tile = tile_of(n, plan, unit);
  const WarpPlace place(columns, kWarpTile, kProductWidth<T>);
  WarpProduct<T, 2, kProductWidth<T> / 8> product;
  {
    SharedArena arena;
    const int a_size = panel_size<T>(plan.tile, kPanel<T>), b_size = panel_size<T>(kPanel<T>, columns);
    const int a_stride = row_stride<T>(kPanel<T>), b_stride = row_stride<T>(columns);
    const Shared<T> a = arena.take<T>(kStages * a_size), b = arena.take<T>(kStages * b_size);
    const int spare = multiple_of(terms, kProductWidth<T>) - terms;  // the last warp multiplies them all the same
    if (spare > 0)
      for (Walk w(spare); w.row < kStages * kPanel<T>; w.next())
        b.store(w.row * b_stride + terms + w.column, narrow<T>(0.0f));
    const T* const rows = d + (unit - range.first) * plan.tile * range.pitch;
    const auto start = [&](int64_t i, int stage) {
      fetch_rows(a.slice(stage * a_size, a_size), a_stride, rows + i * kPanel<T>, range.pitch, plan.tile, kPanel<T>);
      fetch_rows(b.slice(stage * b_size, b_size), b_stride, weight.row(kNearest<T>, i * kPanel<T>) + term, weight.width,
                 kPanel<T>, terms);
    };
    each_panel(range.pitch / kPanel<T>, start, [&](int64_t, int stage) {
      if (place.column < terms)
        product.template multiply<Inner::along, Inner::across>(
            {a.slice(stage * a_size, a_size), place.row * a_stride, a_stride},
            {b.slice(stage * b_size, b_size), place.column, b_stride}, kPanel<T>);
    });
  }
  SharedArena again;  // the result takes the panels' place
  const int stride = result_stride<last>(plan.tile, columns);
  const Shared<float> result = again.take<float>((last ? plan.tile : columns) * stride);
  product.each([&](int row, int column, float value) {
    row += place.row;
    column += place.column;
    result.store(last ? row * stride + column : column * stride + row, value);
  });
  block_sync();

  const Plane<T*> to = plane_of<T, last>(out, tile.sample, o.channels, o.length);
  const Plane<const T*> from =
      plane_of<const T, last>(beginning.d.data ? beginning.d : o.map, tile.sample, o.channels, o.length);
  const float* const logits = beginning.logits ? beginning.logits + tile.sample * product_of(n.grid) : nullptr;
  const auto put = [&](int64_t c, int64_t l, int64_t position, auto width, int i) {
    constexpr int pack = decltype(width)::value;
    Vec<float, pack> values = result.template load_vec<pack>(i);
    if (beginning.d.data) {
      const Vec<T, pack> begin = load_global_vec<pack, Cache::streaming>(from.at(c, l));
#pragma unroll
      for (int v = 0; v < pack; ++v) {
        const float factor = logits ? sigmoid(load_global(logits + position + (last ? 0 : v))) : 1.0f;
        values[v] = factor * widen(begin[v]) + values[v];
      }
    }
    store_global_vec<Cache::streaming>(to.at(c, l), narrow<T>(values));
  };
  const Patches patches{n};
  if (o.patch == 1) {
    const int channels = at_most(o.channels - term, columns);
    each_pack<T, last>(channels, tile.count, to.vector && from.vector, [&](int c, int p, auto width) {
      put(term + c, tile.first + p, tile.first + p, width, last ? p * stride + c : c * stride + p);
    });
  } else {
    for (Walk w(last ? terms : tile.count); w.row < (last ? tile.count : terms); w.next()) {
      const int p = last ? w.row : w.column, k = last ? w.column : w.row;
      const Term at(o, term + k);
      if (at.channel >= o.channels) continue;
      put(at.channel, patches.corner(tile.first + p) + patches.within(at.patch), tile.first + p,
          std::integral_constant<int, 1>{}, w.row * stride + w.column);
    }
  }
}

template <class T, bool last>
Status launch_map_gradient(const BackwardParams& p, const Plan& plan, const Operand& o, const SplitWeight<T>& weight,
                           const void* d, const HiddenGradients& range, const Beginning& beginning, const Map& out,
                           void* stream) {
  const int columns = plan.map_columns;
  const int64_t blocks = (range.last - range.first) * ((o.width + columns - 1) / columns);
  return launch(attention_gate_map_gradient_kernel<T, last>,
                {blocks, product_threads<T>(plan.tile, columns), map_gradient_bytes<T, last>(plan.tile, columns)},
                stream, p.sizes, plan, o, weight, static_cast<const T*>(d), range, beginning, out);
}

constexpr int kElementThreads = 256;

// Computes   dx = d (0 without one) where no patch lies
// Layout     the map's own
// Mapping    a thread an element
// Traffic    d and dx once there
// Numerics   none
template <class T>
ATTNKERN_KERNEL(kElementThreads, 4)
attention_gate_uncovered_kernel(ATTNKERN_GRID_CONSTANT const Sizes n, bool last,
                                ATTNKERN_GRID_CONSTANT const ConstMap d, ATTNKERN_GRID_CONSTANT const Map out) {
  const int64_t length = product_of(n.x), i = int64_t{block_index()} * kElementThreads + thread_index();
  if (i >= n.batch * n.channels * length) return;
  const int64_t sample = i / (n.channels * length), rest = i % (n.channels * length);
  const int64_t l = last ? rest / n.channels : rest % length, c = last ? rest % n.channels : rest / length;
  const int64_t l3 = l % n.x[2], l2 = l / n.x[2] % n.x[1], l1 = l / n.x[2] / n.x[1];
  if (l1 < n.grid[0] * n.kernel[0] && l2 < n.grid[1] * n.kernel[1] && l3 < n.grid[2] * n.kernel[2]) return;
  const auto at = [&](const auto& map) {
    return sample * map.stride_batch + c * map.stride_channel + l * map.stride_position;
  };
  const T value = d.data ? load_global(static_cast<const T*>(d.data) + at(d)) : narrow<T>(0.0f);
  store_global(static_cast<T*>(out.data) + at(out), value);
}

template <class T>
Status launch_uncovered(const BackwardParams& p, const ConstMap& d, void* stream) {
  const Sizes& n = p.sizes;
  bool covered = true;
  for (int i = 0; i < 3; ++i) covered = covered && n.grid[i] * n.kernel[i] == n.x[i];
  if (covered) return {};
  const int64_t elements = n.batch * n.channels * product_of(n.x);
  return launch(attention_gate_uncovered_kernel<T>,
                {(elements + kElementThreads - 1) / kElementThreads, kElementThreads}, stream, n,
                p.x.stride_position != 1, d, p.dx);
}

}  // namespace attnkern::attention_gate
