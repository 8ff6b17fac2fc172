// Items in global memory, and tiles of them in shared memory: [items, features] whatever the layout outside.
#pragma once

#include "cuda/async.cuh"
#include "ops/softmax_pool/plan.h"

namespace attnkern::softmax_pool {

using namespace cuda;

ATTNKERN_HOST_DEVICE constexpr int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Elements between the rows of a tile of `width` features: an odd number of packs, so that a pack of each of 8 rows
// lies in other banks.
template <class T>
ATTNKERN_HOST_DEVICE constexpr int tile_stride(int width) {
  return (width / pack_size<T>() | 1) * pack_size<T>();
}

// Features beyond the items' own, and rows beyond a tile's items, are zero.
template <class T>
struct Tile {
  Shared<T> data;  // [items, stride]
  int items, width, stride;

  template <int N>
  ATTNKERN_DEVICE Vec<T, N> load(int t, int d) const {
    return data.template load_vec<N>(t * stride + d);
  }
};

template <class T>
ATTNKERN_DEVICE Tile<T> take_tile(SharedArena& arena, int items, int width) {
  return {arena.take<T>(items * tile_stride<T>(width)), items, width, tile_stride<T>(width)};
}

// One tile, or two: one is worked on while the other is on its way.
template <class T>
struct Stages {
  Tile<T> all;
  int items;

  ATTNKERN_DEVICE Tile<T> operator[](int stage) const {
    const int size = items * all.stride;
    return {all.data.slice(stage * size, size), items, all.width, all.stride};
  }
};

template <class T>
ATTNKERN_DEVICE Stages<T> take_stages(SharedArena& arena, int stages, int items, int width) {
  return {take_tile<T>(arena, stages * items, width), items};
}

// Items of one head of one sample.
template <class Pointer>
struct Span {
  Pointer data;
  int64_t item, feature;  // strides
  int features;
  bool rows;    // neighbours in memory are features, else items
  bool vector;  // in whole, aligned packs
};

// Neighbours are items: also where there is one feature.
ATTNKERN_HOST_DEVICE bool has_columns(const ConstItems& items, int64_t features) {
  return items.stride_item == 1 && (features == 1 || items.stride_feature != 1);
}

ATTNKERN_HOST_DEVICE bool has_vectors(const ConstItems& items, int64_t features, int element_bytes) {
  const int64_t pack = 16 / element_bytes;
  const bool columns = has_columns(items, features);
  const bool whole = columns ? features == 1 || items.stride_feature % pack == 0
                             : items.stride_feature == 1 && features % pack == 0 && items.stride_item % pack == 0;
  return whole && items.stride_head % pack == 0 && items.stride_batch % pack == 0 &&
         reinterpret_cast<uintptr_t>(items.data) % 16 == 0;
}

template <class T>
ATTNKERN_DEVICE Span<const T*> span_of(const ConstItems& items, int64_t sample, int64_t head, int64_t features) {
  return {static_cast<const T*>(items.data) + sample * items.stride_batch + head * items.stride_head,
          items.stride_item,
          items.stride_feature,
          static_cast<int>(features),
          !has_columns(items, features),
          has_vectors(items, features, sizeof(T))};
}

template <class T>
ATTNKERN_DEVICE Span<T*> span_of(const Items& items, int64_t sample, int64_t head, int64_t features) {
  const ConstItems readable{items.data, items.stride_batch, items.stride_head, items.stride_item, items.stride_feature};
  const Span<const T*> span = span_of<T>(readable, sample, head, features);
  return {const_cast<T*>(span.data), span.item, span.feature, span.features, span.rows, span.vector};
}

// How threads share a tile whose items are neighbours outside and whose features are in shared memory: f(t, d) for
// every pack of items and every word of features. Two packs and 16 words a warp: whole sectors outside, few conflicts
// inside.
template <class T>
struct ColumnShares {
  static constexpr int pack = pack_size<T>(), word = 4 / static_cast<int>(sizeof(T));
  int words, pair, count;

