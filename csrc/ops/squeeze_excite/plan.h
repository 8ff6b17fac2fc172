// Which kernel serves a call, and how it is cut up: a pure function of sizes, types and device properties.
#pragma once

#include <cstdint>

#include "cuda/device.h"
#include "ops/squeeze_excite/params.h"

namespace attnkern::squeeze_excite {

// Where the map lives between the sums and the rescale:
//   resident   in the shared memory of one block, or of a cluster of blocks: one trip through memory
//   chunked    in L2: one persistent kernel sums a chunk of samples while it rescales the chunk before
//   streaming  nowhere: the same kernel, where one sample exceeds L2's share
//   batched    nowhere: sum, the MLP as matrix products over the batch, rescale; for weights that outweigh the maps
enum class Strategy : int { resident, chunked, streaming, batched };

enum class Direction : int { forward, backward };

// One sample's map is [rows, columns]: [C, L] channels first, [L, C] channels last.
struct Problem {
  Direction direction;
  bool channels_last;
  int64_t batch, channels, length, hidden, width;
  int dtype_bytes, weight_bytes;
  int layers;     // of the MLP: 0, 1 or 2
  bool squeezes;  // the MLP waits for sums over the map: always backward, forward unless src is given
  bool maskable;  // the forward writes a bit mask
  bool aligned;   // every map allows 16-byte accesses

  int64_t rows() const { return channels_last ? length : channels; }
  int64_t columns() const { return channels_last ? channels : length; }
};

struct Device : cuda::DeviceProperties {
  int clusters[5] = {132, 66, 32, 15, 8};  // of 1, 2, 4, 8, 16 blocks, one block an SM, resident at once
};

// Accesses of every map that a thread keeps in flight in the sweep of sums. Forward 48 bytes a thread, 24 KB an SM: 3.2
// MB on 132, of 3 needed; backward two maps of 32. More spills: a thread has 128 registers.
constexpr int kForwardUnroll = 3;
constexpr int kBackwardUnroll = 2;

struct Plan {
  Strategy strategy;
  int threads;
  int vector;             // elements of an access: 16 bytes, or one
  int cluster;            // blocks that hold a sample (resident); 1 otherwise
  int64_t chunk;          // elements of a sample (of a column block) that a piece holds, one piece a block or work item
  int64_t pieces;         // of a sample, over all column blocks
  int64_t block_columns;  // columns of a piece; fewer than all where channels last has more than shared memory takes
  int64_t chunk_samples;  // samples of an L2 chunk
  int64_t grid;           // blocks
  int blocks_per_sm;
  int shared_bytes;
  // Capacities of the arrays in shared memory (piece.cuh): bytes of elements that stay, then floats.
  int held_bytes;
  int sums;           // that a channel has
  int scratch;        // a thread
  int channels_here;  // channels a piece touches
  int channels_own;   // channels whose MLP rows a block computes
  int exchange;       // partial results of the first layer
  int hidden;         // its sum
};

// Tests force what a plan would choose by itself.
struct Force {
  int strategy = -1;
  int cluster = 0;
  int threads = 0;
  int64_t chunk = 0;  // elements of a piece, streaming and batched
};

Problem problem_of(const ForwardParams& params);
Problem problem_of(const BackwardParams& params);
Plan make_plan(const Problem& problem, const Device& device, const Force& force = {});

// The launchers of params.h with a given plan, for tests that force one.
size_t forward_workspace_cuda(const ForwardParams& params, const Plan& plan, const Device& device);
size_t backward_workspace_cuda(const BackwardParams& params, const Plan& plan, const Device& device);
Status launch_forward_cuda(const ForwardParams& params, const Plan& plan, const Device& device, void* stream);
Status launch_backward_cuda(const BackwardParams& params, const Plan& plan, const Device& device, void* stream);

}  // namespace attnkern::squeeze_excite
