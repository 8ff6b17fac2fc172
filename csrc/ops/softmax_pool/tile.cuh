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
  bool vector;  // whole packs along the features
};

ATTNKERN_HOST_DEVICE bool has_vector_rows(const ConstItems& items, int64_t features, int element_bytes) {
  const int64_t pack = 16 / element_bytes;
  return items.stride_feature == 1 && features % pack == 0 && items.stride_item % pack == 0 &&
         items.stride_head % pack == 0 && items.stride_batch % pack == 0 &&
         reinterpret_cast<uintptr_t>(items.data) % 16 == 0;
}

template <class T>
ATTNKERN_DEVICE Span<const T*> span_of(const ConstItems& items, int64_t sample, int64_t head, int64_t features) {
  return {static_cast<const T*>(items.data) + sample * items.stride_batch + head * items.stride_head,
          items.stride_item,
          items.stride_feature,
          static_cast<int>(features),
          items.stride_feature == 1 || features == 1,
          has_vector_rows(items, features, sizeof(T))};
}

template <class T>
ATTNKERN_DEVICE Span<T*> span_of(const Items& items, int64_t sample, int64_t head, int64_t features) {
  const ConstItems readable{items.data, items.stride_batch, items.stride_head, items.stride_item, items.stride_feature};
  const Span<const T*> span = span_of<T>(readable, sample, head, features);
  return {const_cast<T*>(span.data), span.item, span.feature, span.features, span.rows, span.vector};
}

// Starts copying items [first, first + count) to the tile; complete after async_wait and a barrier.
template <class T>
ATTNKERN_DEVICE void fetch(const Tile<T>& to, const Span<const T*>& from, int64_t first, int count) {
  constexpr int pack = pack_size<T>();
  if (from.vector) {
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
  for (int i = thread_index(); i < to.items * to.width; i += block_size()) {
    const int t = from.rows ? i / to.width : i % to.items, d = from.rows ? i % to.width : i / to.items;
    const bool inside = t < count && d < from.features;
    to.data.store(t * to.stride + d,
                  inside ? load_global<Cache::streaming>(from.data + (first + t) * from.item + d * from.feature) : T{});
  }
}

// Writes the first `count` rows of a tile to items [first, first + count).
template <class T>
ATTNKERN_DEVICE void put(const Tile<T>& from, const Span<T*>& to, int64_t first, int count) {
  constexpr int pack = pack_size<T>();
  if (to.vector) {
    const int packs = to.features / pack;
    for (int i = thread_index(); i < count * packs; i += block_size()) {
      const int t = i / packs, d = (i - t * packs) * pack;
      store_global_vec<Cache::streaming>(to.data + (first + t) * to.item + d, from.template load<pack>(t, d));
    }
    return;
  }
  for (int i = thread_index(); i < count * to.features; i += block_size()) {
    const int t = to.rows ? i / to.features : i % count, d = to.rows ? i % to.features : i / count;
    store_global(to.data + (first + t) * to.item + d * to.feature, from.data.load(t * from.stride + d));
  }
}

// ------------------------------------------------------------------ pieces

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
