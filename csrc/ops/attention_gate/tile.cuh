// Maps in global memory, and tiles of positions of them in shared memory.
#pragma once

#include "cuda/async.cuh"
#include "ops/attention_gate/product.cuh"

namespace attnkern::attention_gate {

ATTNKERN_HOST_DEVICE int64_t product_of(const int64_t (&size)[3]) { return size[0] * size[1] * size[2]; }

ATTNKERN_HOST_DEVICE int multiple_of(int64_t count, int unit) {
  return static_cast<int>((count + unit - 1) / unit * unit);
}

ATTNKERN_DEVICE int at_most(int64_t value, int limit) {
  return value < 0 ? 0 : value < limit ? static_cast<int>(value) : limit;
}

// One sample of a map. Neighbours in memory are channels (last) or positions.
template <class Pointer>
struct Plane {
  Pointer data;
  int64_t channel, position;  // strides
  int64_t channels;
  bool vector;  // in whole, aligned packs

  ATTNKERN_DEVICE Pointer at(int64_t c, int64_t l) const { return data + c * channel + l * position; }
};

template <class T, bool last, class Pointer>
ATTNKERN_DEVICE Plane<T*> plane_of(const MapOf<Pointer>& map, int64_t sample, int64_t channels, int64_t length) {
  constexpr int pack = pack_size<T>();
  const int64_t rows = last ? map.stride_position : map.stride_channel, width = last ? channels : length;
  const bool adjacent = (last ? map.stride_channel : map.stride_position) == 1;
  const bool whole = (rows | map.stride_batch | width) % pack == 0;
  return {static_cast<T*>(map.data) + sample * map.stride_batch, map.stride_channel, map.stride_position, channels,
          adjacent && whole && reinterpret_cast<uintptr_t>(map.data) % 16 == 0};
}

// This thread's elements of a matrix whose elements the block's threads take in turn, along its rows: row, column and,
// after next(), those block_size() on. One division a matrix.
struct Walk {
  int row, column, columns, rows_on, columns_on;
  ATTNKERN_DEVICE explicit Walk(int width)
      : row(thread_index() / width),
        column(thread_index() - row * width),
        columns(width),
        rows_on(block_size() / width),
        columns_on(block_size() - rows_on * width) {}
  ATTNKERN_DEVICE void next() {
    row += rows_on;
    column += columns_on;
    if (column >= columns) {
      column -= columns;
      ++row;
    }
  }
};

// ------------------------------------------------------------------ units

// Positions [first, first + count) of the logits' grid of a sample.
struct GateTile {
  int64_t sample, first;
  int count;
};

ATTNKERN_DEVICE GateTile tile_of(const Sizes& n, const Plan& plan, int64_t unit) {
  const int64_t sample = unit / plan.tiles, first = (unit - sample * plan.tiles) * plan.tile;
  return {sample, first, at_most(product_of(n.grid) - first, plan.tile)};
}

// ------------------------------------------------------------------ patches

// Positions of x under the patch of a position of the grid: `corner` of the first, `within` on to the j-th.
struct Patches {
  const Sizes& n;

