// One instruction set's kernels, each on one unit of work; cpu.cpp makes the units and gives them to threads.
#pragma once

#include "core/divide.h"
#include "cpu/arena.h"
#include "cpu/isa.h"
#include "ops/attention_gate/params.h"

namespace attnkern::attention_gate {

// Rows of scratch hold whole vectors, and their distance is no power of two: rows of 1024 elements would share a few
// sets of the caches.
constexpr int64_t kPad = 16;
inline int64_t padded(int64_t n) { return round_up(n, kPad); }
inline int64_t leading(int64_t n) { return padded(n) + kPad; }

inline int64_t volume(const int64_t (&size)[3]) { return size[0] * size[1] * size[2]; }
inline int64_t terms(const Sizes& n) { return n.channels * volume(n.kernel); }  // of a t
inline bool channels_last(const ConstMap& x) { return x.stride_position != 1; }

struct Range {
  int64_t begin, end;
};

// The positions of g along a dim that those of the grid from `begin` to `end` lie between.
inline Range taps_of(const Inputs& p, int dim, int64_t begin, int64_t end) {
  for (int d = 0; d < dim; ++d) begin += p.sizes.grid[d], end += p.sizes.grid[d];
  Range r{p.taps[2 * begin], p.taps[2 * begin] + 1};
  for (int64_t i = 2 * begin; i < 2 * end; ++i) {
    r.begin = p.taps[i] < r.begin ? p.taps[i] : r.begin;
    r.end = p.taps[i] >= r.end ? p.taps[i] + 1 : r.end;
  }
  return r;
}

// Positions [begin, end) of the logits' grid of sample b.
struct Unit {
  int64_t b, begin, end;
};

// Units first to last of a batch whose samples are cut into runs of `length` positions, `per_sample` each.
struct Units {
  int64_t length, per_sample, positions, first, last;
  Unit at(int64_t i) const {
    const int64_t b = i / per_sample, begin = i % per_sample * length;
    return {b, begin, begin + length < positions ? begin + length : positions};
  }
};

// A weight as it is packed once a call. Where bfloat16 is multiplied in pairs, the rows 2k and 2k + 1 of both matrices
// are pairs instead: in two parts, whose sum is the weight, or rounded to one.
struct Weight {
  void* columns;  // [inner, leading(F)], zero beyond F: the weight transposed
  void* rows;     // [padded(F), leading(inner)]; pairs are of the nearest numbers
  int parts;      // of `columns`: one suffices in the accumulation dtype, and where every number is a bfloat16
};

// What is packed once a call. The terms of a t stand in the order [patch, channel].
struct Weights {
  Weight theta, phi;  // phi null where there is none
  void* vectors;      // [kVectors, padded(F)], zero beyond F
};
enum VectorOf { kBias, kPsi, kThetaScale, kThetaK0, kThetaK1, kPhiScale, kPhiK0, kPhiK1, kVectors };

// What one thread works in; a tile is `tile` positions. Arrays are in the accumulation dtype, but what is copied of
// maps whose bfloat16 is multiplied in pairs.
struct Scratch {
  int64_t tile, ld;  // leading(tile)
  bool streaming;    // write maps past the caches
  // Of this tile and of the next, which is copied meanwhile; null where every map is read in place.
  void *x[2], *g[2];          // [terms, ld] or, channels last, [tile, leading(terms)]
  void* d[2];                 // [channels, ld] of the target
  void *t, *u;                // [tile, leading(F)]; u null where t + u alone is wanted
  void* columns;              // [padded(F), ld]: the gradient of t or u, channels first
  void *alpha, *dq, *dalpha;  // [tile]
  void* line;                 // a row of patches
  void* pairs;                // of adjacent rows of a map's tile, as long as one product; bfloat16 alone
  void* rounded[2];      // [tile, leading(F)] of t's and u's gradients: in rows and in pairs of rows; bfloat16 alone
  void* coarse;          // [range, leading(F)]: positions of g along its last dim, between rows of the others
  void* coarse_columns;  // [padded(F), coarse_ld], channels first
  int64_t coarse_ld;     // leading(range)
};

// Where a group of units adds its gradients; null where there is none.
struct Sums {
  void* theta;  // [terms, padded(F)]
  void* phi;    // [G, padded(F)]
  void *bias, *psi;
  void* psi_bias;        // [1]
  void *dh, *dht, *dhu;  // [padded(F)], of SumsParams alone
};

// A unit's part of the gradient of a resampled g: [positions, padded(F)].
struct Slab {
  Range positions;
  void* data;
};

struct CpuKernels {
  void (*pack)(const Inputs&, const Branch& theta, const Branch& phi, Weights&);
  void (*forward)(const ForwardParams&, const Weights&, const Units&, const Scratch&);
  // `slabs` has one for each unit of the batch, or is null.
  void (*backward)(const BackwardParams&, const Weights&, const Units&, const Scratch&, const Sums&, const Slab* slabs);
  // dx of sample b in the rows that no patch covers.
  void (*uncovered)(const BackwardParams&, int64_t b);
  // dg of sample b at `positions`, from the slabs of its units; rows [positions, leading(F)] and columns are scratch.
  void (*merge_slabs)(const BackwardParams&, int64_t b, Range positions, const Slab* slabs, int64_t count, void* rows,
                      void* columns);
  void (*sums)(const SumsParams&, const Weights&, const Units&, const Scratch&, const Sums&);
  // Of t = theta x, for each unit of the batch: the mean and the squares about it, [units, 2, padded(F)].
  void (*moments)(const Inputs&, const Weights&, const Units&, const Scratch&, void* parts);
  void (*merge_moments)(const MomentsParams&, const void* parts, const Units&);
  // out = the sum of `count` arrays of n elements that stand `stride` elements apart; may be the first of them.
  void (*add)(DType acc, const void* parts, int64_t stride, int64_t count, void* out, int64_t n);
  // Rows `f` of a weight's gradient [F, channels patch] from its sums [patch channels, padded(F)].
  void (*put_weight)(DType acc, const void* sums, int64_t channels, int64_t patch, int64_t hidden, Range f, void* out);
  void (*apply)(const ApplyParams&, const Unit&, bool streaming);
  void (*apply_backward)(const ApplyBackwardParams&, const Unit&, bool streaming);
};

const CpuKernels& cpu_kernels(cpu::Isa isa);

}  // namespace attnkern::attention_gate
