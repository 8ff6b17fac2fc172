// The kernels of one instruction set; compiled by cpu/foreach_isa.h, hence no include guard. Each needs those above.
#include "cpu/simd.h"

#include "cpu/gemm.simd.h"
#include "cpu/math.simd.h"

#include "ops/softmax_pool/activations.simd.h"
#include "ops/softmax_pool/tile.simd.h"

#include "ops/softmax_pool/scorers.simd.h"

#include "ops/softmax_pool/additive.simd.h"
#include "ops/softmax_pool/gated.simd.h"

#include "ops/softmax_pool/pool.simd.h"

namespace attnkern::softmax_pool::ATTNKERN_ISA {

constexpr CpuKernels kKernels{pack, pool, merge, unpool, add};

}  // namespace attnkern::softmax_pool::ATTNKERN_ISA
