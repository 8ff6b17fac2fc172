// theta and phi as the products read them.
#pragma once

#include "ops/attention_gate/tile.cuh"

namespace attnkern::attention_gate {

constexpr int kWeightThreads = 256;

// 16-bit maps multiply a float32 weight in two parts, exact to 2^-16: one part alone moves a relu's kinks as far as all
// of eager's roundings do. Backward's products with what is rounded to 16 bits take the weight rounded to nearest.
template <class T>
constexpr int kParts = sizeof(T) == 2 ? 2 : 1;
template <class T>
constexpr int kStoredParts = sizeof(T) == 2 ? 3 : 1;
template <class T>
constexpr int kNearest = kStoredParts<T> - 1;

// A weight matrix in workspace: [stored parts, rows, width] of T, zero beyond F and beyond the channels.
template <class T>
struct SplitWeight {
  const T* data;
  int64_t rows;
  int width;

  ATTNKERN_DEVICE const T* row(int part, int64_t f) const { return data + (part * rows + f) * width; }
};

// Computes   a weight [F, C k1 k2 k3] in parts
// Layout     -> SplitWeight, terms in the order [patch, channel]
// Mapping    a thread a weight
// Traffic    the weight once, its parts once
// Numerics   high + low to 16 or 22 bits
template <class T>
ATTNKERN_KERNEL(kWeightThreads, 4)
attention_gate_split_kernel(const float* weight, int64_t hidden, const Operand o, int64_t rows, T* out) {
  const int64_t i = int64_t{block_index()} * kWeightThreads + thread_index();
  if (i >= rows * o.width) return;
  const int64_t f = i / o.width;
  const Term k(o, static_cast<int>(i % o.width));
  float w = 0.0f;
  if (f < hidden && k.channel < o.channels) w = load_global(weight + (f * o.channels + k.channel) * o.patch + k.patch);
  if constexpr (sizeof(T) == 2) {
    T high, low;
    split(w, high, low);
    store_global(out + i, high);
    store_global(out + rows * o.width + i, low);
    store_global(out + 2 * rows * o.width + i, narrow<T>(w));
  } else {
    store_global(out + i, w);
  }
}

}  // namespace attnkern::attention_gate
