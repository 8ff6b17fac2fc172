// The kernels for every instruction set, and the choice among them.
#include "ops/attention_gate/cpu_kernels.h"

#include <utility>

#define ATTNKERN_KERNELS "ops/attention_gate/kernels.simd.h"
#include "cpu/foreach_isa.h"

namespace attnkern::attention_gate {

const CpuKernels& cpu_kernels(cpu::Isa isa) { return ATTNKERN_OF_ISA(isa, kKernels); }

}  // namespace attnkern::attention_gate
