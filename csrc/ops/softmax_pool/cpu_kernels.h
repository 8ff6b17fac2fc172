// One instruction set's kernels, each on one unit of work; cpu.cpp makes the units and gives them to threads.
#pragma once

#include "core/divide.h"
#include "cpu/arena.h"
#include "cpu/isa.h"
#include "ops/softmax_pool/params.h"

namespace attnkern::softmax_pool {

// Items [begin, end) of head h of sample or bag b.
struct Unit {
  int64_t b, h, begin, end;
};

// What one thread works in, and what all read. Arrays are in the accumulation dtype; a tile is `tile` items.
struct Scratch {
  int64_t tile;
  bool streaming;  // write items past the caches
  void* scores;    // [M, tile] forward; [2 M, tile] backward: dz . v, then e
  void* rows;      // [M, D] sums of z forward; [2 M, D] backward: dz, then q where keys are values
  void* largest;
  void* total;              // [M] each, forward: of exp(l - largest)
  void* deltas;             // [M] backward: what dz . v is compared with (Delta in pool.simd.h)
  void* coefficients;       // [2 M, tile] backward: p, then de
  void* items;              // additive, gated: gradients of a tile through the scores
  void* query_sums;         // additive backward: a vector of 64 bytes a query
  void* staged;             // gated: [tile, D + 16] items as rows, D + 17 where D is odd
  void* hidden;             // gated: [tile, columns + 16]
  void* products;           // gated backward: [tile, columns] act(a) sigmoid(b)
  void* rounded;            // gated backward in bfloat16: da, db and the items as its products take them
  const void* panels;       // gated: V and U for the products x V^T and
  const void* panels_back;  // da V
  const int64_t* peaks;     // backward: [B, H, M] items, -1 where a row has no peak; null: none has
  const void* rest_z;       // the pool without them (params.h)
  const void* rest_top;
};

inline int64_t rows_of(const Inputs& p) { return p.sizes.batch * p.sizes.heads * p.sizes.queries; }

// Whether row `row` of `rows` has a peak; `top` is [2, rows].
template <class A>
bool has_peak(const void* top, int64_t rows, int64_t row) {
  return static_cast<const A*>(top)[rows + row] > A(kPeaked);  // not where it is NaN
}

// A row's pool over one unit, to be merged with the row's other units.
struct Partial {
  void* largest;  // [M]
  void* total;    // [M]
  void* z;        // [M, D], not yet divided
};

// Where a unit adds its gradients; null where there is none.
struct Sums {
  void* dquery;
  void* dw;
  void* dV;
  void* db_V;
  void* dU;
  void* db_U;
};

// Columns of the packed products: of the hidden layer [V | U], each half padded to 16, and of the features.
constexpr int64_t kBlockColumns = 32;
inline int64_t half_of(const Inputs& p) { return round_up(p.sizes.hidden, 16); }
inline int64_t hidden_columns(const Inputs& p) { return round_up((p.U ? 2 : 1) * half_of(p), kBlockColumns); }

struct CpuKernels {
  // Columns block * kBlockColumns and on of [V | U]^T [D, columns], or of [V ; U] [columns, D] when `back`.
  void (*pack)(const Inputs&, bool back, int64_t block, void* panels);
  // z and lse of the unit's rows, or its part of them where they have several units.
  void (*pool)(const ForwardParams&, const Unit&, const Scratch&, const Partial* part);
  // z and lse of query m of head h of sample b from `count` parts, of which the first is given; none gives 0 and -inf.
  void (*merge)(const ForwardParams&, int64_t b, int64_t h, const Partial& first, int64_t stride, int64_t count);
  // Gradients of the unit's items, and what it adds to the others'.
  void (*unpool)(const BackwardParams&, const Unit&, const Scratch&, const Sums&);
  // out = the sum of `count` arrays of n elements that stand `stride` elements apart.
  void (*add)(DType acc, const void* parts, int64_t stride, int64_t count, void* out, int64_t n);
};

const CpuKernels& cpu_kernels(cpu::Isa isa);

}  // namespace attnkern::softmax_pool
