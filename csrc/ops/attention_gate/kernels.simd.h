// The kernels of one instruction set; compiled by cpu/foreach_isa.h, hence no include guard. Each needs those above.
#include "cpu/simd.h"

#include "cpu/gemm.simd.h"
#include "cpu/math.simd.h"

#include "ops/attention_gate/activations.simd.h"
#include "ops/attention_gate/feed.simd.h"

#include "ops/attention_gate/product.simd.h"

#include "ops/attention_gate/maps.simd.h"

#include "ops/attention_gate/hidden.simd.h"
#include "ops/attention_gate/resample.simd.h"
#include "ops/attention_gate/weights.simd.h"

#include "ops/attention_gate/gate.simd.h"

namespace attnkern::attention_gate::ATTNKERN_ISA {

void forward(const ForwardParams& p, const Weights& w, const Units& units, const Scratch& s) {
  cpu::visit(p.dtype, [&](auto t) { forward_units<decltype(t)>(p, w, units, s); });
}
void backward(const BackwardParams& p, const Weights& w, const Units& units, const Scratch& s, const Sums& sums,
              const Slab* slabs) {
  cpu::visit(p.dtype, [&](auto t) { backward_units<decltype(t)>(p, w, units, s, sums, slabs); });
}
void uncovered(const BackwardParams& p, int64_t b) {
  cpu::visit(p.dtype, [&](auto t) { put_uncovered<decltype(t)>(p, b); });
}
void merge_slabs(const BackwardParams& p, int64_t b, Range positions, const Slab* slabs, int64_t count, void* rows,
                 void* columns) {
  cpu::visit(p.dtype, [&](auto t) { merge_slabs_of<decltype(t)>(p, b, positions, slabs, count, rows, columns); });
}
void sums(const SumsParams& p, const Weights& w, const Units& units, const Scratch& s, const Sums& to) {
  cpu::visit(p.dtype, [&](auto t) { sums_units<decltype(t)>(p, w, units, s, to); });
}
void moments(const Inputs& p, const Weights& w, const Units& units, const Scratch& s, void* parts) {
  cpu::visit(p.dtype, [&](auto t) { moments_units<decltype(t)>(p, w, units, s, parts); });
}
void merge_moments(const MomentsParams& p, const void* parts, const Units& units) {
  cpu::visit(accumulation(p.dtype), [&](auto t) {
    using A = Accumulator<decltype(t)>;
    merge_moments_of(p, static_cast<const A*>(parts), units);
  });
}
void apply(const ApplyParams& p, const Unit& unit, bool streaming) {
  cpu::visit(p.dtype, [&](auto t) { apply_unit<decltype(t)>(p, unit, streaming); });
}
void apply_backward(const ApplyBackwardParams& p, const Unit& unit, bool streaming) {
  cpu::visit(p.dtype, [&](auto t) { apply_backward_unit<decltype(t)>(p, unit, streaming); });
}

constexpr CpuKernels kKernels{pack,    forward,       backward, uncovered,  merge_slabs, sums,
                              moments, merge_moments, add,      put_weight, apply,       apply_backward};

}  // namespace attnkern::attention_gate::ATTNKERN_ISA
