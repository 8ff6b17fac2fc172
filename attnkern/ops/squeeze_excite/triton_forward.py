"""Forward Triton kernels of squeeze_excite over feature maps; legend in triton_maps.py."""

from __future__ import annotations

import triton
import triton.language as tl

from attnkern._triton.activation import activation, activation_grad
from attnkern.ops.squeeze_excite.triton_maps import (
    branch_factor,
    coefficients,
    load_logits,
    locate,
    over_positions,
    pack,
    per_channel,
    pre_activation,
    tiles,
)


@triton.jit
def pool(
    x,
    b,
    c,
    first,
    last,
    channels,
    length,
    x_batch,
    x_row,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Sum of x over positions [first, last), for the channels c of a tile."""
    POSITIONS: tl.constexpr = ROWS if CHANNELS_LAST else COLS
    rows = length if CHANNELS_LAST else channels
    cols = channels if CHANNELS_LAST else length
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for l0 in range(first, last, POSITIONS):
        position = l0 + tl.arange(0, POSITIONS).to(tl.int64)
        row = position if CHANNELS_LAST else c
        col = c if CHANNELS_LAST else position
        valid = (row < rows)[:, None] & (col < cols)[None, :]
        offsets = b * x_batch + row[:, None] * x_row + col[None, :]
        acc += tl.load(x + offsets, mask=valid, other=0.0).to(tl.float32)
    return over_positions(acc, CHANNELS_LAST)


@triton.jit(do_not_specialize=["batch", "chunk", "divisor"])
def pool_kernel(
    x,
    partial,
    batch,
    channels,
    length,
    x_batch,
    x_row,
    chunk,
    divisor,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """
    Computes  partial[split] = sum of x over the split's positions / divisor
    Layout    x as above, partial [splits, B, C] float32; a split is ``chunk`` positions
    Mapping   a program owns one sample's ROWS (channels last: COLS) channels and one split
    Traffic   x once: the floor
    Numerics  float32, a tile of running sums, then a tree; fixed order
    """
    CHANNELS: tl.constexpr = COLS if CHANNELS_LAST else ROWS
    blocks = tiles(channels, CHANNELS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    split = tl.program_id(1).to(tl.int64)
    first = split * chunk
    last = tl.minimum(first + chunk, length)
    total = (
        pool(x, b, c, first, last, channels, length, x_batch, x_row, CHANNELS_LAST, ROWS, COLS)
        / divisor
    )
    tl.store(partial + (split * batch + b) * channels + c, total, mask=c < channels)


@triton.jit
def rescale(
    b,
    row0,
    col0,
    x,
    residual,
    logits,
    drop_path,
    y,
    mask,
    channels,
    length,
    x_batch,
    x_row,
    residual_batch,
    residual_row,
    y_batch,
    y_row,
    gain,
    gate_slope,
    gate_offset,
    CHANNELS_LAST: tl.constexpr,
    GATE: tl.constexpr,
    APPLY: tl.constexpr,
    OUT_ACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """rescale_kernel's work on the tile at row0, col0 of sample b."""
    rows = length if CHANNELS_LAST else channels
    cols = channels if CHANNELS_LAST else length
    row = row0 + tl.arange(0, ROWS).to(tl.int64)
    col = col0 + tl.arange(0, COLS).to(tl.int64)
    valid = (row < rows)[:, None] & (col < cols)[None, :]
    c = col if CHANNELS_LAST else row
    z, shift = load_logits(logits, b, c, channels, APPLY)
    factor = branch_factor(drop_path, b, gain)
    s, t = coefficients(z, shift, factor, gate_slope, gate_offset, GATE, APPLY)
    offsets = b * x_batch + row[:, None] * x_row + col[None, :]
    u = pre_activation(
        tl.load(x + offsets, mask=valid, other=0.0, eviction_policy="evict_first").to(tl.float32),
        per_channel(s, CHANNELS_LAST),
        per_channel(t, CHANNELS_LAST),
        residual,
        b * residual_batch + row[:, None] * residual_row + col[None, :],
        valid,
        APPLY,
    )
    if mask is not None:
        one = tl.full([ROWS, COLS], 1.0, tl.float32)
        bits = (activation_grad(one, u, 0.0, OUT_ACT) != 0) & valid
        pack(mask, bits, b, row0, col0, rows, cols, ROWS, COLS)
    out = activation(u, 0.0, OUT_ACT).to(y.dtype.element_ty)
    tl.store(y + b * y_batch + row[:, None] * y_row + col[None, :], out, mask=valid)


@triton.jit
def rescale_kernel(
    x,
    residual,
    logits,
    drop_path,
    y,
    mask,
    channels,
    length,
    x_batch,
    x_row,
    residual_batch,
    residual_row,
    y_batch,
    y_row,
    gain,
    gate_slope,
    gate_offset,
    CHANNELS_LAST: tl.constexpr,
    GATE: tl.constexpr,
    APPLY: tl.constexpr,
    OUT_ACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """
    Computes  y = out_act(residual + d gain (s x + t)), and the mask of out_act'
    Layout    maps as above, logits [B, C or 2C] float32, mask [rows, ceil(cols / 8)] bytes
    Mapping   a program owns one tile; the last tiles run first
    Traffic   x, residual once, y once; the end of x is still in L2 from the pool that precedes
    Numerics  float32, elementwise: the tile's size does not change a bit
    """
    rows = length if CHANNELS_LAST else channels
    cols = channels if CHANNELS_LAST else length
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    b, row0, col0 = locate(pid, rows, cols, ROWS, COLS)
    rescale(
        b, row0, col0, x, residual, logits, drop_path, y, mask, channels, length, x_batch, x_row,
        residual_batch, residual_row, y_batch, y_row, gain, gate_slope, gate_offset,
        CHANNELS_LAST, GATE, APPLY, OUT_ACT, ROWS, COLS,
    )  # fmt: skip
