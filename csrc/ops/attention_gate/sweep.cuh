// One sweep over whole maps: gated maps, and sums over channels.
#pragma once

#include "cuda/launch.cuh"
#include "ops/attention_gate/hidden.cuh"

namespace attnkern::attention_gate {

constexpr int kSweepThreads = 256;

// apply:   out = alpha a
// gate:    out = alpha b,  sum = sum_c a b
// logits:  sum = dq + sigmoid'(q) sum_c a b
enum class SweepKind { apply, gate, logits };

struct Sweep {
  int64_t batch, channels, length;
  ConstMap a, b;
  Map out;
  const float* alpha;  // or the logits
  const float* dq;     // or null
  float* sum;
};

// Positions of a block.
template <class T>
constexpr int kSweepTile = kWarpSize * pack_size<T>();

// A block's channels and positions; the sums over channels of its threads' own elements are theirs alone.
template <class T, bool last, SweepKind kind>
struct SweepTile {
  static constexpr int pack = pack_size<T>();
  const Sweep& s;
  int64_t sample, first;
  int count;
  Plane<const T*> a, b;
  Plane<T*> out;
  bool whole;

  ATTNKERN_DEVICE SweepTile(const Sweep& sweep, int64_t tile, int64_t tiles) : s(sweep) {
    sample = tile / tiles;
    first = tile % tiles * kSweepTile<T>;
    count = at_most(s.length - first, kSweepTile<T>);
    a = plane_of<const T, last>(s.a, sample, s.channels, s.length);
    b = plane_of<const T, last>(kind == SweepKind::apply ? s.a : s.b, sample, s.channels, s.length);
    out = plane_of<T, last>(s.out, sample, s.channels, s.length);
    whole = a.vector && b.vector && (kind == SweepKind::logits || out.vector);
  }
  // Adds a b of N neighbours to sum and writes alpha times the map.
  template <int N>
  ATTNKERN_DEVICE void take(int64_t c, int64_t l, const Vec<float, N>& alpha, Vec<float, N>& sum) const {
    const Vec<float, N> x = widen(load_global_vec<N, Cache::streaming>(a.at(c, l)));
    if constexpr (kind == SweepKind::apply) {
      write<N>(c, l, alpha, x);
    } else {
      const Vec<float, N> other = widen(load_global_vec<N, Cache::streaming>(b.at(c, l)));
#pragma unroll
      for (int v = 0; v < N; ++v) sum[v] += x[v] * other[v];
      if constexpr (kind == SweepKind::gate) write<N>(c, l, alpha, other);
    }
  }
  ATTNKERN_DEVICE float alpha(int64_t l) const { return load_global(s.alpha + sample * s.length + l); }
  ATTNKERN_DEVICE void finish(int64_t l, float sum) const {
    const int64_t at = sample * s.length + l;
    if constexpr (kind == SweepKind::gate) store_global(s.sum + at, sum);
    if constexpr (kind == SweepKind::logits) {
      const float gate = sigmoid(load_global(s.alpha + at)), own = gate * (1.0f - gate) * sum;
      store_global(s.sum + at, s.dq ? load_global(s.dq + at) + own : own);
    }
  }

