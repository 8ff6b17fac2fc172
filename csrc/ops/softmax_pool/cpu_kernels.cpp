// The kernels for every instruction set, and the choice among them.
#include "ops/softmax_pool/cpu_kernels.h"

#include <utility>

#define ATTNKERN_KERNELS "ops/softmax_pool/kernels.simd.h"
#include "cpu/foreach_isa.h"

namespace attnkern::softmax_pool {

const CpuKernels& cpu_kernels(cpu::Isa isa) {
#if defined(__x86_64__)
  if (isa == cpu::Isa::avx512_bf16) return avx512_bf16::kKernels;
  if (isa == cpu::Isa::avx512) return avx512::kKernels;
  if (isa == cpu::Isa::avx2) return avx2::kKernels;
#endif
  return scalar::kKernels;
}

}  // namespace attnkern::softmax_pool
