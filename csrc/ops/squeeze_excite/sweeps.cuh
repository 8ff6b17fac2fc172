// The two sweeps over a piece: sums per channel, and rescale.
#pragma once

#include "ops/squeeze_excite/stages.cuh"

namespace attnkern::squeeze_excite {

// Sum over aligned groups of `width` lanes, a power of two.
ATTNKERN_DEVICE float lanes_sum(float value, int width) {
  for (int mask = width / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

ATTNKERN_DEVICE int power_of_two_above(int64_t n, int most) {
  int p = 1;
  while (p < n && p < most) p *= 2;
  return p;
}

// Channels first. Sums of every row of the piece, s.sums [kSums, channels_here]; with `keep` the values stay in s.data.
// A thread sums each of its accesses into one word of scratch; an access that runs into the next row leaves that part
// in the row's head. Then a group of lanes adds up a row's words. Tile by tile, so the order is fixed.
template <int V, bool keep, Cache hint, class Stage>
ATTNKERN_DEVICE void sum_rows(const Stage& stage, const Piece& piece, const Plan& plan) {
  using T = typename Stage::Element;
  constexpr int sums = Stage::kSums, unroll = V > 1 ? Stage::kUnroll : 1;
  const auto& s = stage.s;
  const int threads = block_size(), tile = threads * unroll, accesses = piece.count / V;
  for (int i = thread_index(); i < sums * plan.channels_here; i += threads) {
    s.sums.store(i, 0.0f);
    s.heads.store(i, 0.0f);
  }
  block_sync();

  const int width = power_of_two_above(piece.columns / (4 * V), kWarpSize);
  const int groups = threads / width, group = thread_index() / width, lane = thread_index() % width;
  for (int begin = 0; begin < accesses; begin += tile) {
    typename Stage::template Loaded<V> in[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int i = begin + u * threads + thread_index();
      if (i < accesses) in[u] = stage.template load<V, hint>(piece.at(i * V), true);
    }
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int local = u * threads + thread_index(), i = begin + local;
      if (i >= accesses) continue;
      const Position at = piece.at(i * V);
      Vec<float, V> terms[sums];
      const Vec<T, V> value = stage.template value<V>(in[u], at, terms);
      if constexpr (keep) stage.data.template store_vec<V>(i * V, value);
#pragma unroll
      for (int k = 0; k < sums; ++k) {
        float here = 0.0f, next = 0.0f;
#pragma unroll
        for (int j = 0; j < V; ++j) (j < at.left ? here : next) += terms[k][j];
        s.scratch.store(k * tile + local, here);
        if (at.left < V) s.heads.store(k * plan.channels_here + at.row + 1, next);
      }
    }
    block_sync();

    const int end = begin + tile < accesses ? begin + tile : accesses;
    const int first = piece.at(begin * V).row, last = piece.at((end - 1) * V).row;
    for (int base = first; base <= last; base += groups) {
      const int row = base + group;
      float total[sums] = {};
      if (row <= last) {
        // accesses whose first element is in this row
        const int64_t row_begin = piece.row_begin(row), row_end = row_begin + piece.columns;
        const int from = row_begin > int64_t{begin} * V ? static_cast<int>((row_begin + V - 1) / V) : begin;
        const int to = row_end < int64_t{end} * V ? static_cast<int>((row_end + V - 1) / V) : end;
        for (int i = from + lane; i < to; i += width)
#pragma unroll
          for (int k = 0; k < sums; ++k) total[k] += s.scratch.load(k * tile + i - begin);
      }
#pragma unroll
      for (int k = 0; k < sums; ++k) {
        total[k] = lanes_sum(total[k], width);
        const int slot = k * plan.channels_here + row;
        if (row <= last && lane == 0) s.sums.store(slot, s.sums.load(slot) + total[k]);
      }
    }
    block_sync();
  }
  for (int i = thread_index(); i < sums * plan.channels_here; i += threads)
    s.sums.store(i, s.sums.load(i) + s.heads.load(i));
}

// Channels last. The same per column: a thread owns V columns and walks down every `groups`-th row.
template <int V, bool keep, Cache hint, class Stage>
ATTNKERN_DEVICE void sum_columns(const Stage& stage, const Piece& piece, const Plan& plan) {
  using T = typename Stage::Element;
  constexpr int sums = Stage::kSums, unroll = V > 1 ? Stage::kUnroll : 1;
  const auto& s = stage.s;
  const int threads = block_size(), columns = static_cast<int>(piece.columns), packs = columns / V;
  for (int begin = 0; begin < packs; begin += threads) {
    const int width = packs - begin < threads ? packs - begin : threads;
    const int groups = threads / width, group = thread_index() / width;
    const int column = (begin + thread_index() % width) * V;
    Vec<float, V> total[sums] = {};
    for (int base = group; base < piece.rows && group < groups; base += groups * unroll) {
      typename Stage::template Loaded<V> in[unroll];
#pragma unroll
      for (int u = 0; u < unroll; ++u) {
        const int row = base + u * groups;
        if (row < piece.rows) in[u] = stage.template load<V, hint>({row, column, V}, true);
      }
#pragma unroll
      for (int u = 0; u < unroll; ++u) {
        const int row = base + u * groups;
        if (row >= piece.rows) continue;
        Vec<float, V> terms[sums];
        const Vec<T, V> value = stage.template value<V>(in[u], {row, column, V}, terms);
        if constexpr (keep) stage.data.template store_vec<V>(row * columns + column, value);
#pragma unroll
        for (int k = 0; k < sums; ++k)
#pragma unroll
          for (int j = 0; j < V; ++j) total[k][j] += terms[k][j];
      }
    }
    // groups in order
#pragma unroll
    for (int k = 0; k < sums; ++k) {
      if (group < groups) s.scratch.template store_vec<V>(thread_index() * V, total[k]);
      block_sync();
      for (int c = thread_index(); c < width * V; c += threads) {
        float sum = 0.0f;
        for (int g = 0; g < groups; ++g) sum += s.scratch.load(g * width * V + c);
        s.sums.store(k * plan.channels_here + begin * V + c, sum);
      }
      block_sync();
    }
  }
}

template <int V, bool keep, Cache hint, class Stage>
ATTNKERN_DEVICE void sum_piece(const Stage& stage, const Piece& piece, const Plan& plan) {
  if constexpr (Stage::kChannelsLast)
    sum_columns<V, keep, hint>(stage, piece, plan);
  else
    sum_rows<V, keep, hint>(stage, piece, plan);
}

// The value of one access in the rescale sweep: what the sum sweep kept, or the same again from global memory.
template <int V, bool resident, class Stage>
ATTNKERN_DEVICE Vec<typename Stage::Element, V> value_again(const Stage& stage,
                                                            const typename Stage::template Loaded<V>& in, int element,
                                                            const Position& at) {
  if constexpr (resident) {
    return stage.data.template load_vec<V>(element);
  } else {
    Vec<float, V> terms[Stage::kSums];
    return stage.template value<V>(in, at, terms);
  }
}

// Without vectors: a thread owns the 8 elements of a mask byte.
template <bool resident, class Stage>
ATTNKERN_DEVICE void rescale_bytes(const Stage& stage, const Piece& piece) {
  using T = typename Stage::Element;
  const int64_t bytes = (piece.columns + 7) / 8;  // of a row
  const int64_t units = piece.columns % 8 == 0 ? piece.count / 8 : piece.rows * bytes;
  for (int64_t unit = thread_index(); unit < units; unit += block_size()) {
    const int64_t from = unit + piece.first_column / 8, row = from / bytes, column = (from - row * bytes) * 8;
    uint32_t bits = 0;
    for (int j = 0; j < 8 && column + j < piece.columns; ++j) {
      const Position at{static_cast<int>(row), column + j, 1};
      typename Stage::template Loaded<1> in;
      if constexpr (!resident) in = stage.template load<1, Cache::streaming>(at, false);
      const int element = static_cast<int>(piece.row_begin(at.row) + at.column);
      const Vec<T, 1> value = value_again<1, resident>(stage, in, element, at);
      const Vec<T, 1> beside = stage.reads_beside() ? stage.template load_beside<1>(at) : Vec<T, 1>{};
      bits |= stage.template store<1>(value, beside, at) << j;
    }
    store_global(stage.mask.byte(static_cast<int>(row), column), static_cast<uint8_t>(bits));
  }
}

// Bytes of the mask from the bits of every access, where a row's bytes do not begin with accesses.
template <int V, class Stage>
ATTNKERN_DEVICE void pack_mask(const Stage& stage, const Piece& piece, const cuda::Shared<uint8_t>& flags) {
  const int accesses = piece.count / V;
  const auto write = [&](int access, int offset, int row, int64_t column) {
    const int64_t in_row = piece.columns - column;
    const int valid = in_row < 8 ? static_cast<int>(in_row) : 8;
    uint32_t word = 0;
    for (int i = 0; i * V < offset + valid && access + i < accesses; ++i)
      word |= uint32_t{flags.load(access + i)} << (i * V);
    store_global(stage.mask.byte(row, column), static_cast<uint8_t>((word >> offset) & ((1u << valid) - 1)));
  };
  for (int access = thread_index(); access < accesses; access += block_size()) {
    const Position at = piece.at(access * V);
    const int offset = static_cast<int>((8 - at.column % 8) % 8);
    if (offset < V && offset < at.left) write(access, offset, at.row, at.column + offset);
    if (at.left < V) write(access, at.left, at.row + 1, 0);
  }
}

template <int V, bool resident, class Stage>
ATTNKERN_DEVICE void rescale_piece(const Stage& stage, const Piece& piece, const Plan& plan) {
  using T = typename Stage::Element;
  if (!stage.stores()) return;
  const bool masks = !Stage::kBackward && stage.mask.data;
  if (V == 1 && masks) return rescale_bytes<resident>(stage, piece);
  const bool by_access = V == 8 && piece.columns % 8 == 0;
  const auto flags =
      cuda::Shared<uint8_t>::at(stage.s.scratch_offset, masks && !by_access ? 4 * plan.scratch * plan.threads : 0);

  constexpr int unroll = V > 1 && !Stage::kBackward ? 2 : 1;  // backward at 2 spills on sm_100
  const int threads = block_size(), accesses = piece.count / V;
  for (int begin = thread_index(); begin < accesses; begin += threads * unroll) {
    typename Stage::template Loaded<V> in[unroll];
    Vec<T, V> beside[unroll] = {};
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int i = begin + u * threads;
      if (i >= accesses) continue;
      const Position at = piece.at(i * V);
      if constexpr (!resident) in[u] = stage.template load<V, Cache::streaming>(at, false);
      if (stage.reads_beside()) beside[u] = stage.template load_beside<V>(at);
    }
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int i = begin + u * threads;
      if (i >= accesses) continue;
      const Position at = piece.at(i * V);
      const Vec<T, V> value = value_again<V, resident>(stage, in[u], i * V, at);
      const uint32_t bits = stage.template store<V>(value, beside[u], at);
      if (!masks) continue;
      if (by_access)
        store_global(stage.mask.byte(at.row, at.column), static_cast<uint8_t>(bits));
      else
        flags.store(i, static_cast<uint8_t>(bits));
    }
  }
  if (masks && !by_access) {
    block_sync();
    pack_mask<V>(stage, piece, flags);
  }
}

}  // namespace attnkern::squeeze_excite
