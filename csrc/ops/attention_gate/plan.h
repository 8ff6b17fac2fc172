// How a call is cut up: a pure function of sizes, types and device properties.
#pragma once

#include <cstdint>

#include "cuda/device.h"
#include "ops/attention_gate/params.h"

namespace attnkern::attention_gate {

enum class Task : int { forward, moments, sums, backward };

struct Problem {
  Task task;
  Sizes sizes;
  int dtype_bytes;
  bool last;       // maps are channels last
  bool resampled;  // no phi: g is on a grid of its own
};

constexpr int kStep = 16;          // terms of a product on the tensor cores: widths are multiples
constexpr int kWarpTile = 32;      // positions and hidden units of a warp's product
constexpr int kStages = 3;         // chunks of a map on their way or in use
constexpr int kMostThreads = 256;  // of a block
constexpr int kMostTile = 256;     // positions
constexpr int kWeightTiles = 2;    // of 32 x 32 sums of theta's and phi's gradients, that a warp keeps

// A block takes tiles of positions of a sample and, of the hidden units, one pass or all one after another. What a
// product is made of comes through shared memory in chunks of terms (channels, or channels of a patch): whole maps and
// weights that stay where they fit, else pieces of both.
struct Plan {
  int threads;
  int tile;           // positions of a tile
  int warp_tile;      // positions of a warp's product: 32; 64 where that reads 16-bit chunks for more positions at once
  int hidden;         // hidden units of a pass, in whole warp tiles
  int passes;         // over all of them
  bool whole;         // a chunk is a tile's whole map, and the weights stay in shared memory
  int chunk;          // terms of a chunk
  int map_stride;     // elements between rows of a chunk: positions (channels last) or channels
  int map_size;       // elements of a chunk
  int weight_stride;  // elements between rows of weights, a hidden unit each
  int weight_size;    // elements of a chunk's weights; where they stay, of one map's
  int64_t tiles;      // of a sample
  int64_t units;      // tiles of all samples
  int64_t blocks;     // of a pass; each takes every blocks-th unit
  int64_t slots;      // partial sums of a pass: one a block and row of warps
  int shared_bytes;   // more than the device has where it cannot run
  int blocks_per_sm;
  // backward
  bool fused;           // one kernel; the rest is for ranges of units
  bool alone;           // fused, one block an SM: loads the next tile as it multiplies; warps have 16 hidden units
  int64_t chunk_units;  // units whose hidden gradients the workspace holds at once
  int map_columns;      // terms of a block of a map's gradient, beside the tile's positions
  int rows;             // hidden units of a block of the weights' gradients
  int weight_columns;   // its terms
  int splits;           // blocks that share a chunk there
};

// Tests force what a plan would choose by itself.
struct Force {
  int tile = 0;
  int warp_tile = 0;        // of a plan that is not whole, 16 bits
  int chunk = 0;            // terms, of a plan that is not whole
  int64_t chunk_units = 0;  // backward in ranges
  bool alone = false;       // backward fused, if so
};

Problem problem_of(const ForwardParams& params);
Problem problem_of(const BackwardParams& params);
Problem problem_of(const MomentsParams& params);
Problem problem_of(const SumsParams& params);
Plan make_plan(const Problem& problem, const cuda::DeviceProperties& device, const Force& force = {});

// The launchers of params.h with a given plan, for tests that force one.
size_t forward_workspace_cuda(const ForwardParams& params, const Plan& plan);
size_t backward_workspace_cuda(const BackwardParams& params, const Plan& plan);
size_t moments_workspace_cuda(const MomentsParams& params, const Plan& plan);
size_t sums_workspace_cuda(const SumsParams& params, const Plan& plan);
Status launch_forward_cuda(const ForwardParams& params, const Plan& plan, void* stream);
Status launch_backward_cuda(const BackwardParams& params, const Plan& plan, void* stream);
Status launch_moments_cuda(const MomentsParams& params, const Plan& plan, void* stream);
Status launch_sums_cuda(const SumsParams& params, const Plan& plan, void* stream);

}  // namespace attnkern::attention_gate
