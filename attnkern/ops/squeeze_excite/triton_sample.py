"""Triton kernels of squeeze_excite in one launch, a program a sample; legend in triton_maps.py.

They walk the tiles of the kernels they join, so the second read of a sample finds it in the L1 or
L2 cache.  Holding it in registers instead was worthless: at 64 elements a thread ptxas spilled 104
to 600 bytes, at 32 (16384 elements for 16 warps) still up to 88.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnkern._triton.linear import linear_sample
from attnkern.ops.squeeze_excite.triton_backward import apply_grad, logits_grad, reduce
from attnkern.ops.squeeze_excite.triton_forward import pool, rescale


@triton.jit(do_not_specialize=["hidden_size", "logits_size", "slope_stride"])
def sample_fwd_kernel(
    x,
    src,
    w1,
    b1,
    w2,
    b2,
    slopes,
    residual,
    drop_path,
    y,
    mean,
    hidden,
    logits,
    mask,
    channels,
    length,
    hidden_size,
    logits_size,
    x_batch,
    x_row,
    residual_batch,
    residual_row,
    y_batch,
    y_row,
    slope,
    slope_stride,
    gain,
    gate_slope,
    gate_offset,
    CHANNELS_LAST: tl.constexpr,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    APPLY: tl.constexpr,
    OUT_ACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """
    Computes  m = mean of x (or src), h = W1 m + b1, z = W2 act(h) + b2, y = out_act(residual +
              d gain (s x + t)), and the mask of out_act'
    Layout    maps as above; m, h, z [B, C], [B, R], [B, C or 2C] float32, kept for backward
    Mapping   a program owns one sample and walks its tiles twice
    Traffic   x, residual once, y once: the floor while the sample stays cached; W1, W2 from L2
    Numerics  float32, fixed order; m, h, z pass between threads in memory, at a barrier each
    """
    CHANNELS: tl.constexpr = COLS if CHANNELS_LAST else ROWS
    rows = length if CHANNELS_LAST else channels
    cols = channels if CHANNELS_LAST else length
    b = tl.program_id(0).to(tl.int64)
    v = src
    if src is None:
        v = mean
        for c0 in range(0, channels, CHANNELS):
            c = c0 + tl.arange(0, CHANNELS).to(tl.int64)
            total = pool(
                x, b, c, 0, length, channels, length, x_batch, x_row, CHANNELS_LAST, ROWS, COLS
            )
            tl.store(mean + b * channels + c, total / length, mask=c < channels)
        tl.debug_barrier()
    if w2 is not None:
        linear_sample(
            b, v, w1, b1, None, None, hidden, None, channels, hidden_size,
            0.0, 0, False, "identity", BLOCK // BLOCK_C, BLOCK_C,
        )  # fmt: skip
        linear_sample(
            b, hidden, w2, b2, slopes, None, logits, None, hidden_size, logits_size,
            slope, slope_stride, False, ACT, BLOCK // BLOCK_R, BLOCK_R,
        )  # fmt: skip
    else:
        linear_sample(
            b, v, w1, b1, None, None, logits, None, channels, logits_size,
            0.0, 0, False, "identity", BLOCK // BLOCK_C, BLOCK_C,
        )  # fmt: skip
    for row0 in range(0, rows, ROWS):
        for col0 in range(0, cols, COLS):
            rescale(
                b, row0, col0, x, residual, logits, drop_path, y, mask, channels, length,
                x_batch, x_row, residual_batch, residual_row, y_batch, y_row, gain, gate_slope,
                gate_offset, CHANNELS_LAST, GATE, APPLY, OUT_ACT, ROWS, COLS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "hidden_size", "logits_size", "slope_stride"])
def sample_bwd_kernel(
    dy,
    x,
    w1,
    w2,
    slopes,
    residual,
    drop_path,
    hidden,
    logits,
    dlogits,
    mask,
    sums,
    dx,
    dresidual,
    ddrop_path,
    dz,
    dhidden,
    dmean,
    slope_terms,
    batch,
    channels,
    length,
    hidden_size,
    logits_size,
    dy_batch,
    dy_row,
    x_batch,
    x_row,
    residual_batch,
    residual_row,
    dx_batch,
    dx_row,
    dresidual_batch,
    dresidual_row,
    slope,
    slope_stride,
    gain,
    gate_slope,
    gate_offset,
    POOLED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    APPLY: tl.constexpr,
    OUT_ACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):
    """
    Computes  v = dy out_act'(u), sum v x (and sum v), dz, dh, dm, dx = d gain s v + dm / L;
              the weights' gradients are left to weight_grad_kernel
    Layout    maps as above; sums [1 or 2, B, C], dz, dh, dm float32 like z, h, m
    Mapping   a program owns one sample and walks its tiles twice
    Traffic   dy, x (residual, or one bit an element) once, dx once while the sample stays cached
    Numerics  float32, fixed order; sums, dz, dh, dm pass between threads in memory
    """
    CHANNELS: tl.constexpr = COLS if CHANNELS_LAST else ROWS
    rows = length if CHANNELS_LAST else channels
    cols = channels if CHANNELS_LAST else length
    b = tl.program_id(0).to(tl.int64)
    for c0 in range(0, channels, CHANNELS):
        sum_vx, sum_v = reduce(
            b, c0, 0, length, dy, x, residual, logits, drop_path, mask, dresidual, channels, length,
            dy_batch, dy_row, x_batch, x_row, residual_batch, residual_row, dresidual_batch,
            dresidual_row, gain, gate_slope, gate_offset, CHANNELS_LAST, GATE, APPLY, OUT_ACT,
            ROWS, COLS,
        )  # fmt: skip
        c = c0 + tl.arange(0, CHANNELS).to(tl.int64)
        tl.store(sums + b * channels + c, sum_vx, mask=c < channels)
        if APPLY == "scale_shift" or APPLY == "shift":
            tl.store(sums + (b + batch) * channels + c, sum_v, mask=c < channels)
    tl.debug_barrier()
    logits_grad(
        b, sums, logits, dlogits, drop_path, dz, ddrop_path, batch, channels, gain, gate_slope,
        gate_offset, GATE, APPLY, BLOCK_Z,
    )  # fmt: skip
    tl.debug_barrier()
    if w2 is not None:
        linear_sample(
            b, dz, w2, None, slopes, hidden, dhidden, slope_terms, logits_size, hidden_size,
            slope, slope_stride, True, ACT, BLOCK // BLOCK_C, BLOCK_C,
        )  # fmt: skip
        if dmean is not None:
            linear_sample(
                b, dhidden, w1, None, None, None, dmean, None, hidden_size, channels,
                0.0, 0, True, "identity", BLOCK // BLOCK_R, BLOCK_R,
            )  # fmt: skip
    elif dmean is not None:
        linear_sample(
            b, dz, w1, None, None, None, dmean, None, logits_size, channels,
            0.0, 0, True, "identity", BLOCK // BLOCK_C, BLOCK_C,
        )  # fmt: skip
    if dx is not None:
        added = dmean if POOLED else None
        for row0 in range(0, rows, ROWS):
            for col0 in range(0, cols, COLS):
                if dresidual is not None:
                    apply_grad(
                        b, row0, col0, dresidual, x, None, logits, drop_path, None, added, dx,
                        channels, length, dresidual_batch, dresidual_row, x_batch, x_row, 0, 0,
                        dx_batch, dx_row, gain, gate_slope, gate_offset,
                        CHANNELS_LAST, GATE, APPLY, "identity", ROWS, COLS,
                    )  # fmt: skip
                else:
                    apply_grad(
                        b, row0, col0, dy, x, residual, logits, drop_path, mask, added, dx,
                        channels, length, dy_batch, dy_row, x_batch, x_row, residual_batch,
                        residual_row, dx_batch, dx_row, gain, gate_slope, gate_offset,
                        CHANNELS_LAST, GATE, APPLY, OUT_ACT, ROWS, COLS,
                    )  # fmt: skip
