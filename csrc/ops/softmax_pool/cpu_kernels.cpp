// The kernels for every instruction set, and the choice among them.
#include "ops/softmax_pool/cpu_kernels.h"

#include <utility>

#define ATTNKERN_KERNELS "ops/softmax_pool/kernels.simd.h"
#include "cpu/foreach_isa.h"

namespace attnkern::softmax_pool {

const CpuKernels& cpu_kernels(cpu::Isa isa) { return ATTNKERN_OF_ISA(isa, kKernels); }

}  // namespace attnkern::softmax_pool
