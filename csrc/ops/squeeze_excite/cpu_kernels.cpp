// The kernels for every instruction set, and the choice among them.
#include "ops/squeeze_excite/cpu_kernels.h"

#define ATTNKERN_KERNELS "ops/squeeze_excite/kernels.simd.h"
#include "cpu/foreach_isa.h"

namespace attnkern::squeeze_excite {

const CpuKernels& cpu_kernels(cpu::Isa isa) { return ATTNKERN_OF_ISA(isa, kKernels); }

}  // namespace attnkern::squeeze_excite
