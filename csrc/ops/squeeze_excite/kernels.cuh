// The kernels of both directions: a Stage (stages.cuh) says which.
#pragma once

#include <type_traits>

#include "ops/squeeze_excite/mlp.cuh"

namespace attnkern::squeeze_excite {

// The MLP with the type of its weights: float, or the map's.
template <class T, class Params>
ATTNKERN_DEVICE void run_mlp_of(const Params& p, const Plan& plan, const Workspace& w, const Share& share) {
  if constexpr (!std::is_same_v<T, float>) {
    if (p.weight_dtype != DType::float32) return run_mlp<T>(p, plan, w, share);
  }
  run_mlp<float>(p, plan, w, share);
}

// Computes   forward y, backward dx and dresidual, with all that is of size [B, C] or [B, R] (params.h)
// Layout     maps [B, rows, columns] of T: channels first [C, L], channels last [L, C]
// Mapping    a cluster owns a sample, a block a run of its elements (first: in order, last: whole positions) in shared
// memory Traffic    forward x once, y once (residual once); backward dy and x once, dx once: the floor. MLP weights
// come from L2 Numerics   float sums in a fixed order: accesses, tiles, ranks; no atomics
template <class T, bool last, template <class, bool> class StageOf>
ATTNKERN_KERNEL(512, 1)
squeeze_excite_resident_kernel(ATTNKERN_GRID_CONSTANT const typename StageOf<T, last>::Params p,
                               ATTNKERN_GRID_CONSTANT const Plan plan, ATTNKERN_GRID_CONSTANT const Workspace w) {
  using Stage = StageOf<T, last>;
  constexpr int wide = pack_size<T>();
  const Arrays s(p, plan);
  const int rank = cluster_rank(), ranks = cluster_size();
  const bool shared = shares_channels(p, plan);
  for (int64_t sample = block_index() / ranks; sample < p.sizes.batch; sample += grid_size() / ranks) {
    const Piece piece(p, plan, sample, rank);
    const Stage stage(p, plan, piece, s);
    const Share share{sample, false};
    if constexpr (Stage::kBackward) {
      write_scaling(p, plan, p.logits, sample, piece.first_channel, piece.channels);
      block_sync();
    }
    if (plan.vector > 1)
      sum_piece<wide, true, Cache::streaming>(stage, piece, plan);
    else
      sum_piece<1, true, Cache::streaming>(stage, piece, plan);
    share_sync(shared);
    finish_sums(p, plan, w, share);
    run_mlp_of<T>(p, plan, w, share);
    share_sync(shared);
    finish_sample(p, plan, share);
    if constexpr (Stage::kBackward)
      write_shift(p, plan, nullptr, sample, piece.first_channel, piece.channels);
    else
      write_scaling(p, plan, nullptr, sample, piece.first_channel, piece.channels);
    cluster_arrive();  // no block leaves, or sums the next sample, while another reads its shared memory
    block_sync();
    if (plan.vector > 1)
      rescale_piece<wide, true>(stage, piece, plan);
    else
      rescale_piece<1, true>(stage, piece, plan);
    cluster_wait();
  }
}

enum class Phase : int { both, sums, rescale };

// The item of a ticket: sums of chunk 0, sums of chunk 1, rescale chunk 0, sums of chunk 2, rescale chunk 1, ...
struct Item {
  bool sums;
  int64_t sample;
  int piece;

