// Thread block clusters and distributed shared memory (sm_90 and later). Below sm_90 a cluster is one block.
#pragma once

#include "cuda/memory.cuh"

#ifdef ATTNKERN_SIMT

#include "simt/cluster.h"

#else

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define ATTNKERN_HAS_CLUSTERS 1
#else
#define ATTNKERN_HAS_CLUSTERS 0
#endif

namespace attnkern::cuda {

ATTNKERN_DEVICE int cluster_rank() {
#if ATTNKERN_HAS_CLUSTERS
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}

ATTNKERN_DEVICE int cluster_size() {
#if ATTNKERN_HAS_CLUSTERS
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
#else
  return 1;
#endif
}

// The two halves of cluster_sync: what was written before arrive is visible in the whole cluster after wait.
ATTNKERN_DEVICE void cluster_arrive() {
#if ATTNKERN_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

ATTNKERN_DEVICE void cluster_wait() {
#if ATTNKERN_HAS_CLUSTERS
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

ATTNKERN_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// The same view in the shared memory of the block of `rank`.
template <class T>
struct RemoteShared {
#if ATTNKERN_HAS_CLUSTERS
  uint32_t address;

  ATTNKERN_DEVICE T load(int i) const {
    T value;
    const uint32_t from = address + i * static_cast<uint32_t>(sizeof(T));
    if constexpr (sizeof(T) == 8) {
      uint64_t word;
      asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(word) : "r"(from) : "memory");
      memcpy(&value, &word, 8);
    } else {
      static_assert(sizeof(T) == 4, "distributed shared memory is read by words of 4 or 8 bytes");
      uint32_t word;
      asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(word) : "r"(from) : "memory");
      memcpy(&value, &word, 4);
    }
    return value;
  }

  ATTNKERN_DEVICE void store(int i, T value) const {
    const uint32_t to = address + i * static_cast<uint32_t>(sizeof(T));
    if constexpr (sizeof(T) == 8) {
      uint64_t word;
      memcpy(&word, &value, 8);
      asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(to), "l"(word) : "memory");
    } else {
      static_assert(sizeof(T) == 4, "distributed shared memory is written by words of 4 or 8 bytes");
      uint32_t word;
      memcpy(&word, &value, 4);
      asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(to), "r"(word) : "memory");
    }
  }
#else
  Shared<T> own;
  ATTNKERN_DEVICE T load(int i) const { return own.load(i); }
  ATTNKERN_DEVICE void store(int i, T value) const { own.store(i, value); }
#endif
};

template <class T>
ATTNKERN_DEVICE RemoteShared<T> remote(const Shared<T>& view, int rank) {
#if ATTNKERN_HAS_CLUSTERS
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(view.address()), "r"(rank));
  return {address};
#else
  return {view};
#endif
}

}  // namespace attnkern::cuda

#endif
