// How a call is cut up: a pure function of sizes, types and device properties.
#pragma once

#include <cstdint>

#include "cuda/device.h"
#include "ops/softmax_pool/params.h"

namespace attnkern::softmax_pool {

enum class Direction : int { forward, backward };

struct Problem {
  Direction direction;
  Scorer scorer;
  Sizes sizes;
  int dtype_bytes;
  bool keyed;   // keys are not the values
  bool ragged;  // bags
  bool summed;  // backward: gradients of parameters that all samples share
};

constexpr int kMostThreads = 512;
constexpr int kAccumulators = 32;  // weighted sums that a thread has in registers
constexpr int kManyQueries = 16;   // that share a block's products on the tensor cores
constexpr int kManyStep = 16;      // features of one product
constexpr int kManySteps = 9;      // of a warp: its queries and sums take 144 registers a thread; ten spill
constexpr int kProductThreads = 256;
constexpr int kProductSize = 128;  // rows and columns of a block of the gated scorer's weight gradients

// Tests force what a plan would choose by itself.
struct Force {
  int64_t pieces = 0;
  int tile = 0;
};

// A sample's items are cut into pieces of `length` (a bag's where a multiple of `length` falls inside it); a block
// takes a piece, a head and a block of queries, and streams the piece through shared memory in tiles.
struct Plan {
  int threads;
  bool product;     // on the tensor cores: the gated scorer, or many queries
  bool held;        // a block's registers hold its sums of dquery from tile to tile
  int stages;       // tiles in shared memory
  int tile;         // items of one
  int value_width;  // features of a tile's values and keys, with padding
  int key_width;
  int block_queries;   // queries of a block, whose weighted sums its registers hold
  int padded_queries;  // that number in shared memory
  int query_blocks;
  int64_t length;       // items of a piece
  int64_t pieces;       // of a sample; 0 where ragged
  int64_t units;        // pieces of all samples
  int64_t block_units;  // consecutive units of a block: more than one where their gradients are summed
  int64_t slots;        // partial sums: units, or blocks where summed
  int64_t chunk_units;  // units whose hidden gradients the workspace holds at once (gated backward)
  int splits;           // blocks that share a chunk in the sums of dV and dU
  int64_t grid;
  int shared_bytes;  // too many where the device cannot run it
  int blocks_per_sm;
  Force force;  // what it was made with; backward plans its pool of the rest alike
};

Problem problem_of(const ForwardParams& params);
Problem problem_of(const BackwardParams& params);
Plan make_plan(const Problem& problem, const cuda::DeviceProperties& device, const Force& force = {});

// The launchers of params.h with a given plan, for tests that force one.
size_t forward_workspace_cuda(const ForwardParams& params, const Plan& plan);
size_t backward_workspace_cuda(const BackwardParams& params, const Plan& plan);
Status launch_forward_cuda(const ForwardParams& params, const Plan& plan, void* stream);
Status launch_backward_cuda(const BackwardParams& params, const Plan& plan, void* stream);

}  // namespace attnkern::softmax_pool
