// The kernels of one instruction set; compiled by cpu/foreach_isa.h, hence no include guard.
#include "cpu/simd.h"

#include "cpu/math.simd.h"
#include "ops/squeeze_excite/activations.simd.h"
#include "ops/squeeze_excite/maps.simd.h"
#include "ops/squeeze_excite/mlp.simd.h"
#include "ops/squeeze_excite/rescale.simd.h"

namespace attnkern::squeeze_excite::ATTNKERN_ISA {

constexpr CpuKernels kKernels{sum_x,       sum_grads,   add,       hidden, logits,  coefficients, rescale,
                              grad_logits, grad_hidden, grad_mean, grad_x, grad_w1, grad_w2,      grad_act_weight};

}  // namespace attnkern::squeeze_excite::ATTNKERN_ISA
