// One instruction set's kernels, each on one unit of work; cpu.cpp makes the units and gives them to threads.
#pragma once

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
  void* scores;  // [M, tile] forward; [2 M, tile] backward: dz . v, then e
  void* rows;    // [M, D] sums of z forward; [2 M, D] backward: dz, then q where keys are values
  void* largest;
  void* total;         // [M] each, forward: of exp(l - largest)
  void* coefficients;  // [2 M, tile] backward: p, then de
};

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

struct CpuKernels {
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
