// Products of matrices in shared memory by a warp: 16-bit elements on the tensor cores, floats by multiply-adds.
#pragma once

#include "cuda/mma.cuh"
#include "cuda/reduce.cuh"
#include "ops/attention_gate/plan.h"

namespace attnkern::attention_gate {

using namespace cuda;

// Elements between rows of `width` of them: an odd number of packs, so that a pack of each of 8 rows lies in other
// banks.
template <class T>
ATTNKERN_HOST_DEVICE constexpr int row_stride(int width) {
  return (width / pack_size<T>() | 1) * pack_size<T>();
}

// Whether the axis that a product sums over runs along a matrix's rows in memory, or across them.
enum class Inner { along, across };

// Where a matrix's block begins, and how it goes on.
template <class T>
struct Block {
  Shared<T> data;
  int at, stride;

  template <Inner inner>
  ATTNKERN_DEVICE int index(int outer, int k) const {
    return at + (inner == Inner::along ? outer * stride + k : k * stride + outer);
  }
};

template <Inner inner, class T>
ATTNKERN_DEVICE FragmentA load_rows(const Block<T>& a, int row, int k) {
  const int i = a.template index<inner>(row, k);
  if constexpr (inner == Inner::along)
    return load_a(a.data, i, a.stride);
  else
    return load_a_transposed(a.data, i, a.stride);
}

// Two neighbouring blocks of 8 columns.
template <Inner inner, class T>
ATTNKERN_DEVICE void load_columns(const Block<T>& b, int column, int k, FragmentB (&out)[2]) {
  const int i = b.template index<inner>(column, k);
  if constexpr (inner == Inner::across) {
    load_b(b.data, i, b.stride, out);
  } else {
    const FragmentA f =
        load_matrices(b.data, i + (lane_id() / 16 * 8 + lane_id() % 8) * b.stride + lane_id() / 8 % 2 * 8);
    out[0] = {{f.words[0], f.words[1]}};
    out[1] = {{f.words[2], f.words[3]}};
  }
}

// A warp's sums [16 Rows, 8 Columns]: lane 4 g + c has rows g and g + 8 of every 16, columns 2 c and 2 c + 1 of
// every 8.
template <class T, int Rows, int Columns>
struct WarpProduct {
  FragmentD sum[Rows][Columns] = {};

  ATTNKERN_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < Rows; ++i)
#pragma unroll
      for (int j = 0; j < Columns; ++j) sum[i][j] = {};
  }

  // sum += other, so that no chain of additions is long
  ATTNKERN_DEVICE void add(const WarpProduct& other) {
#pragma unroll
    for (int i = 0; i < Rows; ++i)
#pragma unroll
      for (int j = 0; j < Columns; ++j)
#pragma unroll
        for (int v = 0; v < 4; ++v) sum[i][j].values[v] += other.sum[i][j].values[v];
  }

  // sum += a b over `depth` terms, a multiple of 16; b is the sum of `Parts` matrices, `part` elements apart.
  template <Inner A, Inner B, int Parts = 1>
  ATTNKERN_DEVICE void multiply(const Block<T>& a, const Block<T>& b, int depth, int part = 0) {
    for (int k = 0; k < depth; k += kStep) {
      if constexpr (sizeof(T) == 2) {
        FragmentA rows[Rows];
#pragma unroll
        for (int i = 0; i < Rows; ++i) rows[i] = load_rows<A>(a, 16 * i, k);
#pragma unroll
        for (int p = 0; p < Parts; ++p)
#pragma unroll
          for (int j = 0; j < Columns; j += 2) {
            FragmentB columns[2];
            load_columns<B>(Block<T>{b.data, b.at + p * part, b.stride}, 8 * j, k, columns);
#pragma unroll
            for (int i = 0; i < Rows; ++i)
#pragma unroll
              for (int h = 0; h < 2; ++h) multiply_add<T>(sum[i][j + h], rows[i], columns[h]);
          }
      } else {
        multiply_floats<A, B>(a, b, k);
      }
    }
  }

  // f(row, column, values) for this lane's sums, two neighbours of a row a call.
  template <class F>
  ATTNKERN_DEVICE void each_pair(const F& f) const {
    const int g = lane_id() / 4, c = lane_id() % 4 * 2;
#pragma unroll
    for (int i = 0; i < Rows; ++i)
#pragma unroll
      for (int j = 0; j < Columns; ++j)
#pragma unroll
        for (int v = 0; v < 4; v += 2)
          f(16 * i + v / 2 * 8 + g, 8 * j + c, Vec<float, 2>{{sum[i][j].values[v], sum[i][j].values[v + 1]}});
  }

  // f(row, column, value) for this lane's sums.
  template <class F>
  ATTNKERN_DEVICE void each(const F& f) const {
    each_pair([&](int row, int column, const Vec<float, 2>& pair) {
      f(row, column, pair[0]);
      f(row, column + 1, pair[1]);
    });
  }

 private:
  template <Inner A, Inner B>
  ATTNKERN_DEVICE void multiply_floats(const Block<T>& a, const Block<T>& b, int from) {
    constexpr int steps = 4;  // terms at once
    const int g = lane_id() / 4, c = lane_id() % 4 * 2;
#pragma unroll 1
    for (int k = from; k < from + kStep; k += steps) {
      Vec<float, steps> rows[2 * Rows];
#pragma unroll
      for (int r = 0; r < 2 * Rows; ++r) rows[r] = load_terms<A>(a, 8 * r + g, k);
#pragma unroll
      for (int j = 0; j < Columns; ++j)
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const Vec<float, steps> column = load_terms<B>(b, 8 * j + c + v, k);
#pragma unroll
          for (int r = 0; r < 2 * Rows; ++r)
#pragma unroll
            for (int s = 0; s < steps; ++s) sum[r / 2][j].values[r % 2 * 2 + v] += rows[r][s] * column[s];
        }
    }
  }

  template <Inner inner>
  ATTNKERN_DEVICE static Vec<float, 4> load_terms(const Block<T>& m, int outer, int k) {
    if constexpr (inner == Inner::along) {
      return m.data.template load_vec<4>(m.template index<inner>(outer, k));
    } else {
      Vec<float, 4> terms;
#pragma unroll
      for (int s = 0; s < 4; ++s) terms[s] = m.data.load(m.template index<inner>(outer, k + s));
      return terms;
    }
  }
};

// Rows and columns of this warp's product, where a block's warps share a matrix of `columns` columns.
struct WarpPlace {
  int row, column;
  ATTNKERN_DEVICE explicit WarpPlace(int columns, int height = kWarpTile, int width = kWarpTile)
      : row(warp_id() / (columns / width) * height), column(warp_id() % (columns / width) * width) {}
};

}  // namespace attnkern::attention_gate
