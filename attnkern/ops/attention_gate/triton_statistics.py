"""Sums over batch and positions, per hidden channel, in Triton; legend in triton_maps.py."""

from __future__ import annotations

import triton
import triton.language as tl

from attnkern._triton.product import sum_rows_of_tile
from attnkern.ops.attention_gate.triton_maps import (
    UNSPECIALISED,
    hidden_grad,
    hidden_layer,
    patches,
    project,
)


@triton.jit(do_not_specialize=["stop", "steps", "tiles", "q2", "q3", "x2", "x3"])
def moments_kernel(
    x,
    weight,
    counts,
    means,
    squares,
    stop,
    steps,
    tiles,
    length,
    hidden,
    channels,
    q2,
    q3,
    x2,
    x3,
    x_batch,
    x_channel,
    x_position,
    K1: tl.constexpr,
    K2: tl.constexpr,
    K3: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """
    Computes  mean and sum of squared deviations of t = weight x over a group of tiles
    Layout    x as a map; means, squares [groups, F], counts [groups] float32
    Mapping   a program owns BLOCK_F hidden channels and ``steps`` tiles
    Traffic   x once a block of hidden channels, from L2 after the first
    Numerics  float32; tiles merge in order, each by its own mean
    """
    group = tl.program_id(0)
    f0 = tl.program_id(1).to(tl.int64) * BLOCK_F
    f = f0 + tl.arange(0, BLOCK_F)
    count = tl.zeros([1], tl.float32)
    mean = tl.zeros([BLOCK_F], tl.float32)
    square = tl.zeros([BLOCK_F], tl.float32)
    for index in range(group * steps, tl.minimum((group + 1) * steps, stop)):
        b, first, _n, at_x, inside = patches(
            index, tiles, length, q2, q3, x2, x3, K1, K2, K3, BLOCK_P
        )
        t = project(
            weight, x + b * x_batch, at_x, inside, f0, channels, x_channel, x_position,
            x2, x3, tl.zeros([BLOCK_F, BLOCK_P], tl.float32), K1, K2, K3, BLOCK_F, BLOCK_C,
        )  # fmt: skip
        valid = (f < hidden)[:, None] & inside[None, :]
        more = tl.minimum(length - first, BLOCK_P).to(tl.float32)
        its_mean = tl.sum(tl.where(valid, t, 0.0), axis=1) / more
        away = tl.where(valid, t - its_mean[:, None], 0.0)
        share = more / (count + more)
        apart = its_mean - mean
        square += tl.sum(away * away, axis=1) + apart * apart * (count * share)
        mean += apart * share
        count += more
    at = group.to(tl.int64) * hidden + f
    tl.store(means + at, mean, mask=f < hidden)
    tl.store(squares + at, square, mask=f < hidden)
    tl.store(counts + group.to(tl.int64) + tl.arange(0, 1), count, mask=f0 + tl.arange(0, 1) == 0)


@triton.jit(do_not_specialize=["groups", "hidden"])
def merge_moments_kernel(
    counts,
    means,
    squares,
    mean_out,
    var_out,
    groups,
    hidden,
    BLOCK_G: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """
    Computes  mean and biased variance of all groups together
    Layout    counts [groups], means, squares [groups, F], outputs [F], float32
    Mapping   a program owns BLOCK_F hidden channels and sweeps the groups for the mean, then for the variance
    Traffic   reads counts and means twice, squares once
    Numerics  float32, groups in a fixed order; NaN where there is nothing
    """
    f = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    in_f = f < hidden
    total = tl.zeros([BLOCK_G], tl.float32)
    weighted = tl.zeros([BLOCK_G, BLOCK_F], tl.float32)
    for g0 in range(0, groups, BLOCK_G):
        group = g0 + tl.arange(0, BLOCK_G).to(tl.int64)
        valid = (group < groups)[:, None] & in_f[None, :]
        at = group[:, None] * hidden + f[None, :]
        count = tl.load(counts + group, mask=group < groups, other=0.0)
        total += count
        weighted += count[:, None] * tl.load(means + at, mask=valid, other=0.0)
    n = tl.sum(total, axis=0)
    mean = sum_rows_of_tile(weighted) / n
    apart = tl.zeros([BLOCK_G, BLOCK_F], tl.float32)
    for g0 in range(0, groups, BLOCK_G):
        group = g0 + tl.arange(0, BLOCK_G).to(tl.int64)
        valid = (group < groups)[:, None] & in_f[None, :]
        at = group[:, None] * hidden + f[None, :]
        count = tl.load(counts + group, mask=group < groups, other=0.0)[:, None]
        away = tl.load(means + at, mask=valid, other=0.0) - mean[None, :]
        apart += tl.load(squares + at, mask=valid, other=0.0) + count * away * away
    tl.store(mean_out + f, mean, mask=in_f)
    tl.store(var_out + f, sum_rows_of_tile(apart) / n, mask=in_f)


@triton.jit
def _vector(p, f, inside, otherwise):
    """p[f], or ``otherwise`` where there is no p."""
    v = tl.full(f.shape, otherwise, tl.float32)
    if p is not None:
        v = tl.load(p + f, mask=inside, other=0.0)
    return v


@triton.jit(do_not_specialize=["hidden", "terms"])
def norm_kernel(
    weight,
    bias,
    gamma,
    beta,
    mean,
    var,
    folded,
    shift,
    scale_out,
    eps,
    hidden,
    terms,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """
    Computes  scale = gamma (var + eps)^-1/2, folded = scale weight, shift = beta + scale (bias - mean)
    Layout    weight, folded [F, terms], the rest [F], float32
    Mapping   a program owns [BLOCK_F, BLOCK_C] of folded, the first of a row its vectors too
    Traffic   weight once
    Numerics  float32
    """
    f = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_f = f < hidden
    scale = _vector(gamma, f, in_f, 1.0) / tl.sqrt_rn(_vector(var, f, in_f, 0.0) + eps)
    at, inside = f[:, None] * terms + c[None, :], in_f[:, None] & (c < terms)[None, :]
    tl.store(
        folded + at, scale[:, None] * tl.load(weight + at, mask=inside, other=0.0), mask=inside
    )
    if tl.program_id(1) == 0:
        centre = _vector(bias, f, in_f, 0.0) - _vector(mean, f, in_f, 0.0)
        tl.store(shift + f, _vector(beta, f, in_f, 0.0) + scale * centre, mask=in_f)
        tl.store(scale_out + f, scale, mask=in_f)


@triton.jit(do_not_specialize=["count", "hidden"])
def norm_grad_kernel(
    dh,
    dht,
    mean,
    var,
    scale,
    k0_out,
    k1_out,
    dgamma_out,
    eps,
    count,
    hidden,
    BLOCK_F: tl.constexpr,
):
    """
    Computes  dgamma, k0 and k1 of a norm over ``count`` values, as `reference.norm_backward`
    Layout    [F] float32
    Mapping   a program owns BLOCK_F hidden channels
    Traffic   each vector once
    Numerics  float32
    """
    f = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    in_f = f < hidden
    n, m, h = count.to(tl.float32), _vector(mean, f, in_f, 0.0), _vector(dh, f, in_f, 0.0)
    s, r = _vector(scale, f, in_f, 0.0), 1.0 / tl.sqrt_rn(_vector(var, f, in_f, 1.0) + eps)
    dgamma = r * (_vector(dht, f, in_f, 0.0) - m * h)
    k1 = -s * r * dgamma / n
    tl.store(dgamma_out + f, dgamma, mask=in_f)
    tl.store(k1_out + f, k1, mask=in_f)
    tl.store(k0_out + f, -s * h / n - k1 * m, mask=in_f)


@triton.jit(do_not_specialize=[*UNSPECIALISED, "stop", "steps"])
def hidden_sums_kernel(
    dq,
    x,
    g,
    theta,
    phi,
    bias,
    psi,
    taps,
    tap_weights,
    theta_scale,
    phi_scale,
    sums,
    stop,
    steps,
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
    slope,
    ACT: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    K3: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """
    Computes  the sums of dh, dh t and dh u over a group of tiles, dh = dq psi act'(h)
    Layout    x, g as maps; dq [B, L], sums [groups, 3, F] float32
    Mapping   a program owns BLOCK_F hidden channels and ``steps`` tiles
    Traffic   x and g once a block of hidden channels, from L2 after the first
    Numerics  float32, tiles in order, a tree within one
    """
    group = tl.program_id(0)
    f0 = tl.program_id(1).to(tl.int64) * BLOCK_F
    f = f0 + tl.arange(0, BLOCK_F)
    sum_h = tl.zeros([BLOCK_F], tl.float32)
    sum_t = tl.zeros([BLOCK_F], tl.float32)
    sum_u = tl.zeros([BLOCK_F], tl.float32)
    for index in range(group * steps, tl.minimum((group + 1) * steps, stop)):
        b, first, n, at_x, inside = patches(
            index, tiles, length, q2, q3, x2, x3, K1, K2, K3, BLOCK_P
        )
        h, t, u = hidden_layer(
            x, g, theta, phi, bias, taps, tap_weights, theta_scale, phi_scale, b, first, n, at_x,
            inside, f0, hidden, channels, gating, q1, q2, q3, x2, x3, g2, g3,
            x_batch, x_channel, x_position, g_batch, g_channel, g_position, corners,
            K1, K2, K3, BLOCK_P, BLOCK_F, BLOCK_C,
        )  # fmt: skip
        v = tl.load(dq + b * length + n, mask=inside, other=0.0)
        valid = (f < hidden)[:, None] & inside[None, :]
        dh = tl.where(valid, hidden_grad(v, h, psi, slope, f, hidden, ACT), 0.0)
        sum_h += tl.sum(dh, axis=1)
        sum_t += tl.sum(tl.where(valid, dh * t, 0.0), axis=1)
        sum_u += tl.sum(tl.where(valid, dh * u, 0.0), axis=1)
    at = group.to(tl.int64) * 3 * hidden + f
    tl.store(sums + at, sum_h, mask=f < hidden)
    tl.store(sums + (at + hidden), sum_t, mask=f < hidden)
    tl.store(sums + (at + hidden + hidden), sum_u, mask=f < hidden)
