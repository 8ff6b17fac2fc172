"""Device functions shared by the Triton kernels of attention_gate; formulas in reference.py.

B samples, C channels of x, G channels of g, F hidden channels, Q1 Q2 Q3 the grid of the logits, whose patches
have K1 K2 K3 positions of x.  A tile is BLOCK_P patches of one sample, ``tiles`` of them are a sample's
L = Q1 Q2 Q3, the last one's remainder being outside: a tile's places are a base and a run of positions.
Tiles are [channels, positions]: where Triton knows nothing of addresses lanes lie along the last dim, which
suits a map whose positions are adjacent, and of one whose channels are it knows.
Maps have free strides, one of channel and position 1; everything else is dense float32.  All offsets are int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnkern._triton.activation import activation_grad
from attnkern._triton.product import parts_of, product_of_stored

UNSPECIALISED = ["tiles", "q1", "q2", "q3", "x2", "x3", "g2", "g3", "corners"]
"""Sizes in whose every value, 1 included, the same kernel serves."""


@triton.jit
def coordinates(first, size2, size3, BLOCK_P: tl.constexpr):
    """Positions ``first`` and on of a grid [*, size2, size3] in its three dims: int32.

    Of the first one by divisions of 64 bits, of the others by carries from it.
    """
    i3 = (first % size3).to(tl.int32) + tl.arange(0, BLOCK_P)
    i2 = (first // size3 % size2).to(tl.int32) + i3 // size3
    i1 = (first // size3 // size2).to(tl.int32) + i2 // size2
    return i1, i2 % size2, i3 % size3


@triton.jit
def patches(
    index, tiles, length, q2, q3, x2, x3,
    K1: tl.constexpr, K2: tl.constexpr, K3: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Of tile ``index``: its sample, first patch, patches, their first positions in x, and which there are."""
    b = (index // tiles).to(tl.int64)
    first = (index % tiles).to(tl.int64) * BLOCK_P
    n = first + tl.arange(0, BLOCK_P)
    at_x = n
    if K1 * K2 * K3 > 1:
        n1, n2, n3 = coordinates(first, q2, q3, BLOCK_P)
        at_x = (n1.to(tl.int64) * K1 * x2 + n2.to(tl.int64) * K2) * x3 + n3.to(tl.int64) * K3
    return b, first, n, at_x, n < length


@triton.jit
def place_in_patch(k, x2, x3, K2: tl.constexpr, K3: tl.constexpr):
    """Position k of a patch, from its first, in x."""
    wide = tl.cast(k, tl.int64)
    return (wide // (K2 * K3) * x2 + wide // K3 % K2) * x3 + wide % K3


@triton.jit
def load_tile(x, offsets, in_c, at, inside):
    """The tile [channels, positions] of a map as stored, 0 outside."""
    return tl.load(
        x + offsets[:, None] + at[None, :], mask=in_c[:, None] & inside[None, :], other=0.0
    )


@triton.jit
def store_tile(x, tile, offsets, in_c, at, inside):
    """Store the float32 tile [channels, positions] of a map."""
    tl.store(
        x + offsets[:, None] + at[None, :],
        tile.to(x.dtype.element_ty),
        mask=in_c[:, None] & inside[None, :],
    )


@triton.jit
def load_hidden(v, f, hidden):
    """v [F] at f, 0 outside."""
    return tl.load(v + f, mask=f < hidden, other=0.0)


@triton.jit
def weight_tile(
    weight, part, f0, k, c0, channels,
    K: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Pointers to the tile [BLOCK_F, BLOCK_C] of a weight in tiles, from hidden channel f0 and channel c0 on.

    Of a 16-bit dtype there are three parts of it: two that are summed, and the nearest number.
    """
    PARTS: tl.constexpr = 1 if weight.dtype.element_ty == tl.float32 else 3
    row = tl.cast(f0, tl.int64) // BLOCK_F * K + k
    tile = row * tl.cdiv(channels, BLOCK_C) + c0 // BLOCK_C
    f = tl.arange(0, BLOCK_F).to(tl.int64)
    c = tl.arange(0, BLOCK_C).to(tl.int64)
    start = weight + (tile * PARTS + part) * (BLOCK_F * BLOCK_C)
    return start + f[:, None] * BLOCK_C + c[None, :]


@triton.jit
def split_tile(
    weight, out, hidden, channels, K: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Store the program's tile of weight [F, C, K] in tiles, 0 beyond F and C."""
    tile = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(channels, BLOCK_C)
    c0 = tile % blocks * BLOCK_C
    k = tile // blocks % K
    f0 = tile // blocks // K * BLOCK_F
    if f0 < hidden:
        f = f0 + tl.arange(0, BLOCK_F)
        c = c0 + tl.arange(0, BLOCK_C)
        w = tl.load(
            weight + k + f[:, None] * channels * K + c[None, :] * K,
            mask=(f < hidden)[:, None] & (c < channels)[None, :],
            other=0.0,
        )
        dtype: tl.constexpr = out.dtype.element_ty
        if dtype == tl.float32:
            tl.store(weight_tile(out, 0, f0, k, c0, channels, K, BLOCK_F, BLOCK_C), w)
        else:
            high, low = parts_of(w, dtype)
            tl.store(weight_tile(out, 0, f0, k, c0, channels, K, BLOCK_F, BLOCK_C), high)
            tl.store(weight_tile(out, 1, f0, k, c0, channels, K, BLOCK_F, BLOCK_C), low)
            tl.store(weight_tile(out, 2, f0, k, c0, channels, K, BLOCK_F, BLOCK_C), w.to(dtype))


@triton.jit(do_not_specialize=["hidden", "channels", "gating"])
def split_kernel(
    theta,
    phi,
    theta_out,
    phi_out,
    hidden,
    channels,
    gating,
    K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """
    Computes  theta [F, C, K] and phi [F, G] as the products read them, see `weight_tile`
    Layout    -> [blocks of F, K, blocks of C, parts, BLOCK_F, BLOCK_C] in the maps' dtype, 0 beyond F and C
    Mapping   a program owns a tile of theta, or of phi
    Traffic   the weights once, their tiles once
    Numerics  two parts hold a weight to 2^-16: one alone moves a relu's kinks as far as all of eager's roundings
    """
    if tl.program_id(1) == 0:
        split_tile(theta, theta_out, hidden, channels, K, BLOCK_F, BLOCK_C)
    if phi is not None:  # noqa: SIM102  (one condition is the compiler's, one the program's)
        if tl.program_id(1) == 1:
            split_tile(phi, phi_out, hidden, gating, 1, BLOCK_F, BLOCK_C)


@triton.jit
def project(
    weight,
    x,
    at,
    inside,
    f0,
    channels,
    channel,
    position,
    x2,
    x3,
    acc,
    K1: tl.constexpr,
    K2: tl.constexpr,
    K3: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """acc + sum_k sum_c weight[f, c, k] x[c, at + k], k over the positions of a patch: [BLOCK_F, P]."""
    K: tl.constexpr = K1 * K2 * K3
    for k in range(0, K):
        here = x + place_in_patch(k, x2, x3, K2, K3) * position
        for c0 in range(0, channels, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
            tile = load_tile(here, c * channel, c < channels, at * position, inside)
            w = tl.load(weight_tile(weight, 0, f0, k, c0, channels, K, BLOCK_F, BLOCK_C))
            acc = product_of_stored(w, tile, acc)
            if tile.dtype != tl.float32:
                w = tl.load(weight_tile(weight, 1, f0, k, c0, channels, K, BLOCK_F, BLOCK_C))
                acc = product_of_stored(w, tile, acc)
    return acc


@triton.jit
def tap(taps, tap_weights, row, inside, which):
    """Position of g and how much of it, of tap ``which`` in ``row``, and whether it counts.

    Where both taps are one position a second of no weight does not, so that 0 never meets an infinity there.
    """
    place = 2 * row.to(tl.int64)
    index = tl.load(taps + (place + which), mask=inside, other=0)
    other = tl.load(taps + (place + 1 - which), mask=inside, other=0)
    weight = tl.load(tap_weights + (place + which), mask=inside, other=0.0)
    return index, weight, inside & ((which == 0) | (index != other) | (weight != 0))


@triton.jit
def resample(
    g,
    n1,
    n2,
    n3,
    inside,
    f,
    hidden,
    taps,
    tap_weights,
    q1,
    q2,
    g2,
    g3,
    g_channel,
    g_position,
    corners,
    acc,
):
    """acc + a sample's g [F, ...] between ``corners`` of its positions: [F, P].

    What is known of the corners is a tile of its own, [corners, P], and a reduction takes one from it: as
    vectors [P] Triton would keep them in the registers of every thread that has a position, 8 at a time.
    """
    corner = tl.arange(0, 8)[:, None]
    found = inside[None, :] & (corner < corners)
    i1, w1, used1 = tap(taps, tap_weights, n1[None, :], found, corner // 4)
    i2, w2, used2 = tap(taps, tap_weights, q1 + n2[None, :], found, corner // 2 % 2)
    i3, w3, used3 = tap(taps, tap_weights, q1 + q2 + n3[None, :], found, corner % 2)
    places = tl.where(used1 & used2 & used3, ((i1 * g2 + i2) * g3 + i3) * g_position, -1)
    weights = w1 * w2 * w3
    for k in range(0, corners):
        at = tl.sum(tl.where(corner == k, places, 0), axis=0)
        weight = tl.sum(tl.where(corner == k, weights, 0.0), axis=0)
        tile = load_tile(g, f * g_channel, f < hidden, at, at >= 0)
        acc += weight[None, :] * tile.to(tl.float32)
    return acc


@triton.jit
def hidden_layer(
    x,
    g,
    theta,
    phi,
    bias,
    taps,
    tap_weights,
    theta_scale,
    phi_scale,
    b,
    first,
    n,
    at_x,
    inside,
    f0,
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
    x_batch,
    x_channel,
    x_position,
    g_batch,
    g_channel,
    g_position,
    corners,
    K1: tl.constexpr,
    K2: tl.constexpr,
    K3: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """h of a tile of sample b at hidden channels f0 and on, and its branches t and u: [BLOCK_F, BLOCK_P] each.

    Where neither is normalised they are summed as one, and t and u are h.  h is 0 outside, where an infinite
    element times the padding of a weight is NaN.
    """
    f = f0 + tl.arange(0, BLOCK_F).to(tl.int64)
    t = project(
        theta, x + b * x_batch, at_x, inside, f0, channels, x_channel, x_position,
        x2, x3, tl.zeros([BLOCK_F, BLOCK_P], tl.float32), K1, K2, K3, BLOCK_F, BLOCK_C,
    )  # fmt: skip
    u = t
    if theta_scale is not None or phi_scale is not None:
        u = tl.zeros([BLOCK_F, BLOCK_P], tl.float32)
    if phi is None:
        n1, n2, n3 = coordinates(first, q2, q3, BLOCK_P)
        u = resample(
            g + b * g_batch, n1, n2, n3, inside, f, hidden, taps, tap_weights, q1, q2, g2, g3,
            g_channel, g_position, corners, u,
        )  # fmt: skip
    else:
        u = project(
            phi, g + b * g_batch, n, inside, f0, gating, g_channel, g_position,
            1, 1, u, 1, 1, 1, BLOCK_F, BLOCK_C,
        )  # fmt: skip
    h = u
    if theta_scale is not None or phi_scale is not None:
        if phi_scale is not None:
            h *= load_hidden(phi_scale, f, hidden)[:, None]
        if theta_scale is not None:
            h += load_hidden(theta_scale, f, hidden)[:, None] * t
        else:
            h += t
    if bias is not None:
        h += load_hidden(bias, f, hidden)[:, None]
    h = tl.where(inside[None, :] & (f < hidden)[:, None], h, 0.0)
    if theta_scale is None and phi_scale is None:
        t = h
        u = h
    return h, t, u


@triton.jit
def hidden_grad(dq, h, psi, slope, f, hidden, ACT: tl.constexpr):
    """dh = dq psi act'(h): [BLOCK_F, BLOCK_P]."""
    return activation_grad(dq[None, :] * load_hidden(psi, f, hidden)[:, None], h, slope, ACT)
