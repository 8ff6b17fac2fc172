"""Triton kernels of squeeze_excite that touch feature maps; triton.py launches them.

A map of B samples is rows of adjacent elements with free strides: channels first a row is one
channel's L positions, channels last one position's C channels.  A tile is [ROWS, COLS] of one
sample.  b, c, l: sample, channel, position.  All offsets are int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnkern._triton.activation import activation, activation_grad, gate_grad, gate_value


@triton.jit
def _tiles(size, BLOCK: tl.constexpr):
    """ceil(size / BLOCK) that cannot overflow."""
    return (size - 1) // BLOCK + 1


@triton.jit
def _per_channel(v, CHANNELS_LAST: tl.constexpr):
    """v [C] as a column or row of the tile."""
    return v[None, :] if CHANNELS_LAST else v[:, None]


@triton.jit
def _over_positions(v, CHANNELS_LAST: tl.constexpr):
    """Sum of the tile v over positions: [C] of the tile."""
    if CHANNELS_LAST:
        # two levels: free on a GPU (same registers and barriers), while the interpreter's numpy
        # adds 256 rows one by one, with 3 times the error of a tree
        GROUPS: tl.constexpr = 16 if v.shape[0] >= 16 else 1
        grouped = tl.reshape(v, [GROUPS, v.shape[0] // GROUPS, v.shape[1]])
        out = tl.sum(tl.sum(grouped, axis=0), axis=0)
    else:
        out = tl.sum(v, axis=1)
    return out


@triton.jit
def _locate(pid, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Sample, first row and first column of tile ``pid``, columns fastest."""
    row_tiles = _tiles(rows, ROWS)
    col_tiles = _tiles(cols, COLS)
    b = pid // (row_tiles * col_tiles)
    tile = pid % (row_tiles * col_tiles)
    row0 = (tile // col_tiles).to(tl.int64) * ROWS
    return b.to(tl.int64), row0, (tile % col_tiles).to(tl.int64) * COLS


@triton.jit
def _pack(mask, bits, b, row0, col0, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Store the tile of bits, eight columns a byte, least significant bit first."""
    row = row0 + tl.arange(0, ROWS)
    byte = col0 // 8 + tl.arange(0, COLS // 8)
    stride = _tiles(cols, 8)
    shifts = tl.arange(0, 8)[None, None, :]
    packed = tl.sum(tl.reshape(bits.to(tl.int32), [ROWS, COLS // 8, 8]) << shifts, axis=2)
    tl.store(
        mask + (b * rows + row)[:, None] * stride + byte[None, :],
        packed.to(tl.uint8),
        mask=(row < rows)[:, None] & (byte < stride)[None, :],
    )


@triton.jit
def _unpack(mask, b, row0, col0, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The tile of bits that `_pack` stored."""
    row = row0 + tl.arange(0, ROWS)
    byte = col0 // 8 + tl.arange(0, COLS // 8)
    stride = _tiles(cols, 8)
    packed = tl.load(
        mask + (b * rows + row)[:, None] * stride + byte[None, :],
        mask=(row < rows)[:, None] & (byte < stride)[None, :],
        other=0,
    )
    bits = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, [ROWS, COLS]) != 0


@triton.jit
def _coefficients(
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
def _load_logits(logits, b, c, channels, APPLY: tl.constexpr):
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
def _branch_factor(drop_path, b, gain):
    """gain * d."""
    return gain if drop_path is None else gain * tl.load(drop_path + b)


@triton.jit
def _pre_activation(x, s, t, residual, offsets, valid, APPLY: tl.constexpr):
    """u = residual + s x + t on a tile, s and t with gain and d."""
    u = s * x
    if APPLY == "scale_shift" or APPLY == "shift":
        u += t
    if residual is not None:
        u += tl.load(residual + offsets, mask=valid, other=0.0).to(tl.float32)
    return u


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
    POSITIONS: tl.constexpr = ROWS if CHANNELS_LAST else COLS
    rows = length if CHANNELS_LAST else channels
    cols = channels if CHANNELS_LAST else length
    blocks = _tiles(channels, CHANNELS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    split = tl.program_id(1).to(tl.int64)
    first = split * chunk
    last = tl.minimum(first + chunk, length)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for l0 in range(first, last, POSITIONS):
        position = l0 + tl.arange(0, POSITIONS).to(tl.int64)
        row = position if CHANNELS_LAST else c
        col = c if CHANNELS_LAST else position
        valid = (row < rows)[:, None] & (col < cols)[None, :]
        offsets = b * x_batch + row[:, None] * x_row + col[None, :]
        acc += tl.load(x + offsets, mask=valid, other=0.0).to(tl.float32)
    total = _over_positions(acc, CHANNELS_LAST) / divisor
    tl.store(partial + (split * batch + b) * channels + c, total, mask=c < channels)


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
    b, row0, col0 = _locate(pid, rows, cols, ROWS, COLS)
    row = row0 + tl.arange(0, ROWS)
    col = col0 + tl.arange(0, COLS)
    valid = (row < rows)[:, None] & (col < cols)[None, :]
    c = col if CHANNELS_LAST else row
    z, shift = _load_logits(logits, b, c, channels, APPLY)
    factor = _branch_factor(drop_path, b, gain)
    s, t = _coefficients(z, shift, factor, gate_slope, gate_offset, GATE, APPLY)
    offsets = b * x_batch + row[:, None] * x_row + col[None, :]
    u = _pre_activation(
        tl.load(x + offsets, mask=valid, other=0.0, eviction_policy="evict_first").to(tl.float32),
        _per_channel(s, CHANNELS_LAST),
        _per_channel(t, CHANNELS_LAST),
        residual,
        b * residual_batch + row[:, None] * residual_row + col[None, :],
        valid,
        APPLY,
    )
    if mask is not None:
        one = tl.full([ROWS, COLS], 1.0, tl.float32)
        bits = (activation_grad(one, u, 0.0, OUT_ACT) != 0) & valid
        _pack(mask, bits, b, row0, col0, rows, cols, ROWS, COLS)
    out = activation(u, 0.0, OUT_ACT).to(y.dtype.element_ty)
    tl.store(y + b * y_batch + row[:, None] * y_row + col[None, :], out, mask=valid)


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
    POSITIONS: tl.constexpr = ROWS if CHANNELS_LAST else COLS
    SHIFTED: tl.constexpr = APPLY == "scale_shift" or APPLY == "shift"
    rows = length if CHANNELS_LAST else channels
    cols = channels if CHANNELS_LAST else length
    blocks = _tiles(channels, CHANNELS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    c0 = (tl.program_id(0) % blocks).to(tl.int64) * CHANNELS
    c = c0 + tl.arange(0, CHANNELS)
    split = tl.program_id(1).to(tl.int64)
    first = split * chunk
    last = tl.minimum(first + chunk, length)
    z, shift = _load_logits(logits, b, c, channels, APPLY)
    factor = _branch_factor(drop_path, b, gain)
    s, t = _coefficients(z, shift, factor, gate_slope, gate_offset, GATE, APPLY)
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
            v = tl.where(_unpack(mask, b, row0, col0, rows, cols, ROWS, COLS), v, 0.0)
        elif OUT_ACT != "identity":
            u = _pre_activation(
                x_tile,
                _per_channel(s, CHANNELS_LAST),
                _per_channel(t, CHANNELS_LAST),
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
    at = (split * (1 + SHIFTED) * batch + b) * channels + c
    tl.store(partial + at, _over_positions(sum_vx, CHANNELS_LAST), mask=c < channels)
    if SHIFTED:
        at = ((split * 2 + 1) * batch + b) * channels + c
        tl.store(partial + at, _over_positions(sum_v, CHANNELS_LAST), mask=c < channels)


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
    SHIFTED: tl.constexpr = APPLY == "scale_shift" or APPLY == "shift"
    b = tl.program_id(0).to(tl.int64)
    factor = _branch_factor(drop_path, b, gain)
    ddrop = tl.zeros([BLOCK_C], tl.float32)
    for c0 in range(0, channels, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
        sum_vx = tl.load(sums + b * channels + c, mask=c < channels, other=0.0)
        z, shift = _load_logits(logits, b, c, channels, APPLY)
        s, t = _coefficients(z, shift, gain, gate_slope, gate_offset, GATE, APPLY)
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
    b, row0, col0 = _locate(pid, rows, cols, ROWS, COLS)
    row = row0 + tl.arange(0, ROWS)
    col = col0 + tl.arange(0, COLS)
    valid = (row < rows)[:, None] & (col < cols)[None, :]
    c = col if CHANNELS_LAST else row
    z, shift = _load_logits(logits, b, c, channels, APPLY)
    factor = _branch_factor(drop_path, b, gain)
    s, t = _coefficients(z, shift, factor, gate_slope, gate_offset, GATE, APPLY)
    v = tl.load(
        dy + b * dy_batch + row[:, None] * dy_row + col[None, :],
        mask=valid,
        other=0.0,
        eviction_policy="evict_first",
    ).to(tl.float32)
    if mask is not None:
        v = tl.where(_unpack(mask, b, row0, col0, rows, cols, ROWS, COLS), v, 0.0)
    elif OUT_ACT != "identity":
        offsets = b * x_batch + row[:, None] * x_row + col[None, :]
        u = _pre_activation(
            tl.load(x + offsets, mask=valid, other=0.0).to(tl.float32),
            _per_channel(s, CHANNELS_LAST),
            _per_channel(t, CHANNELS_LAST),
            residual,
            b * residual_batch + row[:, None] * residual_row + col[None, :],
            valid,
            APPLY,
        )
        v = activation_grad(v, u, 0.0, OUT_ACT)
    grad = v * _per_channel(s, CHANNELS_LAST)
    if dmean is not None:
        dm = tl.load(dmean + b * channels + c, mask=c < channels, other=0.0) / length
        grad += _per_channel(dm, CHANNELS_LAST)
    out = grad.to(dx.dtype.element_ty)
    tl.store(dx + b * dx_batch + row[:, None] * dx_row + col[None, :], out, mask=valid)
