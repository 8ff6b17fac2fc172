"""Backward Triton kernels of squeeze_excite over feature maps; legend in triton_maps.py."""

from __future__ import annotations

import triton
import triton.language as tl

from attnkern._triton.activation import activation_grad, gate_grad
from attnkern.ops.squeeze_excite.triton_maps import (
    branch_factor,
    coefficients,
    load_logits,
    locate,
    over_positions,
    per_channel,
    pre_activation,
    tiles,
    unpack,
)


@triton.jit
def reduce(
    b,
    c0,
    first,
    last,
    dy,
    x,
    residual,
    logits,
    drop_path,
    mask,
    dresidual,
    channels,
    length,
    dy_batch,
    dy_row,
    x_batch,
    x_row,
    residual_batch,
    residual_row,
    dresidual_batch,
    dresidual_row,
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
    """sum v x, and sum v if SHIFTED, over positions [first, last), for the channels at c0."""
    CHANNELS: tl.constexpr = COLS if CHANNELS_LAST else ROWS
    POSITIONS: tl.constexpr = ROWS if CHANNELS_LAST else COLS
    SHIFTED: tl.constexpr = APPLY == "scale_shift" or APPLY == "shift"
    rows = length if CHANNELS_LAST else channels
    cols = channels if CHANNELS_LAST else length
    c = c0 + tl.arange(0, CHANNELS).to(tl.int64)
    z, shift = load_logits(logits, b, c, channels, APPLY)
    factor = branch_factor(drop_path, b, gain)
    s, t = coefficients(z, shift, factor, gate_slope, gate_offset, GATE, APPLY)
    sum_vx = tl.zeros([ROWS, COLS], tl.float32)
    sum_v = tl.zeros([ROWS, COLS], tl.float32)
    for l0 in range(first, last, POSITIONS):
        position = l0 + tl.arange(0, POSITIONS).to(tl.int64)
        row = position if CHANNELS_LAST else c
        col = c if CHANNELS_LAST else position
        valid = (row < rows)[:, None] & (col < cols)[None, :]
        x_tile = tl.load(
            x + b * x_batch + row[:, None] * x_row + col[None, :], mask=valid, other=0.0
        ).to(tl.float32)
        v = tl.load(
            dy + b * dy_batch + row[:, None] * dy_row + col[None, :], mask=valid, other=0.0
        ).to(tl.float32)
        if mask is not None:
            row0 = l0 if CHANNELS_LAST else c0
            col0 = c0 if CHANNELS_LAST else l0
            v = tl.where(unpack(mask, b, row0, col0, rows, cols, ROWS, COLS), v, 0.0)
        elif OUT_ACT != "identity":
            u = pre_activation(
                x_tile,
                per_channel(s, CHANNELS_LAST),
                per_channel(t, CHANNELS_LAST),
                residual,
                b * residual_batch + row[:, None] * residual_row + col[None, :],
                valid,
                APPLY,
            )
            v = activation_grad(v, u, 0.0, OUT_ACT)
        if dresidual is not None:
            tl.store(
                dresidual + b * dresidual_batch + row[:, None] * dresidual_row + col[None, :],
                v.to(dresidual.dtype.element_ty),
                mask=valid,
            )
        sum_vx += v * x_tile
        if SHIFTED:
            sum_v += v
    return over_positions(sum_vx, CHANNELS_LAST), over_positions(sum_v, CHANNELS_LAST)


@triton.jit(do_not_specialize=["batch", "chunk"])
def reduce_kernel(
    dy,
    x,
    residual,
    logits,
    drop_path,
    mask,
    dresidual,
    partial,
    batch,
    channels,
    length,
    dy_batch,
    dy_row,
    x_batch,
    x_row,
    residual_batch,
    residual_row,
    dresidual_batch,
    dresidual_row,
    chunk,
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
    Computes  v = dy out_act'(u), partial[split] = (sum v x, and sum v if SHIFTED), dresidual = v
    Layout    maps as above, partial [splits, 1 + SHIFTED, B, C] float32
    Mapping   a program owns one sample's ROWS (channels last: COLS) channels and one split
    Traffic   dy, x (and residual where out_act' needs u, or one bit an element) once
    Numerics  float32, a tile of running sums, then a tree; fixed order
    """
    CHANNELS: tl.constexpr = COLS if CHANNELS_LAST else ROWS
    SHIFTED: tl.constexpr = APPLY == "scale_shift" or APPLY == "shift"
    blocks = tiles(channels, CHANNELS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    c0 = (tl.program_id(0) % blocks).to(tl.int64) * CHANNELS
    c = c0 + tl.arange(0, CHANNELS)
    split = tl.program_id(1).to(tl.int64)
    first = split * chunk
    last = tl.minimum(first + chunk, length)
    sum_vx, sum_v = reduce(
        b, c0, first, last, dy, x, residual, logits, drop_path, mask, dresidual, channels,
        length, dy_batch, dy_row, x_batch, x_row, residual_batch, residual_row, dresidual_batch,
        dresidual_row, gain, gate_slope, gate_offset, CHANNELS_LAST, GATE, APPLY, OUT_ACT, ROWS,
        COLS,
    )  # fmt: skip
    at = (split * (1 + SHIFTED) * batch + b) * channels + c
    tl.store(partial + at, sum_vx, mask=c < channels)
    if SHIFTED:
        at = ((split * 2 + 1) * batch + b) * channels + c
        tl.store(partial + at, sum_v, mask=c < channels)


@triton.jit
def logits_grad(
    b,
    sums,
    logits,
    dlogits,
    drop_path,
    dz,
    ddrop_path,
    batch,
    channels,
    gain,
    gate_slope,
    gate_offset,
    GATE: tl.constexpr,
    APPLY: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """logits_grad_kernel's work on sample b."""
    SHIFTED: tl.constexpr = APPLY == "scale_shift" or APPLY == "shift"
    factor = branch_factor(drop_path, b, gain)
    ddrop = tl.zeros([BLOCK_C], tl.float32)
    for c0 in range(0, channels, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
        sum_vx = tl.load(sums + b * channels + c, mask=c < channels, other=0.0)
        z, shift = load_logits(logits, b, c, channels, APPLY)
        s, t = coefficients(z, shift, gain, gate_slope, gate_offset, GATE, APPLY)
        branch = s * sum_vx
        sum_g = sum_vx
        if SHIFTED:
            sum_v = tl.load(sums + (b + batch) * channels + c, mask=c < channels, other=0.0)
            branch += t * sum_v
            sum_g = sum_v if APPLY == "shift" else sum_vx
        ddrop += tl.where(c < channels, branch, 0.0)
        grad = gate_grad(factor * sum_g, z, gate_slope, gate_offset, GATE)
        at = b * channels + c
        if APPLY == "scale_shift":
            at += b * channels
            shift_grad = factor * sum_v
            if dlogits is not None:
                shift_grad += tl.load(dlogits + (at + channels), mask=c < channels, other=0.0)
            tl.store(dz + (at + channels), shift_grad, mask=c < channels)
        if dlogits is not None:
            grad += tl.load(dlogits + at, mask=c < channels, other=0.0)
        tl.store(dz + at, grad, mask=c < channels)
    if ddrop_path is not None:
        tl.store(ddrop_path + b, tl.sum(ddrop, axis=0))


@triton.jit(do_not_specialize=["batch"])
def logits_grad_kernel(
    sums,
    logits,
    dlogits,
    drop_path,
    dz,
    ddrop_path,
    batch,
    channels,
    gain,
    gate_slope,
    gate_offset,
    GATE: tl.constexpr,
    APPLY: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """
    Computes  dz = gate'(z) gain d sum v x (sum v where the gate shifts) + dlogits, and
              dd = gain sum_c (s sum v x + t sum v)
    Layout    sums as reduce_kernel's, merged; logits, dlogits and dz [B, C or 2C]; dd [B]
    Mapping   a program owns one sample
    Traffic   [B, C] only
    Numerics  float32, fixed order
    """
    logits_grad(
        tl.program_id(0).to(tl.int64), sums, logits, dlogits, drop_path, dz, ddrop_path, batch,
        channels, gain, gate_slope, gate_offset, GATE, APPLY, BLOCK_C,
    )  # fmt: skip


@triton.jit
def apply_grad(
    b,
    row0,
    col0,
    dy,
    x,
    residual,
    logits,
    drop_path,
    mask,
    dmean,
    dx,
    channels,
    length,
    dy_batch,
    dy_row,
    x_batch,
    x_row,
    residual_batch,
    residual_row,
    dx_batch,
    dx_row,
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
    """apply_grad_kernel's work on the tile at row0, col0 of sample b."""
    rows = length if CHANNELS_LAST else channels
    cols = channels if CHANNELS_LAST else length
    row = row0 + tl.arange(0, ROWS).to(tl.int64)
    col = col0 + tl.arange(0, COLS).to(tl.int64)
    valid = (row < rows)[:, None] & (col < cols)[None, :]
    c = col if CHANNELS_LAST else row
    z, shift = load_logits(logits, b, c, channels, APPLY)
    factor = branch_factor(drop_path, b, gain)
    s, t = coefficients(z, shift, factor, gate_slope, gate_offset, GATE, APPLY)
    v = tl.load(
        dy + b * dy_batch + row[:, None] * dy_row + col[None, :],
        mask=valid,
        other=0.0,
        eviction_policy="evict_first",
    ).to(tl.float32)
    if mask is not None:
        v = tl.where(unpack(mask, b, row0, col0, rows, cols, ROWS, COLS), v, 0.0)
    elif OUT_ACT != "identity":
        offsets = b * x_batch + row[:, None] * x_row + col[None, :]
        u = pre_activation(
            tl.load(x + offsets, mask=valid, other=0.0).to(tl.float32),
            per_channel(s, CHANNELS_LAST),
            per_channel(t, CHANNELS_LAST),
            residual,
            b * residual_batch + row[:, None] * residual_row + col[None, :],
            valid,
            APPLY,
        )
        v = activation_grad(v, u, 0.0, OUT_ACT)
    grad = v * per_channel(s, CHANNELS_LAST)
    if dmean is not None:
        dm = tl.load(dmean + b * channels + c, mask=c < channels, other=0.0) / length
        grad += per_channel(dm, CHANNELS_LAST)
    out = grad.to(dx.dtype.element_ty)
    tl.store(dx + b * dx_batch + row[:, None] * dx_row + col[None, :], out, mask=valid)


@triton.jit
def apply_grad_kernel(
    dy,
    x,
    residual,
    logits,
    drop_path,
    mask,
    dmean,
    dx,
    channels,
    length,
    dy_batch,
    dy_row,
    x_batch,
    x_row,
    residual_batch,
    residual_row,
    dx_batch,
    dx_row,
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
    Computes  dx = d gain s v + dm / L, v = dy out_act'(u)
    Layout    maps as above, dm [B, C] float32 or None
    Mapping   a program owns one tile; the last tiles run first
    Traffic   dy (and x, residual where out_act' needs u, or one bit an element) once, dx once
    Numerics  float32, elementwise: the tile's size does not change a bit
    """
    rows = length if CHANNELS_LAST else channels
    cols = channels if CHANNELS_LAST else length
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    b, row0, col0 = locate(pid, rows, cols, ROWS, COLS)
    apply_grad(
        b, row0, col0, dy, x, residual, logits, drop_path, mask, dmean, dx, channels, length,
        dy_batch, dy_row, x_batch, x_row, residual_batch, residual_row, dx_batch, dx_row, gain,
        gate_slope, gate_offset, CHANNELS_LAST, GATE, APPLY, OUT_ACT, ROWS, COLS,
    )  # fmt: skip
