"""Gradients of attention_gate's weights, and of a resampled g, in Triton; legend in triton_maps.py."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnkern._triton import LAUNCH
from attnkern._triton.linear import sum_rows
from attnkern._triton.product import product_of_stored
from attnkern.ops.attention_gate import triton_plan as plan
from attnkern.ops.attention_gate.reference import Inputs
from attnkern.ops.attention_gate.triton_maps import (
    coordinates,
    load_tile,
    patches,
    place_in_patch,
    store_tile,
)


@triton.jit(do_not_specialize=["start", "count", "splits", "tiles", "q2", "q3", "x2", "x3"])
def gate_weight_grad_kernel(
    dt,
    x,
    out,
    start,
    count,
    splits,
    tiles,
    length,
    hidden,
    width,
    channels,
    q2,
    q3,
    x2,
    x3,
    x_batch,
    x_channel,
    x_position,
    ADD: tl.constexpr,
    ON_GRID: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    K3: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """
    Computes  out[f, c, k] = sum_p dt[p, f] x[c, p + k] over a split of ``count`` tiles of patches, from ``start``
              on, k over the positions of a patch; with ADD added to what is there
    Layout    dt [count, BLOCK_P, width] in x's dtype; x a map, or with ON_GRID one on the logits' grid, K = 1;
              out [splits, F, C, K] float32
    Mapping   a program owns [BLOCK_F, BLOCK_C] of out at one k, and one split
    Traffic   dt once a block of channels and k, x once a block of hidden channels, from L2
    Numerics  float32 sums of exact products, patches in order
    """
    K: tl.constexpr = 1 if ON_GRID else K1 * K2 * K3
    blocks = tl.cdiv(hidden, BLOCK_F)
    split = tl.program_id(0) // blocks
    f = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    k = tl.program_id(1) % K
    c = (tl.program_id(1) // K).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_f = f < hidden
    in_c = c < channels
    here = x + place_in_patch(k, x2, x3, K2, K3) * x_position
    steps = tl.cdiv(count, splits)
    acc = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
    for step in range(split * steps, tl.minimum((split + 1) * steps, count)):
        b, _first, n, at_x, inside = patches(
            start + step, tiles, length, q2, q3, x2, x3, K1, K2, K3, BLOCK_P
        )
        rows = tl.cast(step, tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
        left = load_tile(dt, f, in_f, rows * width, inside)
        at = (n if ON_GRID else at_x) * x_position
        right = load_tile(here + b * x_batch, c * x_channel, in_c, at, inside)
        acc = product_of_stored(left, tl.trans(right), acc)
    places = out + k.to(tl.int64) + split.to(tl.int64) * hidden * channels * K
    offsets = f * channels * K
    if ADD:
        acc += load_tile(places, offsets, in_f, c * K, in_c)
    store_tile(places, acc, offsets, in_f, c * K, in_c)


@triton.jit(do_not_specialize=["q1", "q2", "q3", "g1", "g2", "g3"])
def tap_ranges_kernel(
    taps, ranges, q1, q2, q3, g1, g2, g3, BLOCK_G: tl.constexpr, BLOCK_Q: tl.constexpr
):
    """
    Computes  for each position of g, along each dim, the first position of the logits' grid that has it
              as a tap, and the one after the last: taps ascend
    Layout    taps [Q1 + Q2 + Q3, 2], ranges [G1 + G2 + G3, 2] int64
    Mapping   a program owns BLOCK_G positions of one dim and counts through its taps
    Traffic   taps of a dim once a program
    Numerics  exact
    """
    dim = tl.program_id(1)
    here = tl.where(dim == 0, g1, tl.where(dim == 1, g2, g3))
    there = tl.where(dim == 0, q1, tl.where(dim == 1, q2, q3))
    row_g = tl.where(dim == 0, 0, tl.where(dim == 1, g1, g1 + g2))
    row_q = tl.where(dim == 0, 0, tl.where(dim == 1, q1, q1 + q2))
    m = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    before = tl.zeros([BLOCK_G], tl.int64)
    until = tl.zeros([BLOCK_G], tl.int64)
    for k0 in range(0, there, BLOCK_Q):
        k = k0 + tl.arange(0, BLOCK_Q).to(tl.int64)
        inside = k < there
        below = tl.load(taps + 2 * (row_q + k), mask=inside, other=0)
        above = tl.load(taps + (2 * (row_q + k) + 1), mask=inside, other=0)
        counted = inside[None, :] & (above[None, :] < m[:, None])
        before += tl.sum(counted.to(tl.int64), axis=1)
        counted = inside[None, :] & (below[None, :] <= m[:, None])
        until += tl.sum(counted.to(tl.int64), axis=1)
    places = 2 * (row_g + m)
    tl.store(ranges + places, before, mask=m < here)
    tl.store(ranges + (places + 1), until, mask=m < here)


@triton.jit
def tap_range(ranges, row, inside):
    """First row of taps that has a position of g, and the one after the last."""
    place = 2 * row.to(tl.int64)
    first = tl.load(ranges + place, mask=inside, other=0)
    return first, tl.load(ranges + (place + 1), mask=inside, other=0)


@triton.jit
def tap_weight(taps, tap_weights, row, m, valid):
    """How much of g's position m the row of taps takes."""
    below = tl.load(taps + 2 * row, mask=valid, other=-1)
    above = tl.load(taps + (2 * row + 1), mask=valid, other=-1)
    first = tl.load(tap_weights + 2 * row, mask=valid, other=0.0)
    second = tl.load(tap_weights + (2 * row + 1), mask=valid, other=0.0)
    return tl.where(below == m, first, 0.0) + tl.where(above == m, second, 0.0)


