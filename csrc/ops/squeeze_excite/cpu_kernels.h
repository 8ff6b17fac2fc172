// One instruction set's kernels, on ranges of work; cpu.cpp schedules them over samples and threads.
//
// A range of rows of one sample is channels [begin, end) channels first, positions [begin, end) channels last.
// Arrays of [B, C], [B, R] and [B, width] are in the accumulation dtype.
#pragma once

#include "cpu/isa.h"
#include "ops/squeeze_excite/params.h"

namespace attnkern::squeeze_excite {

struct Range {
  int64_t begin, end;
};

// y = out_act(residual + s x + t) forward; dx = s v + t backward: both [B, C], gain and drop path multiplied in.
struct Coefficients {
  void* s;
  void* t;
};

// Whether the elementwise pass is one scale and one addend a row, over rows that follow one another and are no shorter
// than a vector. Such rows are written as one: 14x14 takes 0.86 of the time of rows one by one, bfloat16 at 28x28 0.84.
inline bool joins_rows(const Inputs& p, const ConstMap& in, const Map& out) {
  constexpr int64_t kVector = 16;
  return p.layout == Layout::channels_first && p.options.out_act == Act::identity && p.sizes.length >= kVector &&
         in.stride_row == p.sizes.length && out.stride_row == p.sizes.length;
}
inline bool joins_rows(const ForwardParams& p) { return !p.residual.data && joins_rows(p, p.x, p.y); }
inline bool joins_rows(const BackwardParams& p) { return !p.dresidual.data && p.dx.data && joins_rows(p, p.dy, p.dx); }

struct CpuKernels {
  // Sums over the positions of `rows` in sample b, [C]; channels first only channels `rows` are written.
  void (*sum_x)(const Inputs&, int64_t b, Range rows, void* sum);
  void (*sum_grads)(const BackwardParams&, const Coefficients& u, int64_t b, Range rows, void* sum_vx, void* sum_v);
  // total = (total + part) / divisor over n elements, or part / divisor when it is the first.
  void (*add)(DType acc, const void* part, void* total, int64_t n, bool first, double divisor);

  // h = W1 m + b1 and a = act(h) for hidden units `rows` of the samples.
  void (*hidden)(const ForwardParams&, Range samples, Range rows, void* a);
  // z = W2 a + b2, W1 m + b1 or src for logits `rows` of the samples.
  void (*logits)(const ForwardParams&, Range samples, Range rows, const void* a);
  void (*coefficients)(const Inputs&, const void* logits, Range samples, const Coefficients&);
  void (*rescale)(const ForwardParams&, const Coefficients&, int64_t b, Range rows, bool stream);

  // dz, and the drop path's gradient, from the sums of v x and v.
  void (*grad_logits)(const BackwardParams&, Range samples, const void* sum_vx, const void* sum_v, void* dz);
  // da = dz W2 for hidden units `columns`; dh = act'(h) da; a = act(h); da becomes dact_weight's summand for prelu.
  void (*grad_hidden)(const BackwardParams&, Range samples, Range columns, const void* dz, void* da, void* dh, void* a);
  // dm = dh W1 for channels `columns`, divided by L where dm flows into x.
  void (*grad_mean)(const BackwardParams&, Range samples, Range columns, const void* first, void* dm);
  void (*grad_x)(const BackwardParams&, const Coefficients& u, const Coefficients& dx, int64_t b, Range rows,
                 bool stream);
  // Rows `rows` of dW1 (and db1), of dW2 (and db2); dact_weight.
  void (*grad_w1)(const BackwardParams&, Range rows, const void* first);
  void (*grad_w2)(const BackwardParams&, Range rows, const void* dz, const void* a);
  void (*grad_act_weight)(const BackwardParams&, const void* da);
};

const CpuKernels& cpu_kernels(cpu::Isa isa);

}  // namespace attnkern::squeeze_excite
