// Twin of cuda/memory.cuh.
#pragma once

#include "simt/emulator.h"

namespace attnkern::cuda {

template <Cache hint = Cache::normal, class T>
T load_global(const T* from, ATTNKERN_SITE) {
  simt::global_access(from, sizeof(T), false, site);
  return *from;
}

template <Cache hint = Cache::normal, class T>
void store_global(T* to, T value, ATTNKERN_SITE) {
  simt::global_access(to, sizeof(T), true, site);
  *to = value;
}

template <int N, Cache hint = Cache::normal, class T>
Vec<T, N> load_global_vec(const T* from, ATTNKERN_SITE) {
  if (reinterpret_cast<uintptr_t>(from) % alignof(Vec<T, N>))
    simt::fault("misaligned vector load from global memory", site);
  simt::global_access(from, sizeof(Vec<T, N>), false, site);
  Vec<T, N> pack;
  std::memcpy(&pack, from, sizeof(pack));
  return pack;
}

template <Cache hint = Cache::normal, class T, int N>
void store_global_vec(T* to, const Vec<T, N>& pack, ATTNKERN_SITE) {
  if (reinterpret_cast<uintptr_t>(to) % alignof(Vec<T, N>))
    simt::fault("misaligned vector store to global memory", site);
  simt::global_access(to, sizeof(pack), true, site);
  std::memcpy(to, &pack, sizeof(pack));
}

template <class T>
struct Shared {
  uint32_t offset;  // bytes
  int count;

  static Shared at(int byte_offset, int count, ATTNKERN_SITE) {
    if (byte_offset < 0 || count < 0 ||
        byte_offset + static_cast<int64_t>(count) * sizeof(T) > simt::self->block->shared.size())
      simt::fault("a view of " + std::to_string(count) + " elements at byte " + std::to_string(byte_offset) +
                      " leaves the " + std::to_string(simt::self->block->shared.size()) + " bytes of shared memory",
                  site);
    if (byte_offset % alignof(T)) simt::fault("misaligned view of shared memory", site);
    return {static_cast<uint32_t>(byte_offset), count};
  }

  uint32_t byte(int i, int n, size_t alignment, simt::Site site) const {
    if (i < 0 || i + n > count)
      simt::fault("shared memory out of bounds: elements " + std::to_string(i) + " to " + std::to_string(i + n - 1) +
                      " of a view of " + std::to_string(count),
                  site);
    const uint32_t at = offset + static_cast<uint32_t>(i) * sizeof(T);
    if (at % alignment) simt::fault("misaligned vector access to shared memory", site);
    return at;
  }

  T load(int i, ATTNKERN_SITE) const { return load_from<T>(*simt::self->block, byte(i, 1, 1, site), site); }
  void store(int i, T value, ATTNKERN_SITE) const { store_to(*simt::self->block, byte(i, 1, 1, site), value, site); }

  template <int N>
  Vec<T, N> load_vec(int i, ATTNKERN_SITE) const {
    return load_from<Vec<T, N>>(*simt::self->block, byte(i, N, alignof(Vec<T, N>), site), site);
  }
  template <int N>
  void store_vec(int i, const Vec<T, N>& pack, ATTNKERN_SITE) const {
    store_to(*simt::self->block, byte(i, N, alignof(Vec<T, N>), site), pack, site);
  }
  Shared slice(int begin, int size, ATTNKERN_SITE) const {
    if (begin < 0 || size < 0 || begin + size > count) simt::fault("a slice leaves its view of shared memory", site);
    return {offset + begin * static_cast<uint32_t>(sizeof(T)), size};
  }

  template <class V>
  static V load_from(simt::Block& block, uint32_t at, simt::Site site) {
    V value;
    std::memcpy(&value, simt::shared_access(block, at, sizeof(V), false, site), sizeof(V));
    return value;
  }
  template <class V>
  static void store_to(simt::Block& block, uint32_t at, const V& value, simt::Site site) {
    std::memcpy(simt::shared_access(block, at, sizeof(V), true, site), &value, sizeof(V));
  }
};

}  // namespace attnkern::cuda
