// Twin of cuda/cluster.cuh.
#pragma once

#include "simt/memory.h"

namespace attnkern::cuda {

inline int cluster_rank() { return simt::self->block->rank; }
inline int cluster_size() { return static_cast<int>(simt::self->block->cluster->blocks.size()); }
inline void cluster_arrive(ATTNKERN_SITE) { simt::cluster_arrive(site); }
inline void cluster_wait(ATTNKERN_SITE) { simt::cluster_wait(site); }
inline void cluster_sync(ATTNKERN_SITE) {
  simt::cluster_arrive(site);
  simt::cluster_wait(site);
}

template <class T>
struct RemoteShared {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "distributed shared memory is accessed by words of 4 or 8 bytes");
  Shared<T> view;
  simt::Block* block;

  T load(int i, ATTNKERN_SITE) const { return view.template load_from<T>(*block, view.byte(i, 1, 1, site), site); }
  void store(int i, T value, ATTNKERN_SITE) const { view.store_to(*block, view.byte(i, 1, 1, site), value, site); }
};

template <class T>
RemoteShared<T> remote(const Shared<T>& view, int rank, ATTNKERN_SITE) {
  if (rank < 0 || rank >= cluster_size())
    simt::fault("rank " + std::to_string(rank) + " is outside a cluster of " + std::to_string(cluster_size()), site);
  return {view, &simt::self->block->cluster->blocks[rank]};
}

}  // namespace attnkern::cuda
