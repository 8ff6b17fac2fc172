"""Backward Triton kernels of attention_gate over its maps; legend in triton_maps.py."""

from __future__ import annotations

import triton
import triton.language as tl

from attnkern._triton.activation import activation, sigmoid
from attnkern._triton.product import product_of_stored
from attnkern.ops.attention_gate.triton_maps import (
    UNSPECIALISED,
    hidden_grad,
    hidden_layer,
    load_hidden,
    load_tile,
    patches,
    place_in_patch,
    store_tile,
    weight_tile,
)


@triton.jit
def map_dot(
    d, x, at, inside, channels, d_channel, d_position, x_channel, x_position,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sum_c d x at positions ``at``: [BLOCK_P]."""
    acc = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for c0 in range(0, channels, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
        left = load_tile(d, c * d_channel, c < channels, at * d_position, inside)
        right = load_tile(x, c * x_channel, c < channels, at * x_position, inside)
        acc += left.to(tl.float32) * right.to(tl.float32)
    return tl.sum(acc, axis=0)


@triton.jit
def normed(dh, t, scale, k0, k1, valid, f, hidden):
    """dt = scale dh + k0 + k1 t, 0 outside; dh itself without a norm."""
    if scale is not None:
        moved = load_hidden(k0, f, hidden)[:, None] + load_hidden(k1, f, hidden)[:, None] * t
        dh = tl.where(valid, load_hidden(scale, f, hidden)[:, None] * dh + moved, 0.0)
    return dh


@triton.jit
def spread(
    dt, weight, inside, k, c0, hidden, channels,
    K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sum_f weight[f, c, k] dt[p, f] for channels c0 and on, 0 outside: [BLOCK_C, BLOCK_P]."""
    NEAREST: tl.constexpr = 0 if weight.dtype.element_ty == tl.float32 else 2
    acc = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for f0 in range(0, hidden, BLOCK_F):
        w = tl.load(weight_tile(weight, NEAREST, f0, k, c0, channels, K, BLOCK_F, BLOCK_C))
        tile = tl.load(hidden_tile(dt, f0, hidden, BLOCK_P, BLOCK_F))
        acc = product_of_stored(tl.trans(w), tile, acc)
    return tl.where(inside[None, :], acc, 0.0)


@triton.jit
def hidden_tile(dt, f0, hidden, BLOCK_P: tl.constexpr, BLOCK_F: tl.constexpr):
    """Pointers to [BLOCK_F, BLOCK_P] of a tile dt, whose F is padded to whole blocks."""
    wide = tl.cdiv(hidden, BLOCK_F) * tl.cast(BLOCK_F, tl.int64)
    f = f0 + tl.arange(0, BLOCK_F).to(tl.int64)
    return dt + f[:, None] + tl.arange(0, BLOCK_P).to(tl.int64)[None, :] * wide


@triton.jit(do_not_specialize=[*UNSPECIALISED, "start"])
def gate_bwd_kernel(
    d,
    dq,
    x,
    g,
    theta,
    phi,
    bias,
    psi,
    taps,
    tap_weights,
    q,
    theta_scale,
    theta_k0,
    theta_k1,
    phi_scale,
    phi_k0,
    phi_k1,
    dx,
    dg,
    dt_out,
    du_out,
    sums,
    start,
    tiles,
    length,
    hidden,
    channels,
    gating,
    q1,
    q2,
    q3,
    x2,
    x3,
    g2,
    g3,
    corners,
    x_batch,
    x_channel,
    x_position,
    g_batch,
    g_channel,
    g_position,
    d_batch,
    d_channel,
    d_position,
    dx_batch,
    dx_channel,
    dx_position,
    dg_batch,
    dg_channel,
    dg_position,
    slope,
    ACT: tl.constexpr,
    TARGET: tl.constexpr,
    APPLY: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    K3: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """
    Computes  v = dq + a (1 - a) sum_c d target (the sum where APPLY), a = sigmoid(q); dh = v psi act'(h); dt and du
              of it; dx = theta^T dt and dg = phi^T du, the target's beginning with a d (APPLY) or d;
              and over the program's patches the sums of dh, v act(h) and v
    Layout    x, g, d, dx, dg as maps; q, dq [B, L] float32; of the tiles from ``start`` on, dt, du
              [tiles, BLOCK_P, F] in x's dtype, F padded to whole blocks, sums [tiles, 2 F + 1] float32
    Mapping   a program owns a tile of patches: v, then dt and du by blocks of hidden channels, which pass
              in memory, at a barrier, to dx and dg by blocks of channels
    Traffic   x, g and d once from memory, dx and dg written; d and the target again, from L1 or L2, and x and g
              for each further block of hidden channels.  dt and du come back from L2 once a block of
              channels.  theta and phi from L2 twice a program
    Numerics  float32 sums in order; dt and du, and the theta and phi that they meet, rounded once, as eager's
    """
    pid = tl.program_id(0)
    b, first, n, at_x, inside = patches(
        start + pid, tiles, length, q2, q3, x2, x3, K1, K2, K3, BLOCK_P
    )
    wide = tl.cast(hidden, tl.int64)
    here = pid.to(tl.int64) * (BLOCK_P * BLOCK_F) * tl.cdiv(hidden, BLOCK_F)
    dt = dt_out + here
    du = dt if du_out is None else du_out + here
    of_q = b * length
    v = tl.zeros([BLOCK_P], tl.float32)
    if dq is not None:
        v += tl.load(dq + of_q + n, mask=inside, other=0.0)
    if APPLY:
        alpha = sigmoid(tl.load(q + of_q + n, mask=inside, other=0.0))
        if TARGET == "x":
            own = map_dot(
                d + b * d_batch, x + b * x_batch, n, inside, channels, d_channel, d_position,
                x_channel, x_position, BLOCK_P, BLOCK_C,
            )  # fmt: skip
        else:
            own = map_dot(
                d + b * d_batch, g + b * g_batch, n, inside, gating, d_channel, d_position,
                g_channel, g_position, BLOCK_P, BLOCK_C,
            )  # fmt: skip
        v += tl.where(inside, alpha * (1.0 - alpha) * own, 0.0)

    for f0 in range(0, hidden, BLOCK_F):
        f = f0 + tl.arange(0, BLOCK_F).to(tl.int64)
        in_f = f < hidden
        h, t, u = hidden_layer(
            x, g, theta, phi, bias, taps, tap_weights, theta_scale, phi_scale, b, first, n, at_x,
            inside, f0, hidden, channels, gating, q1, q2, q3, x2, x3, g2, g3,
            x_batch, x_channel, x_position, g_batch, g_channel, g_position, corners,
            K1, K2, K3, BLOCK_P, BLOCK_F, BLOCK_C,
        )  # fmt: skip
        valid = in_f[:, None] & inside[None, :]
        dh = tl.where(valid, hidden_grad(v, h, psi, slope, f, hidden, ACT), 0.0)
        of_t = normed(dh, t, theta_scale, theta_k0, theta_k1, valid, f, hidden)
        tl.store(hidden_tile(dt, f0, hidden, BLOCK_P, BLOCK_F), of_t.to(dt.dtype.element_ty))
        if du_out is not None:
            of_u = normed(dh, u, phi_scale, phi_k0, phi_k1, valid, f, hidden)
            tl.store(hidden_tile(du, f0, hidden, BLOCK_P, BLOCK_F), of_u.to(du.dtype.element_ty))
        if sums is not None:
            at = pid.to(tl.int64) * (2 * wide + 1) + f
            of_act = tl.where(valid, v[None, :] * activation(h, slope, ACT), 0.0)
            tl.store(sums + at, tl.sum(dh, axis=1), mask=in_f)
            tl.store(sums + (at + wide), tl.sum(of_act, axis=1), mask=in_f)
    if sums is not None:
        tl.store(sums + (pid.to(tl.int64) * (2 * wide + 1) + 2 * wide), tl.sum(v, axis=0))
    tl.debug_barrier()

    alpha = v
    if APPLY:  # read again: kept from before it would fill registers
        alpha = sigmoid(tl.load(q + of_q + n, mask=inside, other=0.0))
    if dx is not None:
        for k in range(0, K1 * K2 * K3):
            at = at_x + place_in_patch(k, x2, x3, K2, K3)
            for c0 in range(0, channels, BLOCK_C):
                c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
                acc = spread(
                    dt, theta, inside, k, c0, hidden, channels,
                    K1 * K2 * K3, BLOCK_P, BLOCK_F, BLOCK_C,
                )  # fmt: skip
                if TARGET == "x" and d is not None:
                    begin = load_tile(
                        d + b * d_batch, c * d_channel, c < channels, at * d_position, inside
                    ).to(tl.float32)
                    acc += alpha[None, :] * begin if APPLY else begin
                store_tile(
                    dx + b * dx_batch, acc, c * dx_channel, c < channels, at * dx_position, inside
                )
    if dg is not None:
        for c0 in range(0, gating, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
            acc = spread(du, phi, inside, 0, c0, hidden, gating, 1, BLOCK_P, BLOCK_F, BLOCK_C)
            if TARGET == "g" and d is not None:
                begin = load_tile(
                    d + b * d_batch, c * d_channel, c < gating, n * d_position, inside
                ).to(tl.float32)
                acc += alpha[None, :] * begin if APPLY else begin
            store_tile(dg + b * dg_batch, acc, c * dg_channel, c < gating, n * dg_position, inside)


@triton.jit(do_not_specialize=["tiles"])
def gate_apply_grad_kernel(
    x,
    alpha,
    dy,
    dx,
    dalpha,
    tiles,
    length,
    channels,
    x_batch,
    x_channel,
    x_position,
    dy_batch,
    dy_channel,
    dy_position,
    dx_batch,
    dx_channel,
    dx_position,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """
    Computes  dx = alpha dy, dalpha = sum_c dy x
    Layout    x, dy, dx as maps [B, C, L]; alpha, dalpha [B, L] float32
    Mapping   a program owns BLOCK_P positions and walks the channels
    Traffic   dy and x once, dx written
    Numerics  float32, channels in order within BLOCK_C sums, then a tree
    """
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = n < length
    weight = tl.load(alpha + b * length + n, mask=inside, other=0.0)[None, :]
    acc = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for c0 in range(0, channels, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
        in_c = c < channels
        d = load_tile(dy + b * dy_batch, c * dy_channel, in_c, n * dy_position, inside)
        right = load_tile(x + b * x_batch, c * x_channel, in_c, n * x_position, inside)
        d = d.to(tl.float32)
        acc += d * right.to(tl.float32)
        store_tile(dx + b * dx_batch, weight * d, c * dx_channel, in_c, n * dx_position, inside)
    tl.store(dalpha + b * length + n, tl.sum(acc, axis=0), mask=inside)