@triton.jit(
    do_not_specialize=[
        *("start", "stop", "base", "tiles", "rows", "q1", "q2", "q3", "g1", "g2", "g3")
    ]
)
def resample_grad_kernel(
    du,
    taps,
    tap_weights,
    ranges,
    dg,
    start,
    stop,
    base,
    tiles,
    rows,
    hidden,
    width,
    q1,
    q2,
    q3,
    g1,
    g2,
    g3,
    dg_batch,
    dg_channel,
    dg_position,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """
    Computes  dg[m] = sum of du over the rows start..stop whose patches have m as a tap, each as much as it takes of
              it; added to what is there where the sample begins before ``start``
    Layout    du [stop - start, width] of ``rows`` a sample, in x's dtype; dg as a map
    Mapping   a program owns BLOCK_P positions of g, of a sample from ``base`` on, and BLOCK_F channels
    Traffic   du as often as a patch has taps, from L1 or L2; dg written once and, where start..stop part a
              sample, read and written again at the positions on both sides
    Numerics  float32, patches in order
    """
    b = (base + tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_P
    m = first + tl.arange(0, BLOCK_P)
    m1, m2, m3 = coordinates(first, g2, g3, BLOCK_P)
    f = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = m1 < g1
    in_f = f < hidden
    first1, stop1 = tap_range(ranges, m1, inside)
    first2, stop2 = tap_range(ranges, g1 + m2, inside)
    first3, stop3 = tap_range(ranges, g1 + g2 + m3, inside)
    origin = b * rows - start
    until = tl.cast(stop, tl.int64) - start
    begins = origin + (first1 * q2 + first2) * q3 + first3
    ends = origin + ((stop1 - 1) * q2 + stop2 - 1) * q3 + stop3
    touched = inside & (first1 < stop1) & (first2 < stop2) & (first3 < stop3)
    touched = touched & (ends > 0) & (begins < until)
    count1 = tl.max(tl.where(touched, stop1 - first1, 0), axis=0)
    count2 = tl.max(tl.where(touched, stop2 - first2, 0), axis=0)
    count3 = tl.max(tl.where(touched, stop3 - first3, 0), axis=0)
    acc = tl.zeros([BLOCK_F, BLOCK_P], tl.float32)
    for k1 in range(0, count1):
        n1 = first1 + k1
        valid1 = touched & (n1 < stop1)
        w1 = tap_weight(taps, tap_weights, n1, m1, valid1)
        for k2 in range(0, count2):
            n2 = first2 + k2
            valid2 = valid1 & (n2 < stop2)
            w2 = w1 * tap_weight(taps, tap_weights, q1 + n2, m2, valid2)
            for k3 in range(0, count3):
                n3 = first3 + k3
                row = origin + (n1 * q2 + n2) * q3 + n3
                valid = valid2 & (n3 < stop3) & (row >= 0) & (row < until)
                w3 = w2 * tap_weight(taps, tap_weights, q1 + q2 + n3, m3, valid)
                acc += w3[None, :] * load_tile(du, f, in_f, row * width, valid).to(tl.float32)
    here = dg + b * dg_batch
    written = inside
    if origin < 0:  # the sample has begun in a run before this one, which has written it
        written = touched
        acc += load_tile(here, f * dg_channel, in_f, m * dg_position, touched)
    store_tile(here, acc, f * dg_channel, in_f, m * dg_position, written)


class WeightGrad:
    """``out`` [F, C K] of a map x, a run of at most ``tiles`` tiles at a time; see the kernel."""

    def __init__(
        self, x: Tensor, p: plan.Patches, block_p: int, out: Tensor, tiles: int, on_grid: bool
    ) -> None:
        self.x, self.out, self.first = x, out, True
        hidden, channels = out.shape[0], x.shape[1]
        self.block = plan.weight_blocks(x, hidden, channels, block_p)
        self.each = block_p // self.block["BLOCK_P"]
        grid = (
            triton.cdiv(hidden, self.block["BLOCK_F"]),
            triton.cdiv(channels, self.block["BLOCK_C"]) * (out.shape[1] // channels),
        )
        self.splits = plan.weight_splits(tiles * self.each, math.prod(grid), x, out)
        self.grid = grid[0] * self.splits, grid[1]
        # with no tile at all nothing is written, and the sum over no rows is 0
        self.partial = out.new_empty(self.splits if tiles else 0, *out.shape)
        self.arguments = {
            **plan.strided("x", x),
            **p.arguments(self.block["BLOCK_P"]),
            "tiles": p.tiles(block_p) * self.each,
            "out": self.partial,
            "hidden": hidden,
            "channels": channels,
            "ON_GRID": on_grid and math.prod(p.kernel) > 1,
        }

    def add(self, dt: Tensor, start: int, stop: int) -> None:
        gate_weight_grad_kernel[self.grid](
            dt=dt,
            width=dt.shape[2],
            start=start * self.each,
            count=(stop - start) * self.each,
            splits=self.splits,
            ADD=not self.first,
            **self.arguments,
            **self.block,
        )
        self.first = False

    def finish(self) -> None:
        sum_rows(self.partial.flatten(1), self.out)


class Sums:
    """Sums of dh, v act(h) and v over all patches: dbias, dpsi and dpsi_bias, of a row a tile."""

    def __init__(self, hidden: int, tiles: int, like: Tensor) -> None:
        self.hidden = hidden
        # more than 64 rows are added up in 32 parts first; what no program writes is 0
        self.parts = triton.cdiv(tiles, 32) if tiles > 64 else 0
        if self.parts:
            self.terms = like.new_zeros(32 * self.parts, 2 * hidden + 1)
        else:
            self.terms = like.new_empty(tiles, 2 * hidden + 1)

    def finish(self, dbias: Tensor, dpsi: Tensor, dpsi_bias: Tensor) -> None:
        terms = self.terms
        if self.parts:
            terms = terms.new_empty(self.parts, terms.shape[1])
            sum_rows(self.terms.view(32, -1), terms)
        hidden = self.hidden
        sum_rows(terms[:, :hidden], dbias)
        sum_rows(terms[:, hidden : 2 * hidden], dpsi)
        sum_rows(terms[:, 2 * hidden :], dpsi_bias)


class ResampledGrad:
    """dg of a g between whose positions the patches lie, a run of tiles at a time."""

    def __init__(self, i: Inputs, p: plan.Patches, block_p: int, dg: Tensor, whole: bool) -> None:
        self.i, self.dg, self.block_p = i, dg, block_p
        assert i.taps is not None
        # more than one run adds to what the one before has left: in float32
        self.total = dg if whole else torch.empty_like(dg, dtype=i.theta.dtype)
        self.rows = p.tiles(block_p) * block_p
        g = dict(zip(("g1", "g2", "g3"), dg.shape[2:], strict=True))
        q = dict(zip(("q1", "q2", "q3"), p.grid, strict=True))
        self.ranges = i.taps.new_empty(sum(g.values()), 2)
        tap_ranges_kernel[triton.cdiv(max(g.values()), 32), 3](
            i.taps, self.ranges, **q, **g, BLOCK_G=32, BLOCK_Q=64, **LAUNCH
        )
        positions = math.prod(g.values())
        # as many positions as threads: of fewer Triton keeps the taps in several threads' registers, and spilled
        block_g = plan.power(positions, 32, 128)
        self.tiles = triton.cdiv(positions, block_g)
        self.arguments = {
            **plan.strided("dg", self.total),
            "taps": i.taps,
            "tap_weights": i.tap_weights,
            "ranges": self.ranges,
            "tiles": self.tiles,
            "rows": self.rows,
            "hidden": dg.shape[1],
            **q,
            **g,
            **LAUNCH,
            "BLOCK_P": block_g,
            "BLOCK_F": 16,
            "num_warps": block_g // 32,
        }

    def add(self, du: Tensor, start: int, stop: int) -> None:
        start, stop = start * self.block_p, stop * self.block_p
        base, last = start // self.rows, (stop - 1) // self.rows
        grid = (
            (last - base + 1) * self.tiles,
            triton.cdiv(self.dg.shape[1], self.arguments["BLOCK_F"]),
        )
        resample_grad_kernel[grid](
            du=du, width=du.shape[2], start=start, stop=stop, base=base, **self.arguments
        )

    def finish(self) -> None:
        if self.total is not self.dg:
            self.dg.copy_(self.total)
