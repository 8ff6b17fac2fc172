// Compiles ATTNKERN_KERNELS, a header without include guard, once for each instruction set, each time in a target
// region of its own with
//   ATTNKERN_ISA   the namespace: scalar (the baseline of the target), avx2, avx512 or avx512_bf16
//   ATTNKERN_BYTES the width of a vector
// Whatever the kernels include must be included before: a function defined inside a region is compiled for it, and the
// linker may keep that copy for all.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/isa.h"
#include "cpu/storage.h"

#define ATTNKERN_ISA scalar
#define ATTNKERN_BYTES 16
#include ATTNKERN_KERNELS
#undef ATTNKERN_ISA
#undef ATTNKERN_BYTES

#if defined(__x86_64__)

#define ATTNKERN_AVX2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define ATTNKERN_ISA avx2
#define ATTNKERN_BYTES 32
#include ATTNKERN_KERNELS
#undef ATTNKERN_ISA
#undef ATTNKERN_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define ATTNKERN_AVX512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#endif
#define ATTNKERN_ISA avx512
#define ATTNKERN_BYTES 64
#include ATTNKERN_KERNELS
#undef ATTNKERN_ISA
#undef ATTNKERN_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define ATTNKERN_AVX512_BF16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#endif
#define ATTNKERN_ISA avx512_bf16
#define ATTNKERN_BYTES 64
#include ATTNKERN_KERNELS
#undef ATTNKERN_ISA
#undef ATTNKERN_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef ATTNKERN_AVX2
#undef ATTNKERN_AVX512
#undef ATTNKERN_AVX512_BF16

#endif  // __x86_64__

// Of what every region defines by that name, that of `isa`.
#if defined(__x86_64__)
#define ATTNKERN_OF_ISA(isa, name)                    \
  ((isa) == cpu::Isa::avx512_bf16 ? avx512_bf16::name \
   : (isa) == cpu::Isa::avx512    ? avx512::name      \
   : (isa) == cpu::Isa::avx2      ? avx2::name        \
                                  : scalar::name)
#else
#define ATTNKERN_OF_ISA(isa, name) ((void)(isa), scalar::name)
#endif
