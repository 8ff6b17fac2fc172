"""Device functions over feature maps, shared by the forward and backward Triton kernels.

A map of B samples is rows of adjacent elements with free strides: channels first a row is one
channel's L positions, channels last one position's C channels.  A tile is [ROWS, COLS] of one
sample.  b, c, l: sample, channel, position.  All offsets are int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnkern._triton.activation import gate_value
from attnkern._triton.product import sum_rows_of_tile


@triton.jit
def tiles(size, BLOCK: tl.constexpr):
    """ceil(size / BLOCK) that cannot overflow."""
    return (size - 1) // BLOCK + 1


@triton.jit
def per_channel(v, CHANNELS_LAST: tl.constexpr):
    """v [C] as a column or row of the tile."""
    return v[None, :] if CHANNELS_LAST else v[:, None]


@triton.jit
def over_positions(v, CHANNELS_LAST: tl.constexpr):
    """Sum of the tile v over positions: [C] of the tile."""
    return sum_rows_of_tile(v) if CHANNELS_LAST else tl.sum(v, axis=1)


@triton.jit
def locate(pid, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Sample, first row and first column of tile ``pid``, columns fastest."""
    row_tiles = tiles(rows, ROWS)
    col_tiles = tiles(cols, COLS)
    b = pid // (row_tiles * col_tiles)
    tile = pid % (row_tiles * col_tiles)
    row0 = (tile // col_tiles).to(tl.int64) * ROWS
    return b.to(tl.int64), row0, (tile % col_tiles).to(tl.int64) * COLS


@triton.jit
def pack(mask, bits, b, row0, col0, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Store the tile of bits, eight columns a byte, least significant bit first."""
    row = row0 + tl.arange(0, ROWS).to(tl.int64)
    byte = col0 // 8 + tl.arange(0, COLS // 8).to(tl.int64)
    stride = tiles(cols, 8)
    shifts = tl.arange(0, 8)[None, None, :]
    packed = tl.sum(tl.reshape(bits.to(tl.int32), [ROWS, COLS // 8, 8]) << shifts, axis=2)
    tl.store(
        mask + (b * rows + row)[:, None] * stride + byte[None, :],
        packed.to(tl.uint8),
        mask=(row < rows)[:, None] & (byte < stride)[None, :],
    )


@triton.jit
def unpack(mask, b, row0, col0, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The tile of bits that `pack` stored."""
    row = row0 + tl.arange(0, ROWS).to(tl.int64)
    byte = col0 // 8 + tl.arange(0, COLS // 8).to(tl.int64)
    stride = tiles(cols, 8)
    packed = tl.load(
        mask + (b * rows + row)[:, None] * stride + byte[None, :],
        mask=(row < rows)[:, None] & (byte < stride)[None, :],
        other=0,
    )
    bits = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, [ROWS, COLS]) != 0


@triton.jit
def coefficients(
    z,
    shift,
    factor,
    gate_slope,
    gate_offset,
    GATE: tl.constexpr,
    APPLY: tl.constexpr,
):
    """factor * s and factor * t from the logits; factor = gain * d."""
    g = gate_value(z, gate_slope, gate_offset, GATE)
    if APPLY == "scale":
        s, t = g, g * 0.0
    elif APPLY == "scale1p":
        s, t = 1.0 + g, g * 0.0
    elif APPLY == "scale_shift":
        s, t = g, shift
    else:
        tl.static_assert(APPLY == "shift")
        s, t = tl.full(g.shape, 1.0, tl.float32), g
    return s * factor, t * factor


@triton.jit
def load_logits(logits, b, c, channels, APPLY: tl.constexpr):
    """z[:C] and z[C:] of the sample; the second is z[:C] again unless ``APPLY`` shifts by it."""
    if APPLY == "scale_shift":
        at = b * channels * 2 + c
        z = tl.load(logits + at, mask=c < channels, other=0.0)
        shift = tl.load(logits + (at + channels), mask=c < channels, other=0.0)
    else:
        z = tl.load(logits + b * channels + c, mask=c < channels, other=0.0)
        shift = z
    return z, shift


@triton.jit
def branch_factor(drop_path, b, gain):
    """gain * d."""
    return gain if drop_path is None else gain * tl.load(drop_path + b)


@triton.jit
def pre_activation(x, s, t, residual, offsets, valid, APPLY: tl.constexpr):
    """u = residual + s x + t on a tile, s and t with gain and d."""
    u = s * x
    if APPLY == "scale_shift" or APPLY == "shift":
        u += t
    if residual is not None:
        u += tl.load(residual + offsets, mask=valid, other=0.0).to(tl.float32)
    return u