  ATTNKERN_DEVICE Item(int64_t ticket, int64_t batch, const Plan& plan) {
    const int64_t chunks = (batch + plan.chunk_samples - 1) / plan.chunk_samples;
    const int64_t items = plan.chunk_samples * plan.pieces, turn = ticket / items, rest = ticket - turn * items;
    const bool end = turn == 2 * chunks - 1;
    sums = turn == 0 || (turn % 2 == 1 && !end);
    const int64_t chunk = sums ? (turn + 1) / 2 : end ? chunks - 1 : turn / 2 - 1;
    sample = chunk * plan.chunk_samples + rest / plan.pieces;
    piece = static_cast<int>(rest % plan.pieces);
  }
};

// Computes   what the resident kernel does, for samples that no cluster holds; or its sums or its rescale alone
// Layout     the same
// Mapping    persistent blocks draw tickets for pieces of a sample; the last to sum a sample runs its MLP and marks it
// ready.
//            A piece to rescale waits only for lower tickets, so blocks need not be resident together
// Traffic    one trip more than the floor; from L2 where two chunks of samples fit
// Numerics   pieces are summed in order by whoever finishes last: the same bits whatever the schedule
template <class T, bool last, template <class, bool> class StageOf>
ATTNKERN_KERNEL(512, 1)
squeeze_excite_streamed_kernel(ATTNKERN_GRID_CONSTANT const typename StageOf<T, last>::Params p,
                               ATTNKERN_GRID_CONSTANT const Plan plan, ATTNKERN_GRID_CONSTANT const Workspace w,
                               const Phase phase) {
  using Stage = StageOf<T, last>;
  constexpr int wide = pack_size<T>(), sums = Stage::kSums;
  const Arrays s(p, plan);
  const int64_t slots = int64_t{sums} * plan.channels_here;
  uint32_t* const ticket = w.counters;
  uint32_t* const done = w.counters + 1;
  uint32_t* const ready = done + p.sizes.batch;
  const int64_t chunks = (p.sizes.batch + plan.chunk_samples - 1) / plan.chunk_samples;
  const int64_t items =
      phase == Phase::both ? 2 * chunks * plan.chunk_samples * plan.pieces : p.sizes.batch * plan.pieces;
  for (int64_t next = block_index();; next += grid_size()) {
    if (phase == Phase::both) {
      if (thread_index() == 0) s.ticket.store(0, atomic_add(ticket, 1));
      block_sync();
      next = s.ticket.load(0);
    }
    if (next >= items) return;
    Item item(next, p.sizes.batch, plan);
    if (phase != Phase::both) {
      item.sums = phase == Phase::sums;
      item.sample = next / plan.pieces;
      item.piece = static_cast<int>(next % plan.pieces);
    }
    if (item.sample >= p.sizes.batch) {
      block_sync();  // the ticket was read
      continue;
    }
    const Piece piece(p, plan, item.sample, item.piece);
    const Stage stage(p, plan, piece, s);
    const Share share{item.sample, true};

    if (item.sums) {
      if constexpr (Stage::kBackward) {
        if (stage.recomputes()) write_scaling(p, plan, p.logits, item.sample, piece.first_channel, piece.channels);
        block_sync();
      }
      if (plan.vector > 1)
        sum_piece<wide, false, Cache::normal>(stage, piece, plan);
      else
        sum_piece<1, false, Cache::normal>(stage, piece, plan);
      block_sync();
      float* const partial = w.partial + item.sample * plan.pieces * slots;
      for (int i = thread_index(); i < piece.channels; i += block_size())
        for (int k = 0; k < sums; ++k) {
          const int slot = k * plan.channels_here + i;
          store_global(partial + item.piece * slots + slot, s.sums.load(slot));
        }
      block_sync();
      if (thread_index() == 0) s.ticket.store(1, atomic_add(done + item.sample, 1));
      block_sync();
      if (s.ticket.load(1) + 1 == plan.pieces) {
        finish_sums(p, plan, w, share);
        finish_sample(p, plan, share);
        if (phase == Phase::both) {
          run_mlp_of<T>(p, plan, w, share);
          block_sync();
          if (thread_index() == 0) store_release(ready + item.sample, 1);
        }
      }
    } else {
      if (phase == Phase::both) {
        if (thread_index() == 0) wait_until_at_least(ready + item.sample, 1);
        block_sync();
      }
      write_scaling(p, plan, p.logits, item.sample, piece.first_channel, piece.channels);
      if constexpr (Stage::kBackward) write_shift(p, plan, w.dm, item.sample, piece.first_channel, piece.channels);
      block_sync();
      if (plan.vector > 1)
        rescale_piece<wide, false>(stage, piece, plan);
      else
        rescale_piece<1, false>(stage, piece, plan);
    }
    block_sync();  // before the arrays are written again
  }
}

}  // namespace attnkern::squeeze_excite
