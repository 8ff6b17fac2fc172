// What one block works on: a contiguous run of one sample's elements, and the arrays it keeps in shared memory.
#pragma once

#include "cuda/async.cuh"
#include "cuda/atomic.cuh"
#include "cuda/cluster.cuh"
#include "cuda/reduce.cuh"
#include "ops/squeeze_excite/plan.h"

namespace attnkern::squeeze_excite {

using namespace attnkern::cuda;

// Quotients of numbers below 2^32 by one divisor, without a division: umulhi of ceil(2^32 / d) is the quotient or one
// more.
struct Divider {
  int64_t divisor;
  uint32_t magic;

  ATTNKERN_DEVICE explicit Divider(int64_t d)
      : divisor(d), magic(d > 1 && d < (int64_t{1} << 31) ? static_cast<uint32_t>((uint64_t{1} << 32) / d + 1) : 0) {}

  ATTNKERN_DEVICE uint32_t divide(int64_t n) const {
    if (magic == 0) return divisor == 1 ? static_cast<uint32_t>(n) : n >= divisor;
    const uint32_t number = static_cast<uint32_t>(n), d = static_cast<uint32_t>(divisor);
    const uint32_t q = static_cast<uint32_t>((uint64_t{number} * magic) >> 32);
    return q - (uint64_t{q} * d > number);
  }
};

// Where an access begins: a row of the piece, a column, and how many elements the row has from here (capped).
struct Position {
  int row;
  int64_t column;
  int left;
};

// Elements [0, count) of a sample's [rows, columns] map, or of a block of its columns, from (first_row, first_column)
// on.
struct Piece {
  int64_t sample, first_row, first_column, columns, column_begin;
  int64_t first_channel;
  int index, count, rows, channels;
  Divider divider;

  ATTNKERN_DEVICE Piece(const Inputs& p, const Plan& plan, int64_t sample, int index)
      : sample(sample), index(index), divider(1) {
    const bool last = p.layout == Layout::channels_last;
    const int64_t all_columns = last ? p.sizes.channels : p.sizes.length;
    const int64_t all_rows = last ? p.sizes.length : p.sizes.channels;
    const int64_t blocks = (all_columns + plan.block_columns - 1) / plan.block_columns;
    const int64_t pieces = plan.pieces / blocks, block = index / pieces, of_block = index - block * pieces;
    column_begin = block * plan.block_columns;
    columns = min64(plan.block_columns, all_columns - column_begin);
    // chunk counts whole rows of block_columns where channels are last; the last block's rows are shorter
    const int64_t chunk = last ? plan.chunk / plan.block_columns * columns : plan.chunk;
    const int64_t total = all_rows * columns, begin = min64(total, of_block * chunk);
    count = static_cast<int>(min64(total, begin + chunk) - begin);
    first_row = begin / columns;
    first_column = begin - first_row * columns;
    divider = Divider(columns);
    rows = count ? static_cast<int>(divider.divide(first_column + count - 1)) + 1 : 0;
    first_channel = last ? column_begin : first_row;
    channels = last ? static_cast<int>(columns) : rows;
  }

  ATTNKERN_DEVICE static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

  ATTNKERN_DEVICE Position at(int element) const {
    const int64_t offset = first_column + element;
    const uint32_t row = divider.divide(offset);
    const int64_t column = offset - row * columns, left = columns - column;
    return {static_cast<int>(row), column, left < 64 ? static_cast<int>(left) : 64};
  }

  // The element at which a row begins; negative where it began before the piece.
  ATTNKERN_DEVICE int64_t row_begin(int row) const { return row * columns - first_column; }
};

// One map, from the piece's first row on.
template <class Element>
struct PieceMap {
  Element* data;
  int64_t stride_row;

  template <class Pointer>
  ATTNKERN_DEVICE PieceMap(const MapOf<Pointer>& map, const Piece& piece)
      : data(map.data ? static_cast<Element*>(map.data) + piece.sample * map.stride_batch +
                            piece.first_row * map.stride_row + piece.column_begin
                      : nullptr),
        stride_row(map.stride_row) {}

  ATTNKERN_DEVICE Element* at(const Position& p) const { return data + p.row * stride_row + p.column; }
};

// The piece's bits in a mask of dense rows.
struct PieceMask {
  uint8_t* data;
  int64_t stride_row;

  ATTNKERN_DEVICE PieceMask(const uint8_t* mask, const Inputs& p, const Piece& piece) {
    const bool last = p.layout == Layout::channels_last;
    stride_row = ((last ? p.sizes.channels : p.sizes.length) + 7) / 8;
    const int64_t rows = last ? p.sizes.length : p.sizes.channels;
    data = mask ? const_cast<uint8_t*>(mask) + (piece.sample * rows + piece.first_row) * stride_row +
                      piece.column_begin / 8
                : nullptr;
  }

  ATTNKERN_DEVICE uint8_t* byte(int row, int64_t column) const { return data + row * stride_row + column / 8; }

  // Bits of the V elements from `at` on, which may go on in the next row.
  template <int V>
  ATTNKERN_DEVICE uint32_t bits(const Position& at) const {
    const int shift = static_cast<int>(at.column % 8), here = at.left < V ? at.left : V;
    const uint8_t* from = byte(at.row, at.column);
    uint32_t word = uint32_t{load_global(from)} >> shift;
    if (shift + here > 8) word |= uint32_t{load_global(from + 1)} << (8 - shift);
    if (here < V) word = (word & ((1u << here) - 1)) | uint32_t{load_global(byte(at.row + 1, 0))} << here;
    return word;
  }
};

// Arrays in shared memory, in the order of plan.cpp's shared_bytes: the map's elements first, then what is per channel.
struct Arrays {
  int scratch_offset;
  Shared<float> scratch;    // [scratch, threads]
  Shared<float> sums;       // [sums, channels_here]
  Shared<float> heads;      // the same, of accesses that began in the row before; channels first
  Shared<float> a, t, k;    // [channels_here] coefficients: y = a x + t, dx = a v + k
  Shared<float> in, out;    // [channels_own] or twice: m and z forward, dz and dm backward
  Shared<float> exchange;   // first layer's part of this block
  Shared<float> hidden;     // and its sum
  Shared<uint32_t> ticket;  // [2]
  Shared<float> drop;       // [2]

  ATTNKERN_DEVICE Arrays(const Inputs& p, const Plan& plan) {
    SharedArena arena{plan.held_bytes};
    const int own = plan.channels_own * (p.sizes.width > p.sizes.channels ? 2 : 1);
    scratch_offset = arena.offset;
    scratch = arena.take<float>(plan.scratch * plan.threads);
    sums = arena.take<float>(plan.sums * plan.channels_here);
    heads = p.layout == Layout::channels_last ? sums : arena.take<float>(plan.sums * plan.channels_here);
    a = arena.take<float>(plan.channels_here);
    t = arena.take<float>(plan.channels_here);
    k = plan.sums == 1 ? a : arena.take<float>(plan.channels_here);  // backward's alone
    in = arena.take<float>(own);
    out = arena.take<float>(own);
    exchange = arena.take<float>(plan.exchange);
    hidden = arena.take<float>(plan.hidden);
    ticket = arena.take<uint32_t>(2);
    drop = arena.take<float>(2);
  }
};

}  // namespace attnkern::squeeze_excite