 private:
  template <int N>
  ATTNKERN_DEVICE void write(int64_t c, int64_t l, const Vec<float, N>& alpha, Vec<float, N> values) const {
#pragma unroll
    for (int v = 0; v < N; ++v) values[v] *= alpha[v];
    store_global_vec<Cache::streaming>(out.at(c, l), narrow<T>(values));
  }
};

// Computes   a Sweep
// Layout     maps [B, C, L]; alpha, sums [B, L]
// Mapping    a block: 256 positions (float: 128), a lane 8 (4) of them; warps share the channels
// Traffic    every map once
// Numerics   float; a warp's channels in order, then warps in order; one rounding
template <class T, SweepKind kind>
ATTNKERN_KERNEL(kSweepThreads, 2)
attention_gate_sweep_columns_kernel(ATTNKERN_GRID_CONSTANT const Sweep s, int64_t tiles) {
  constexpr int pack = pack_size<T>();
  SharedArena arena;
  const Shared<float> sums = arena.take<float>(kind == SweepKind::apply ? 0 : kSweepThreads * pack);
  const SweepTile<T, false, kind> tile(s, block_index(), tiles);
  const auto position = [&](int v) { return tile.whole ? lane_id() * pack + v : v * kWarpSize + lane_id(); };
  Vec<float, pack> alpha{}, sum{};
#pragma unroll
  for (int v = 0; v < pack; ++v)
    if (kind != SweepKind::logits && position(v) < tile.count) alpha[v] = tile.alpha(tile.first + position(v));
  for (int64_t c = warp_id(); c < s.channels; c += warp_count()) {
    if (tile.whole) {
      if (position(0) < tile.count) tile.template take<pack>(c, tile.first + position(0), alpha, sum);
      continue;
    }
#pragma unroll
    for (int v = 0; v < pack; ++v) {
      Vec<float, 1> one{{sum[v]}};
      if (position(v) < tile.count) tile.template take<1>(c, tile.first + position(v), Vec<float, 1>{{alpha[v]}}, one);
      sum[v] = one[0];
    }
  }
  if constexpr (kind != SweepKind::apply) {
#pragma unroll
    for (int v = 0; v < pack; ++v) sums.store(warp_id() * kSweepTile<T> + position(v), sum[v]);
    block_sync();
    for (int p = thread_index(); p < tile.count; p += block_size()) {
      float total = 0.0f;
      for (int w = 0; w < warp_count(); ++w) total += sums.load(w * kSweepTile<T> + p);
      tile.finish(tile.first + p, total);
    }
  }
}

// Computes   a Sweep
// Layout     maps [B, L, C]; alpha, sums [B, L]
// Mapping    a block: 256 positions (float: 128); a group of `group` lanes a position, lanes along its channels
// Traffic    every map once
// Numerics   float; a lane's channels in order, then lanes; one rounding
template <class T, SweepKind kind>
ATTNKERN_KERNEL(kSweepThreads, 2)
attention_gate_sweep_rows_kernel(ATTNKERN_GRID_CONSTANT const Sweep s, int64_t tiles, int group) {
  constexpr int pack = pack_size<T>();
  const SweepTile<T, true, kind> tile(s, block_index(), tiles);
  const int groups = block_size() / group, lane = lane_id() % group;
  for (int p = thread_index() / group; p < kSweepTile<T>; p += groups) {
    const bool real = p < tile.count;
    const int64_t l = tile.first + p;
    const float alpha = kind != SweepKind::logits && real ? tile.alpha(l) : 0.0f;
    float sum = 0.0f;
    if (real && tile.whole) {
      Vec<float, pack> alphas, sums{};
#pragma unroll
      for (int v = 0; v < pack; ++v) alphas[v] = alpha;
      for (int64_t c = lane * pack; c < s.channels; c += group * pack) tile.template take<pack>(c, l, alphas, sums);
#pragma unroll
      for (int v = 0; v < pack; ++v) sum += sums[v];
    } else if (real) {
      Vec<float, 1> one{};
      for (int64_t c = lane; c < s.channels; c += group) tile.template take<1>(c, l, Vec<float, 1>{{alpha}}, one);
      sum = one[0];
    }
    if constexpr (kind != SweepKind::apply) {
      for (int mask = group / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
      if (real && lane == 0) tile.finish(l, sum);
    }
  }
}

template <class T, bool last, SweepKind kind>
Status launch_sweep(const Sweep& s, void* stream) {
  const int64_t tiles = (s.length + kSweepTile<T> - 1) / kSweepTile<T>;
  if constexpr (last) {
    int group = 1;
    while (group < kWarpSize && group * pack_size<T>() < s.channels) group *= 2;
    return launch(attention_gate_sweep_rows_kernel<T, kind>, {s.batch * tiles, kSweepThreads}, stream, s, tiles, group);
  } else {
    const int bytes = kind == SweepKind::apply ? 0 : shared_bytes<float>(kSweepThreads * pack_size<T>());
    return launch(attention_gate_sweep_columns_kernel<T, kind>, {s.batch * tiles, kSweepThreads, bytes}, stream, s,
                  tiles);
  }
}

}  // namespace attnkern::attention_gate
