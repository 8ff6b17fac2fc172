// Products of 16-bit matrices on the tensor cores, accumulated in float, by a warp (sm_80 and later).
#pragma once

#include <type_traits>

#include "cuda/memory.cuh"

namespace attnkern::cuda {

// Lane l = 4 g + c holds, two elements a word,
//   of a [16, 16]  rows g, g + 8 at columns 2c, 2c + 1 (words 0, 1), then at columns 2c + 8, 2c + 9 (words 2, 3)
//   of b [16, 8]   column g at rows 2c, 2c + 1 (word 0) and 2c + 8, 2c + 9 (word 1)
//   of d [16, 8]   row g at columns 2c, 2c + 1 (values 0, 1), then row g + 8
struct FragmentA {
  uint32_t words[4];
};
struct FragmentB {
  uint32_t words[2];
};
struct FragmentD {
  float values[4];
};

}  // namespace attnkern::cuda

#ifdef ATTNKERN_SIMT

#include "simt/mma.h"

#else

namespace attnkern::cuda {

// d += a b.
template <class T>
ATTNKERN_DEVICE void multiply_add(FragmentD& d, const FragmentA& a, const FragmentB& b) {
#define ATTNKERN_MMA(TYPE)                                                                  \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                       \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"       \
               : "+f"(d.values[0]), "+f"(d.values[1]), "+f"(d.values[2]), "+f"(d.values[3]) \
               : "r"(a.words[0]), "r"(a.words[1]), "r"(a.words[2]), "r"(a.words[3]), "r"(b.words[0]), "r"(b.words[1]))
  if constexpr (std::is_same_v<T, bfloat16>)
    ATTNKERN_MMA("bf16");
  else
    ATTNKERN_MMA("f16");
#undef ATTNKERN_MMA
}

// Four matrices [8, 8] of 16-bit elements: lane l names, by its first element, row l % 8 of matrix l / 8, and gets of
// each matrix row l / 4 at columns 2 (l % 4) and on; `transposed` swaps rows and columns. Rows are aligned to 16 bytes.
template <bool transposed = false, class T>
ATTNKERN_DEVICE FragmentA load_matrices(const Shared<T>& from, int i) {
  static_assert(sizeof(T) == 2);
  const uint32_t address = from.address() + i * static_cast<uint32_t>(sizeof(T));
  FragmentA f;
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(f.words[0]), "=r"(f.words[1]), "=r"(f.words[2]), "=r"(f.words[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(f.words[0]), "=r"(f.words[1]), "=r"(f.words[2]), "=r"(f.words[3])
                 : "r"(address)
                 : "memory");
  return f;
}

}  // namespace attnkern::cuda

#endif

namespace attnkern::cuda {

// The [16, 16] block of a row-major matrix in shared memory, rows `stride` apart, that begins at element i.
template <class T>
ATTNKERN_DEVICE FragmentA load_a(const Shared<T>& from, int i, int stride) {
  return load_matrices(from, i + lane_id() % 16 * stride + lane_id() / 16 * 8);
}

// The same block of the transposed matrix: `from` holds columns of a as rows.
template <class T>
ATTNKERN_DEVICE FragmentA load_a_transposed(const Shared<T>& from, int i, int stride) {
  return load_matrices<true>(from, i + (lane_id() / 16 * 8 + lane_id() % 8) * stride + lane_id() / 8 % 2 * 8);
}

// Two neighbouring blocks b [16, 8] of a row-major matrix [16, 16].
template <class T>
ATTNKERN_DEVICE void load_b(const Shared<T>& from, int i, int stride, FragmentB (&b)[2]) {
  const FragmentA f = load_matrices<true>(from, i + lane_id() % 16 * stride + lane_id() / 16 * 8);
  b[0] = {{f.words[0], f.words[1]}};
  b[1] = {{f.words[2], f.words[3]}};
}

// The same blocks of the transposed matrix: `from` holds columns of b as rows.
template <class T>
ATTNKERN_DEVICE void load_b_transposed(const Shared<T>& from, int i, int stride, FragmentB (&b)[2]) {
  const FragmentA f = load_matrices(from, i + (lane_id() / 16 * 8 + lane_id() % 8) * stride + lane_id() / 8 % 2 * 8);
  b[0] = {{f.words[0], f.words[1]}};
  b[1] = {{f.words[2], f.words[3]}};
}

}  // namespace attnkern::cuda
