"""Forward Triton kernels of attention_gate; legend in triton_maps.py."""

from __future__ import annotations

import triton
import triton.language as tl

from attnkern._triton.activation import activation, sigmoid
from attnkern.ops.attention_gate.triton_maps import (
    UNSPECIALISED,
    hidden_layer,
    load_hidden,
    load_tile,
    patches,
    store_tile,
)


@triton.jit(do_not_specialize=UNSPECIALISED)
def gate_fwd_kernel(
    x,
    g,
    theta,
    phi,
    bias,
    psi,
    psi_bias,
    taps,
    tap_weights,
    q_out,
    y,
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
    y_batch,
    y_channel,
    y_position,
    slope,
    ACT: tl.constexpr,
    TARGET: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    K3: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """
    Computes  q = sum_f psi[f] act(t + u + bias) + psi_bias; with ``y``, y = sigmoid(q) target
    Layout    x, g, y as maps; q [B, L] float32
    Mapping   a program owns a tile of patches: blocks of hidden channels in turn, then channels of y
    Traffic   x, g and y once from memory; x and g again, from L1 or L2, for each further block of hidden
              channels, and the target for y.  theta and phi from L2 once a program
    Numerics  float32 sums of exact products, channels and hidden channels in order; weights as `split_kernel` has them
    """
    b, first, n, at_x, inside = patches(
        tl.program_id(0), tiles, length, q2, q3, x2, x3, K1, K2, K3, BLOCK_P
    )
    q = tl.zeros([BLOCK_P], tl.float32)
    for f0 in range(0, hidden, BLOCK_F):
        f = f0 + tl.arange(0, BLOCK_F).to(tl.int64)
        h, _t, _u = hidden_layer(
            x, g, theta, phi, bias, taps, tap_weights, None, None, b, first, n, at_x,
            inside, f0, hidden, channels, gating, q1, q2, q3, x2, x3, g2, g3,
            x_batch, x_channel, x_position, g_batch, g_channel, g_position, corners,
            K1, K2, K3, BLOCK_P, BLOCK_F, BLOCK_C,
        )  # fmt: skip
        q += tl.sum(activation(h, slope, ACT) * load_hidden(psi, f, hidden)[:, None], axis=0)
    if psi_bias is not None:
        q += tl.load(psi_bias)
    tl.store(q_out + b * length + n, q, mask=inside)

    if y is not None:
        alpha = sigmoid(q)[None, :]
        if TARGET == "x":
            target = x + b * x_batch
            channel = x_channel
            position = x_position
            count = channels
        else:
            target = g + b * g_batch
            channel = g_channel
            position = g_position
            count = gating
        for c0 in range(0, count, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
            tile = load_tile(target, c * channel, c < count, n * position, inside)
            gated = alpha * tile.to(tl.float32)
            store_tile(y + b * y_batch, gated, c * y_channel, c < count, n * y_position, inside)


@triton.jit(do_not_specialize=["tiles"])
def gate_apply_kernel(
    x,
    alpha,
    y,
    tiles,
    length,
    channels,
    x_batch,
    x_channel,
    x_position,
    y_batch,
    y_channel,
    y_position,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """
    Computes  y = alpha x
    Layout    x, y as maps [B, C, L]; alpha [B, L] float32
    Mapping   a program owns BLOCK_P positions of BLOCK_C channels
    Traffic   x and y once; alpha once a block of channels, from L2
    Numerics  one rounding
    """
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = n < length
    in_c = c < channels
    weight = tl.load(alpha + b * length + n, mask=inside, other=0.0)[None, :]
    tile = load_tile(x + b * x_batch, c * x_channel, in_c, n * x_position, inside).to(tl.float32)
    store_tile(y + b * y_batch, weight * tile, c * y_channel, in_c, n * y_position, inside)
