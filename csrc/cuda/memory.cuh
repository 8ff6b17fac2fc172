// Global memory with cache hints, and typed views of dynamic shared memory. The emulator checks bounds, initialisation
// and races.
#pragma once

#include "cuda/vec.cuh"

namespace attnkern::cuda {

// streaming: touched once, first to leave L1 and L2. keep: re-read soon, last to leave L2.
enum class Cache { normal, streaming, keep };

// Bytes that `count` elements take of a kernel's dynamic shared memory: allocations start at multiples of 16 bytes.
template <class T>
ATTNKERN_HOST_DEVICE constexpr int shared_bytes(int count) {
  return (count * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
}

}  // namespace attnkern::cuda

#ifdef ATTNKERN_SIMT

#include "simt/memory.h"

#else

namespace attnkern::cuda {

ATTNKERN_DEVICE uint64_t keep_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

ATTNKERN_DEVICE uint64_t streaming_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// One access of `Bytes` bytes: registers of 32 bits (16 for a lone 16-bit element, 8 for a byte).
template <int Bytes, Cache hint>
struct GlobalAccess;

#define ATTNKERN_GLOBAL_ACCESS(BYTES, WORD, CONSTRAINT, SUFFIX)                                                       \
  template <Cache hint>                                                                                               \
  struct GlobalAccess<BYTES, hint> {                                                                                  \
    using Word = WORD;                                                                                                \
    ATTNKERN_DEVICE static Word load(const void* from) {                                                              \
      Word v;                                                                                                         \
      if constexpr (hint == Cache::streaming)                                                                         \
        asm volatile("ld.global.L1::no_allocate.L2::cache_hint." SUFFIX " %0, [%1], %2;"                              \
                     : "=" CONSTRAINT(v)                                                                              \
                     : "l"(from), "l"(streaming_policy())                                                             \
                     : "memory");                                                                                     \
      else if constexpr (hint == Cache::keep)                                                                         \
        asm volatile("ld.global.L2::cache_hint." SUFFIX " %0, [%1], %2;"                                              \
                     : "=" CONSTRAINT(v)                                                                              \
                     : "l"(from), "l"(keep_policy())                                                                  \
                     : "memory");                                                                                     \
      else                                                                                                            \
        asm volatile("ld.global." SUFFIX " %0, [%1];" : "=" CONSTRAINT(v) : "l"(from) : "memory");                    \
      return v;                                                                                                       \
    }                                                                                                                 \
    ATTNKERN_DEVICE static void store(void* to, Word v) {                                                             \
      if constexpr (hint == Cache::streaming)                                                                         \
        asm volatile("st.global.cs." SUFFIX " [%0], %1;" ::"l"(to), CONSTRAINT(v) : "memory");                        \
      else if constexpr (hint == Cache::keep)                                                                         \
        asm volatile("st.global.L2::cache_hint." SUFFIX " [%0], %1, %2;" ::"l"(to), CONSTRAINT(v), "l"(keep_policy()) \
                     : "memory");                                                                                     \
      else                                                                                                            \
        asm volatile("st.global." SUFFIX " [%0], %1;" ::"l"(to), CONSTRAINT(v) : "memory");                           \
    }                                                                                                                 \
  };
ATTNKERN_GLOBAL_ACCESS(2, uint16_t, "h", "u16")
ATTNKERN_GLOBAL_ACCESS(4, uint32_t, "r", "u32")
ATTNKERN_GLOBAL_ACCESS(8, uint64_t, "l", "u64")
#undef ATTNKERN_GLOBAL_ACCESS

template <Cache hint>
struct GlobalAccess<1, hint> {  // asm has no 8-bit register: the compiler's own access, hints dropped
  using Word = uint8_t;
  ATTNKERN_DEVICE static Word load(const void* from) { return *static_cast<const volatile uint8_t*>(from); }
  ATTNKERN_DEVICE static void store(void* to, Word v) { *static_cast<volatile uint8_t*>(to) = v; }
};

template <Cache hint>
struct GlobalAccess<16, hint> {
  struct alignas(16) Word {
    uint32_t x, y, z, w;
  };
  ATTNKERN_DEVICE static Word load(const void* from) {
    Word v;
    if constexpr (hint == Cache::streaming)
      asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "l"(from), "l"(streaming_policy())
                   : "memory");
    else if constexpr (hint == Cache::keep)
      asm volatile("ld.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "l"(from), "l"(keep_policy())
                   : "memory");
    else
      asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "l"(from)
                   : "memory");
    return v;
  }
  ATTNKERN_DEVICE static void store(void* to, Word v) {
    if constexpr (hint == Cache::streaming)
      asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                   : "memory");
    else if constexpr (hint == Cache::keep)
      asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "r"(v.x), "r"(v.y),
                   "r"(v.z), "r"(v.w), "l"(keep_policy())
                   : "memory");
    else
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                   : "memory");
  }
};

