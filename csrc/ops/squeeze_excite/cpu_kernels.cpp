// The kernels for every instruction set, and the choice among them.
#include "ops/squeeze_excite/cpu_kernels.h"

#define ATTNKERN_KERNELS "ops/squeeze_excite/kernels.simd.h"
#include "cpu/foreach_isa.h"

namespace attnkern::squeeze_excite {

const CpuKernels& cpu_kernels(cpu::Isa isa) {
#if defined(__x86_64__)
  if (isa == cpu::Isa::avx512_bf16) return avx512_bf16::kKernels;
  if (isa == cpu::Isa::avx512) return avx512::kKernels;
  if (isa == cpu::Isa::avx2) return avx2::kKernels;
#endif
  return scalar::kKernels;
}

}  // namespace attnkern::squeeze_excite