  ATTNKERN_DEVICE int64_t corner(int64_t l) const {
    const int64_t i3 = l % n.grid[2], i2 = l / n.grid[2] % n.grid[1], i1 = l / n.grid[2] / n.grid[1];
    return (i1 * n.kernel[0] * n.x[1] + i2 * n.kernel[1]) * n.x[2] + i3 * n.kernel[2];
  }
  ATTNKERN_DEVICE int64_t within(int64_t j) const {
    const int64_t a3 = j % n.kernel[2], a2 = j / n.kernel[2] % n.kernel[1], a1 = j / n.kernel[2] / n.kernel[1];
    return (a1 * n.x[1] + a2) * n.x[2] + a3;
  }
};

// What theta or phi multiplies: the terms of a sum are channels, or channels of each position of a patch in turn.
struct Operand {
  ConstMap map;
  int64_t channels, length;
  int64_t patch;  // positions of a patch
  int padded;     // channels in whole steps
  int width;      // terms in whole warp tiles: patch times padded and more
};

// Where a term lies: a channel (beyond the map's: zero) of a position of the patch.
struct Term {
  int64_t patch;
  int channel;
  ATTNKERN_DEVICE Term(const Operand& o, int k)
      : patch(o.patch == 1 ? 0 : k / o.padded),
        channel(patch < o.patch ? k - static_cast<int>(patch) * o.padded : o.padded) {}
};

// ------------------------------------------------------------------ copies

// Starts copying terms [term, term + depth) of a tile's positions to shared memory, [positions, depth] (last) or
// [depth, positions] with rows `stride` apart; zero beyond the map's channels and the tile's count. Complete after
// async_wait and a barrier.
template <class T, bool last>
ATTNKERN_DEVICE void fetch(const Shared<T>& to, int stride, const Operand& o, const Sizes& n, const GateTile& tile,
                           int positions, int term, int depth) {
  constexpr int pack = pack_size<T>(), batch = 4;
  const Plane<const T*> from = plane_of<const T, last>(o.map, tile.sample, o.channels, o.length);
  const Patches patches{n};
  const auto position_of = [&](int p, const Term& k) {
    return o.patch == 1 ? tile.first + p : patches.corner(tile.first + p) + patches.within(k.patch);
  };
  if (from.vector && (last || o.patch == 1)) {
    for (Walk w((last ? depth : positions) / pack); w.row < (last ? positions : depth); w.next()) {
      const int p = last ? w.row : w.column * pack, k = last ? w.column * pack : w.row;
      const Term at(o, term + k);
      const int i = last ? p * stride + k : k * stride + p;
      if (p < tile.count && at.channel < o.channels)
        async_copy(to, i, from.at(at.channel, position_of(p, at)));
      else
        to.store_vec(i, Vec<T, pack>{});
    }
    return;
  }
  Walk w(last ? depth : positions);
  const int rows = last ? positions : depth;
  while (w.row < rows) {
    T elements[batch] = {};
    int to_index[batch];
#pragma unroll
    for (int u = 0; u < batch; ++u, w.next()) {
      const int p = last ? w.row : w.column, k = last ? w.column : w.row;
      to_index[u] = w.row < rows ? w.row * stride + w.column : -1;
      if (w.row >= rows || p >= tile.count) continue;
      const Term at(o, term + k);
      if (at.channel < o.channels) elements[u] = load_global(from.at(at.channel, position_of(p, at)));
    }
#pragma unroll
    for (int u = 0; u < batch; ++u)
      if (to_index[u] >= 0) to.store(to_index[u], elements[u]);
  }
}

// Starts copying a dense matrix's block [rows, width], whose rows are whole packs `from_stride` apart.
template <class T>
ATTNKERN_DEVICE void fetch_rows(const Shared<T>& to, int stride, const T* from, int64_t from_stride, int rows,
                                int width) {
  constexpr int pack = pack_size<T>();
  for (Walk w(width / pack); w.row < rows; w.next())
    async_copy(to, w.row * stride + w.column * pack, from + w.row * from_stride + w.column * pack);
}

// f(c, p, std::integral_constant<int, N>) for `channels` channels and `count` positions of a tile, N neighbours a call:
// a whole pack where `whole`, else one.
template <class T, bool last, class F>
ATTNKERN_DEVICE void each_pack(int channels, int count, bool whole, const F& f) {
  constexpr int pack = pack_size<T>();
  const int width = last ? channels : count, rows = last ? count : channels;
  if (whole) {
    for (Walk w(width / pack); w.row < rows; w.next())
      f(last ? w.column * pack : w.row, last ? w.row : w.column * pack, std::integral_constant<int, pack>{});
  } else {
    for (Walk w(width); w.row < rows; w.next())
      f(last ? w.column : w.row, last ? w.row : w.column, std::integral_constant<int, 1>{});
  }
}

}  // namespace attnkern::attention_gate
