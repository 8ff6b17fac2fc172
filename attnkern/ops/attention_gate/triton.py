"""attention_gate in Triton, the portable GPU path: launchers of the kernels beside it.

Every call begins with split (theta and phi in tiles, as the products read them).
Forward: gate_fwd (reads x and g, writes q and y), or gate_apply (y of a gate that torch makes of q).
Statistics over the batch: moments and their merge; hidden_sums; norm and norm_grad, between them and the maps.
Backward, a run of tiles at a time: gate_bwd (dx, dg, and dt and du of the run), gate_weight_grad, and
resample_grad where g was resampled.  dt and du take an eighth of x and g, or 128 KB; nothing of size
[B, F, L] is stored.  Partial sums are added in a fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from attnkern._triton import LAUNCH, tune
from attnkern._triton.linear import sum_rows
from attnkern.ops.attention_gate import triton_plan as plan
from attnkern.ops.attention_gate.normal_form import evaluate
from attnkern.ops.attention_gate.reference import Inputs, Options
from attnkern.ops.attention_gate.triton_backward import gate_apply_grad_kernel, gate_bwd_kernel
from attnkern.ops.attention_gate.triton_forward import gate_apply_kernel, gate_fwd_kernel
from attnkern.ops.attention_gate.triton_maps import split_kernel
from attnkern.ops.attention_gate.triton_statistics import (
    hidden_sums_kernel,
    merge_moments_kernel,
    moments_kernel,
    norm_grad_kernel,
    norm_kernel,
)
from attnkern.ops.attention_gate.triton_weights import ResampledGrad, Sums, WeightGrad


def _kernel_of(o: Options) -> plan.Three:
    return o.k1, o.k2, o.k3


def _inputs(i: Inputs, o: Options, p: plan.Patches, block: plan.Arguments) -> plan.Arguments:
    """What every kernel that computes the hidden layer takes."""
    g1, g2, g3 = i.g.shape[2:]
    # two positions of g to lie between along each dim but leading ones
    corners = 2 if g1 == g2 == 1 else 4 if g1 == 1 else 8
    return {
        **plan.strided("x", i.x),
        **plan.strided("g", i.g),
        **_split(i.theta, i.phi, i.x, i.g, block),
        "bias": i.bias,
        "psi": i.psi,
        "taps": i.taps,
        "tap_weights": i.tap_weights,
        **p.arguments(block["BLOCK_P"]),
        "q1": p.grid[0],
        "hidden": i.theta.shape[0],
        "channels": i.x.shape[1],
        "gating": i.g.shape[1],
        "g2": g2,
        "g3": g3,
        "slope": o.act_slope,
        "ACT": o.act,
        "corners": 0 if i.taps is None else corners,
        **block,
    }


def _split(
    theta: Tensor, phi: Tensor | None, x: Tensor, g: Tensor, block: plan.Arguments
) -> plan.Arguments:
    """theta and phi as the products read them."""
    (hidden, columns), channels, gating = theta.shape, x.shape[1], g.shape[1]
    K, f, c = columns // channels, block["BLOCK_F"], block["BLOCK_C"]
    parts = 1 if x.dtype == torch.float32 else 3
    tiles = [triton.cdiv(hidden, f) * K * triton.cdiv(channels, c)]
    if phi is not None:
        tiles.append(triton.cdiv(hidden, f) * triton.cdiv(gating, c))
    out = [x.new_empty(count, parts, f, c) for count in tiles]
    split = {"theta": out[0], "phi": None if phi is None else out[1]}
    split_kernel[max(tiles), len(tiles)](
        theta,
        phi,
        *split.values(),
        *(hidden, channels, gating),
        K=K,
        BLOCK_F=f,
        BLOCK_C=c,
        **LAUNCH,
    )
    return split


def _blocks(i: Inputs, p: plan.Patches, backward: bool = False) -> plan.Arguments:
    channels = max(i.x.shape[1], 1 if i.phi is None else i.g.shape[1])
    return plan.blocks(
        i.x, i.theta.shape[0], channels, p, resampled=i.phi is None, backward=backward
    )


# ------------------------------------------------------------------ forward


def attention_gate_fwd(*arguments: Any) -> tuple[Tensor, Tensor]:
    i, o = Inputs(*arguments[:9]), Options(*arguments[9:])
    p = plan.patches(i.x, _kernel_of(o))
    target = i.x if o.target == "x" else i.g
    q = i.theta.new_empty(p.batch, *p.grid)
    y = torch.empty_like(target) if o.apply else None
    block = _blocks(i, p)
    if p.batch:
        with torch.cuda.device_of(q):
            gate_fwd_kernel[p.batch * p.tiles(block["BLOCK_P"]),](
                **_inputs(i, o, p, block),
                **plan.strided("y", y),
                psi_bias=i.psi_bias,
                q_out=q,
                TARGET=o.target,
            )
    return q, i.x.new_empty(0) if y is None else y


def gate_apply_fwd(x: Tensor, alpha: Tensor) -> Tensor:
    y = torch.empty_like(x)
    batch, channels = x.shape[:2]
    length = math.prod(x.shape[2:])
    arguments = {**plan.strided("x", x), **plan.strided("y", y)}

    def launch(block: plan.Arguments) -> None:
        tiles = triton.cdiv(length, block["BLOCK_P"])
        gate_apply_kernel[batch * tiles, triton.cdiv(channels, block["BLOCK_C"])](
            **arguments, alpha=alpha, tiles=tiles, length=length, channels=channels, **block
        )

    candidates = plan.apply_tiles(x, channels, length)
    block = candidates[0]
    if batch:
        with torch.cuda.device_of(x):
            if tune.enabled and len(candidates) > 1:
                kind = (batch.bit_length(), channels, length, x.stride(1) == 1, x.dtype, x.device)
                block = tune.choose(("gate_apply_kernel", *kind), candidates, launch)
            launch(block)
    return y


# ------------------------------------------------------------------ statistics over the batch


def attention_gate_moments(
    x: Tensor, weight: Tensor, k1: int, k2: int, k3: int
) -> tuple[Tensor, Tensor]:
    hidden, channels = weight.shape[0], x.shape[1]
    p = plan.patches(x, (k1, k2, k3))
    block = plan.blocks(x, hidden, channels, p)
    stop = p.batch * p.tiles(block["BLOCK_P"])
    groups, steps = plan.groups(stop, block, hidden, x.device)
    counts, (means, squares) = weight.new_empty(groups), weight.new_empty(2, groups, hidden)
    mean, var = weight.new_empty(hidden), weight.new_empty(hidden)
    with torch.cuda.device_of(x):
        if groups:
            moments_kernel[groups, triton.cdiv(hidden, block["BLOCK_F"])](
                **plan.strided("x", x),
                weight=_split(weight, None, x, x, block)["theta"],
                counts=counts,
                means=means,
                squares=squares,
                stop=stop,
                steps=steps,
                hidden=hidden,
                channels=channels,
                **p.arguments(block["BLOCK_P"]),
                **block,
            )
        merge_moments_kernel[triton.cdiv(hidden, 16),](
            *(counts, means, squares, mean, var, groups, hidden), BLOCK_G=32, BLOCK_F=16, **LAUNCH
        )
    return mean, var


def gate_norm_fwd(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, terms = weight.shape
    folded, shift, scale = torch.empty_like(weight), torch.empty_like(mean), torch.empty_like(mean)
    with torch.cuda.device_of(weight):
        norm_kernel[triton.cdiv(hidden, 16), triton.cdiv(terms, 64)](
            *(weight, bias, gamma, beta, mean, var, folded, shift, scale, eps, hidden, terms),
            BLOCK_F=16,
            BLOCK_C=64,
            **LAUNCH,
        )
    return folded, shift, scale


def attention_gate_eval(*arguments: Any) -> tuple[Tensor, Tensor]:
    return evaluate(attention_gate_fwd, gate_norm_fwd, *arguments)


def gate_norm_bwd(
    dq: Tensor, dh: Tensor, dht: Tensor, mean: Tensor, var: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    k0, k1, dgamma = (torch.empty_like(dh) for _ in range(3))
    hidden = dh.shape[0]
    with torch.cuda.device_of(dh):
        norm_grad_kernel[triton.cdiv(hidden, 128),](
            *(dh, dht, mean, var, scale, k0, k1, dgamma, eps, dq.numel(), hidden),
            BLOCK_F=128,
            **LAUNCH,
        )
    return k0, k1, dgamma


def attention_gate_sums(dq: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    i, o = Inputs(*arguments[:9]), Options(*arguments[11:])
    p = plan.patches(i.x, _kernel_of(o))
    hidden = i.theta.shape[0]
    block = _blocks(i, p, backward=True)
    stop = p.batch * p.tiles(block["BLOCK_P"])
    groups, steps = plan.groups(stop, block, hidden, i.x.device)
    parts = i.theta.new_empty(groups, 3, hidden)
    sums = [i.theta.new_empty(hidden) for _ in range(3)]
    with torch.cuda.device_of(dq):
        if groups:
            hidden_sums_kernel[groups, triton.cdiv(hidden, block["BLOCK_F"])](
                **_inputs(i, o, p, block),
                dq=dq,
                theta_scale=arguments[9],
                phi_scale=arguments[10],
                sums=parts,
                stop=stop,
                steps=steps,
            )
        for index, total in enumerate(sums):
            sum_rows(parts[:, index], total)
    return sums[0], sums[1], sums[2]


# ------------------------------------------------------------------ backward


def gate_apply_bwd(dy: Tensor, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    dx, dalpha = torch.empty_like(x), torch.empty_like(alpha)
    batch, channels = x.shape[:2]
    length = math.prod(x.shape[2:])
    block = plan.elementwise(x, channels, length, 1024)
    tiles = triton.cdiv(length, block["BLOCK_P"])
    if batch:
        with torch.cuda.device_of(x):
            gate_apply_grad_kernel[batch * tiles,](
                **plan.strided("x", x),
                **plan.strided("dy", dy),
                **plan.strided("dx", dx),
                alpha=alpha,
                dalpha=dalpha,
                tiles=tiles,
                length=length,
                channels=channels,
                **block,
            )
    return dx, dalpha


def attention_gate_bwd(d: Tensor | None, dq: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    i, q, norms = Inputs(*arguments[:9]), arguments[9], arguments[10:16]
    o = Options(*arguments[16:23])
    need_x, need_g, need_weights = arguments[23:]
    new = i.theta.new_empty
    hidden = i.theta.shape[0]
    dx = torch.empty_like(i.x) if need_x else i.x.new_empty(0)
    dg = torch.empty_like(i.g) if need_g else i.x.new_empty(0)
    weights = [new(0) for _ in range(5)]  # of outputs no two are one tensor
    if need_weights:
        dphi = new(0) if i.phi is None else torch.empty_like(i.phi)
        weights = [torch.empty_like(i.theta), dphi, new(hidden), new(hidden), new(1)]
    if not (need_x or need_g or need_weights):
        return (dx, dg, *weights)

    p = plan.patches(i.x, _kernel_of(o))
    if need_x:
        for edge in p.uncovered():
            if d is None or o.target == "g":
                dx.narrow(*edge).zero_()
            else:
                dx.narrow(*edge).copy_(d.narrow(*edge))
    block = _blocks(i, p, backward=True)
    block_p = block["BLOCK_P"]
    tiles = p.batch * p.tiles(block_p)
    apart = any(t is not None for t in norms)  # dt is not du
    maps = sum(t.numel() * t.element_size() for t in (i.x, i.g))
    width = triton.cdiv(hidden, block["BLOCK_F"]) * block["BLOCK_F"]
    tile = (1 + apart) * block_p * width * i.x.element_size()
    runs = plan.runs(tiles, tile, maps)
    most = runs[0][1] if runs else 0
    dt = i.x.new_empty(most, block_p, width)
    du = torch.empty_like(dt) if apart else dt
    with torch.cuda.device_of(q):
        sums = resampled = None
        later: list[tuple[WeightGrad | ResampledGrad, Tensor]] = []
        if need_weights:
            sums = Sums(hidden, tiles, i.theta)
            later.append((WeightGrad(i.x, p, block_p, weights[0], most, on_grid=False), dt))
            if i.phi is not None:
                later.append((WeightGrad(i.g, p, block_p, weights[1], most, on_grid=True), du))
        if need_g and i.phi is None:
            resampled = ResampledGrad(i, p, block_p, dg, len(runs) == 1)
            later.append((resampled, du))
        names = ("theta_scale", "theta_k0", "theta_k1", "phi_scale", "phi_k0", "phi_k1")
        given = {
            **_inputs(i, o, p, block),
            **dict(zip(names, norms, strict=True)),
            **plan.strided("d", d),
            **plan.strided("dx", dx if need_x else None),
            **plan.strided("dg", dg if need_g and resampled is None else None),
            "dq": dq,
            "q": q,
            "dt_out": dt,
            "du_out": du if apart else None,
            "APPLY": o.apply,
            "TARGET": o.target,
        }
        for start, stop in runs:
            gate_bwd_kernel[stop - start,](
                sums=None if sums is None else sums.terms[start:], start=start, **given
            )
            for grad, hidden_grad in later:
                grad.add(hidden_grad, start, stop)
        if sums is not None:
            sums.finish(*weights[2:])
        for grad, _ in later:
            grad.finish()
    return (dx, dg, *weights)
