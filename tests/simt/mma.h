// Twin of cuda/mma.cuh. Like shuffles, these order no memory.
#pragma once

#include <bit>

#include "simt/memory.h"

namespace attnkern::cuda {

template <class T>
void multiply_add(FragmentD& d, const FragmentA& a, const FragmentB& b, ATTNKERN_SITE) {
  const int lane = lane_id(), g = lane / 4, c = lane % 4;
  uint32_t (*words)[6] = simt::self->block->warps[warp_id()].fragments;
  std::memcpy(words[lane], a.words, sizeof(a.words));
  std::memcpy(words[lane] + 4, b.words, sizeof(b.words));
  simt::warp_exchange(1, 0, lane, site);
  const auto element = [&](int from, int word, int half) {
    return widen(std::bit_cast<T>(static_cast<uint16_t>(words[from][word] >> 16 * half)));
  };
  for (int i = 0; i < 4; ++i) {
    const int row = i / 2, column = 2 * c + i % 2;
    for (int k = 0; k < 16; ++k)
      d.values[i] +=
          element(4 * g + k % 8 / 2, row + k / 8 * 2, k % 2) * element(4 * column + k % 8 / 2, 4 + k / 8, k % 2);
  }
  simt::warp_exchange(1, 0, lane, site);  // the fragments were read
}

template <bool transposed = false, class T>
FragmentA load_matrices(const Shared<T>& from, int i, ATTNKERN_SITE) {
  static_assert(sizeof(T) == 2);
  from.byte(i, 8, 16, site);
  const int g = lane_id() / 4, c = lane_id() % 4;
  FragmentA f;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint32_t halves[2];
    for (int half = 0; half < 2; ++half) {
      const int row = transposed ? 2 * c + half : g, column = transposed ? g : 2 * c + half;
      halves[half] = std::bit_cast<uint16_t>(from.load(shuffle(i, 8 * matrix + row, site) + column, site));
    }
    f.words[matrix] = halves[0] | halves[1] << 16;
  }
  return f;
}

}  // namespace attnkern::cuda
