// Chooses what runs a kernel: nvcc's device code, or the emulator of tests/simt (ATTNKERN_SIMT). Kernels reach the
// hardware only through the functions of this folder; each has a twin in tests/simt/emulator.h.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef ATTNKERN_SIMT

#include "simt/emulator.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define ATTNKERN_KERNEL(max_threads, min_blocks) __global__ void __launch_bounds__(max_threads, min_blocks)
#define ATTNKERN_DEVICE __device__ __forceinline__
#define ATTNKERN_DEVICE_CALL inline __device__ __noinline__
#define ATTNKERN_HOST_DEVICE __host__ __device__ __forceinline__
#define ATTNKERN_GRID_CONSTANT __grid_constant__

namespace attnkern::cuda {

using float16 = __half;
using bfloat16 = __nv_bfloat16;

// Grids and blocks are one-dimensional; a block is a whole number of warps.
ATTNKERN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
ATTNKERN_DEVICE int block_size() { return static_cast<int>(blockDim.x); }
ATTNKERN_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
ATTNKERN_DEVICE int grid_size() { return static_cast<int>(gridDim.x); }
ATTNKERN_DEVICE int lane_id() { return thread_index() & 31; }
ATTNKERN_DEVICE int warp_id() { return thread_index() >> 5; }
ATTNKERN_DEVICE int warp_count() { return block_size() >> 5; }

ATTNKERN_DEVICE void block_sync() { __syncthreads(); }
ATTNKERN_DEVICE void warp_sync() { __syncwarp(); }

// Shuffles and votes of a whole warp: every lane takes part.
template <class T>
ATTNKERN_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
ATTNKERN_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
ATTNKERN_DEVICE uint32_t warp_ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

}  // namespace attnkern::cuda

#endif

namespace attnkern::cuda {

constexpr int kWarpSize = 32;

}  // namespace attnkern::cuda