template <Cache hint = Cache::normal, class T>
ATTNKERN_DEVICE T load_global(const T* from) {
  const auto word = GlobalAccess<sizeof(T), hint>::load(from);
  T value;
  memcpy(&value, &word, sizeof(T));
  return value;
}

template <Cache hint = Cache::normal, class T>
ATTNKERN_DEVICE void store_global(T* to, T value) {
  typename GlobalAccess<sizeof(T), hint>::Word word;
  memcpy(&word, &value, sizeof(T));
  GlobalAccess<sizeof(T), hint>::store(to, word);
}

// `from` and `to` are aligned to the pack (16 bytes for longer packs).
template <int N, Cache hint = Cache::normal, class T>
ATTNKERN_DEVICE Vec<T, N> load_global_vec(const T* from) {
  constexpr int bytes = alignof(Vec<T, N>);
  using Access = GlobalAccess<bytes, hint>;
  Vec<T, N> pack;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(pack)) / bytes; ++i) {
    const auto word = Access::load(reinterpret_cast<const char*>(from) + i * bytes);
    memcpy(reinterpret_cast<char*>(&pack) + i * bytes, &word, bytes);
  }
  return pack;
}

template <Cache hint = Cache::normal, class T, int N>
ATTNKERN_DEVICE void store_global_vec(T* to, const Vec<T, N>& pack) {
  constexpr int bytes = alignof(Vec<T, N>);
  using Access = GlobalAccess<bytes, hint>;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(pack)) / bytes; ++i) {
    typename Access::Word word;
    memcpy(&word, reinterpret_cast<const char*>(&pack) + i * bytes, bytes);
    Access::store(reinterpret_cast<char*>(to) + i * bytes, word);
  }
}

// Elements [0, count) of dynamic shared memory from a byte offset. Indices count elements; packs are aligned to
// themselves.
template <class T>
struct Shared {
  T* data;
  int count;

  ATTNKERN_DEVICE static Shared at(int byte_offset, int count) {
    extern __shared__ __align__(128) unsigned char attnkern_shared[];
    return {reinterpret_cast<T*>(attnkern_shared + byte_offset), count};
  }
  ATTNKERN_DEVICE T load(int i) const { return data[i]; }
  ATTNKERN_DEVICE void store(int i, T value) const { data[i] = value; }
  template <int N>
  ATTNKERN_DEVICE Vec<T, N> load_vec(int i) const {
    return *reinterpret_cast<const Vec<T, N>*>(data + i);
  }
  template <int N>
  ATTNKERN_DEVICE void store_vec(int i, const Vec<T, N>& pack) const {
    *reinterpret_cast<Vec<T, N>*>(data + i) = pack;
  }
  ATTNKERN_DEVICE Shared slice(int begin, int size) const { return {data + begin, size}; }
  ATTNKERN_DEVICE uint32_t address() const { return static_cast<uint32_t>(__cvta_generic_to_shared(data)); }
};

}  // namespace attnkern::cuda

#endif

namespace attnkern::cuda {

// Takes views one after another; the host adds the same shared_bytes<T>(count) up for the launch.
struct SharedArena {
  int offset = 0;
  template <class T>
  ATTNKERN_DEVICE Shared<T> take(int count) {
    const int begin = offset;
    offset += shared_bytes<T>(count);
    return Shared<T>::at(begin, count);
  }
};

}  // namespace attnkern::cuda