  ATTNKERN_DEVICE ColumnShares(int items, int features)
      : words((features + word - 1) / word), pair(items / pack % 2 ? 1 : 2), count(items / pack * words) {}
  ATTNKERN_DEVICE int item(int i) const { return (i / pair / words * pair + i % pair) * pack; }
  ATTNKERN_DEVICE int feature(int i) const { return i / pair % words * word; }
};

// More accesses on their way a thread spill.
template <class T>
ATTNKERN_DEVICE void fetch_columns(const Tile<T>& to, const Span<const T*>& from, int64_t first, int count) {
  using Shares = ColumnShares<T>;
  constexpr int pack = Shares::pack, word = Shares::word;
  const Shares shares(to.items, to.width);
#pragma unroll 1
  for (int i = thread_index(); i < shares.count; i += block_size()) {
    const int t = shares.item(i), d = shares.feature(i);
    const T* const at = from.data + first + t + d * from.feature;
    Vec<T, pack> items[word] = {};
#pragma unroll
    for (int w = 0; w < word; ++w)
      if (t < count && d + w < from.features) items[w] = load_global_vec<pack, Cache::streaming>(at + w * from.feature);
#pragma unroll
    for (int k = 0; k < pack; ++k) {
      Vec<T, word> features;
#pragma unroll
      for (int w = 0; w < word; ++w) features[w] = items[w][k];
      to.data.store_vec((t + k) * to.stride + d, features);
    }
  }
}

// Starts copying items [first, first + count) to the tile; complete after async_wait and a barrier.
template <class T>
ATTNKERN_DEVICE void fetch(const Tile<T>& to, const Span<const T*>& from, int64_t first, int count) {
  constexpr int pack = pack_size<T>(), batch = 4;
  if (from.vector && !from.rows && (first | count | to.items) % pack == 0) return fetch_columns(to, from, first, count);
  if (from.vector && from.rows) {
    const int packs = to.width / pack;
    for (int i = thread_index(); i < to.items * packs; i += block_size()) {
      const int t = i / packs, d = (i - t * packs) * pack, at = t * to.stride + d;
      if (t < count && d < from.features)
        async_copy(to.data, at, from.data + (first + t) * from.item + d);
      else
        to.data.store_vec(at, Vec<T, pack>{});
    }
    return;
  }
  const int size = to.items * to.width;
  const auto place = [&](int i, int& t, int& d) {
    t = from.rows ? i / to.width : i % to.items;
    d = from.rows ? i % to.width : i / to.items;
  };
  for (int i = thread_index(); i < size; i += batch * block_size()) {
    T elements[batch] = {};
#pragma unroll
    for (int u = 0; u < batch; ++u) {
      int t, d;
      place(i + u * block_size(), t, d);
      if (i + u * block_size() < size && t < count && d < from.features)
        elements[u] = load_global(from.data + (first + t) * from.item + d * from.feature);
    }
#pragma unroll
    for (int u = 0; u < batch; ++u) {
      int t, d;
      place(i + u * block_size(), t, d);
      if (i + u * block_size() < size) to.data.store(t * to.stride + d, elements[u]);
    }
  }
}

// Writes the first `count` rows of a tile to items [first, first + count).
template <class T>
ATTNKERN_DEVICE void put(const Tile<T>& from, const Span<T*>& to, int64_t first, int count) {
  constexpr int pack = pack_size<T>();
  if (to.vector && to.rows) {
    const int packs = to.features / pack;
    for (int i = thread_index(); i < count * packs; i += block_size()) {
      const int t = i / packs, d = (i - t * packs) * pack;
      store_global_vec<Cache::streaming>(to.data + (first + t) * to.item + d, from.template load<pack>(t, d));
    }
    return;
  }
  if (to.vector && first % pack == 0 && count % pack == 0) {
    using Shares = ColumnShares<T>;
    const Shares shares(count, to.features);
    for (int i = thread_index(); i < shares.count; i += block_size()) {
      const int t = shares.item(i), d = shares.feature(i);
      Vec<T, pack> items[Shares::word];
#pragma unroll
      for (int k = 0; k < pack; ++k) {
        const Vec<T, Shares::word> features = from.template load<Shares::word>(t + k, d);
#pragma unroll
        for (int w = 0; w < Shares::word; ++w) items[w][k] = features[w];
      }
#pragma unroll
      for (int w = 0; w < Shares::word; ++w)
        if (d + w < to.features)
          store_global_vec<Cache::streaming>(to.data + first + t + (d + w) * to.feature, items[w]);
    }
    return;
  }
  for (int i = thread_index(); i < count * to.features; i += block_size()) {
    const int t = to.rows ? i / to.features : i % count, d = to.rows ? i % to.features : i / count;
    store_global(to.data + (first + t) * to.item + d * to.feature, from.data.load(t * from.stride + d));
  }
}

// ------------------------------------------------------------------ rows and pieces

// [B, H, M] of a call.
ATTNKERN_HOST_DEVICE int64_t rows_of(const Inputs& p) { return p.sizes.batch * p.sizes.heads * p.sizes.queries; }

// Items [begin, end) of a sample (of a bag: in the row of all items).
struct Piece {
  int64_t sample, begin, end;
};

ATTNKERN_DEVICE int64_t offset_of(const Inputs& p, int64_t bag) {
  const int64_t offset = load_global(p.offsets + bag);
  return offset < 0 ? 0 : offset > p.sizes.items ? p.sizes.items : offset;
}

// The units of a sample: [first, last). Walking along the items, a bag's end and a multiple of `length` each begin a
// new unit, so bag b begins at unit b + offset / length.
struct Units {
  int64_t first, last;
};

ATTNKERN_DEVICE Units units_of(const Inputs& p, const Plan& plan, int64_t sample) {
  if (!p.offsets) return {sample * plan.pieces, (sample + 1) * plan.pieces};
  const int64_t begin = offset_of(p, sample), next = offset_of(p, sample + 1), end = next < begin ? begin : next;
  return {sample + begin / plan.length, sample + end / plan.length + 1};
}

ATTNKERN_DEVICE Piece piece_of(const Inputs& p, const Plan& plan, int64_t unit) {
  if (!p.offsets) {
    const int64_t sample = unit / plan.pieces, begin = unit % plan.pieces * plan.length;
    const int64_t end = begin + plan.length < p.sizes.items ? begin + plan.length : p.sizes.items;
    return {sample, begin, end < begin ? begin : end};
  }
  int64_t low = 0, high = p.sizes.batch - 1;  // the last bag whose first unit is at most `unit`
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (middle + offset_of(p, middle) / plan.length <= unit)
      low = middle;
    else
      high = middle - 1;
  }
  const int64_t from = offset_of(p, low), to = offset_of(p, low + 1);
  const int64_t left = (unit - low) * plan.length, right = left + plan.length;
  const int64_t begin = left < from ? from : left, end = right < to ? right : to;
  return {low, begin, end < begin ? begin : end};
}

// The batch index of a sample's items, scores and logits.
ATTNKERN_DEVICE int64_t items_batch(const Inputs& p, int64_t sample) { return p.offsets ? 0 : sample; }

ATTNKERN_DEVICE const float* row_of(const ConstRows& rows, int64_t batch, int64_t head, int64_t query) {
  return static_cast<const float*>(rows.data) + batch * rows.stride_batch + head * rows.stride_head +
         query * rows.stride_query;
}

}  // namespace attnkern::softmax_pool
