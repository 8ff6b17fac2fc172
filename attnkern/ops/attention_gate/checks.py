"""What a call of attention_gate must be, from metadata alone; errors name the argument."""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkern import _checks, _select
from attnkern._verdicts import remember
from attnkern.ops.attention_gate.norm import BatchNorm
from attnkern.ops.attention_gate.reference import ACTS, TARGETS

OP = "attention_gate"
GATES = ("sigmoid", "softmax")
UPSAMPLINGS = {1: ("nearest", "linear"), 2: ("nearest", "bilinear"), 3: ("nearest", "trilinear")}
"""By the number of spatial dims, as ``F.interpolate`` names them."""


class Weights(NamedTuple):
    """A call's tensors besides the maps."""

    theta_weight: Any
    theta_bias: Any
    phi_weight: Any
    phi_bias: Any
    psi_weight: Any
    psi_bias: Any
    out_weight: Any
    out_bias: Any


class Norms(NamedTuple):
    theta: BatchNorm | None
    phi: BatchNorm | None
    psi: BatchNorm | None
    out: BatchNorm | None


class Choices(NamedTuple):
    """A call's options, as far as they are checked."""

    act: str
    act_slope: float
    gate: str
    upsample: str | None
    target: str


_admitted: dict[Any, tuple[tuple[int, ...], str]] = {}
"""Calls that passed every check, by all the metadata the checks read."""


def admit(
    impl: str, x: Any, g: Any, weights: Weights, norms: Norms, choices: Choices
) -> tuple[tuple[int, ...], str]:
    """theta's kernel and the implementation of a call, or the user's error.

    With three norms the checks cost 40 us a call, a look-up of their last verdict 9.
    """
    if torch.compiler.is_compiling() or _select.transforming():
        return _check(impl, x, g, weights, norms, choices)
    try:
        metadata: list[Any] = [_select.requested(impl), choices]
        tensors: list[Any] = [x, g, *weights]
        for norm in norms:
            if norm is not None:
                tensors += norm[:4]
                in_range = 0 <= norm.momentum <= sys.float_info.max
                metadata.append((type(norm), norm.training, norm.eps, in_range))
            else:
                metadata.append(None)
        for t in tensors:
            metadata += (None,) if t is None else (t.shape, t.dtype, t.device, t.layout)
        key = tuple(metadata)
        verdict = _admitted.get(key)
    except (AttributeError, TypeError):  # not tensors, or sizes that are symbols
        return _check(impl, x, g, weights, norms, choices)
    if verdict is None:
        verdict = _check(impl, x, g, weights, norms, choices)
        remember(_admitted, key, verdict)
    return verdict


def _check(
    impl: str, x: Any, g: Any, weights: Weights, norms: Norms, choices: Choices
) -> tuple[tuple[int, ...], str]:
    check_maps(x, g)
    check_options(x, *choices)
    kernel = kernel_of(x, weights.theta_weight)
    grid = tuple(size // k for size, k in zip(x.shape[2:], kernel, strict=True))
    target = x if choices.target == "x" else g
    hidden = weights.theta_weight.shape[0]
    check_weights(x, g, hidden, *weights[1:], target.shape[1])
    check_grids(g, grid, tuple(target.shape[2:]), choices.upsample)
    positions = x.shape[0] * math.prod(grid)
    check_norm("theta_norm", norms.theta, x, hidden, positions)
    check_norm("phi_norm", norms.phi, x, hidden, g.shape[0] * math.prod(g.shape[2:]))
    check_norm("psi_norm", norms.psi, x, 1, positions)
    full = x.shape[0] * math.prod(target.shape[2:])
    check_out_norm(norms.out, x, weights.out_weight, full)
    return kernel, _select.select(OP, impl, x.device, x.dtype, "attention_gate_fwd")


def check_maps(x: Any, g: Any) -> None:
    for name, t in (("x", x), ("g", g)):
        _checks.tensor(OP, name, t)
        dtypes = _checks.DTYPES if t is x else (x.dtype,)
        _checks.operand(OP, name, t, x, dtypes=dtypes)
        if not 3 <= t.dim() <= 5:
            wanted = "have shape [B, C, *spatial] with 1 to 3 spatial dims"
            _checks.fail(OP, name, wanted, list(t.shape))
        for axis, size in enumerate(t.shape[1:], 1):
            if size == 0:
                _checks.fail(OP, name, f"have at least one element along dim {axis}", list(t.shape))
    if g.dim() != x.dim() or g.shape[0] != x.shape[0]:
        wanted = f"have x's batch and number of dims, [B={x.shape[0]}, G, *{x.dim() - 2} spatial]"
        _checks.fail(OP, "g", wanted, list(g.shape))


def kernel_of(x: Tensor, theta_weight: Any) -> tuple[int, ...]:
    """theta's kernel, which is its stride: a weight [F, C, *kernel], or [F, C] for 1x1."""
    dims = x.dim() - 2
    _checks.operand(OP, "theta_weight", theta_weight, x)
    shape = list(theta_weight.shape)
    if len(shape) not in (2, 2 + dims) or shape[1] != x.shape[1] or 0 in shape:
        wanted = f"have shape [F, C={x.shape[1]}] or [F, C={x.shape[1]}, *{dims} kernel sizes]"
        _checks.fail(OP, "theta_weight", wanted, shape)
    kernel = tuple(shape[2:]) or (1,) * dims
    for size, k in zip(x.shape[2:], kernel, strict=True):
        if size < k:
            _checks.fail(OP, "theta_weight", f"fit into x {list(x.shape)}", shape)
    return kernel


def check_weights(
    x: Tensor,
    g: Tensor,
    hidden: int,
    theta_bias: Any,
    phi_weight: Any,
    phi_bias: Any,
    psi_weight: Any,
    psi_bias: Any,
    out_weight: Any,
    out_bias: Any,
    target_channels: int,
) -> None:
    wide = ("F", hidden)
    _weight("phi_weight", phi_weight, x, wide, ("G", g.shape[1]))
    one_row = isinstance(psi_weight, Tensor) and psi_weight.dim() == 1
    _weight("psi_weight", psi_weight, x, *((wide,) if one_row else (1, wide)))
    sizes: dict[str, tuple[Any, Any]] = {
        "theta_bias": (theta_bias, wide),
        "phi_bias": (phi_bias, wide),
        "psi_bias": (psi_bias, 1),
    }
    for name, (t, size) in sizes.items():
        if t is not None:
            _weight(name, t, x, size)
    if out_weight is None:
        if out_bias is not None:
            _checks.fail(OP, "out_bias", "be None when out_weight is None", "a tensor")
        return
    _weight("out_weight", out_weight, x, "O", ("C", target_channels))
    if out_bias is not None:
        _weight("out_bias", out_bias, x, out_weight.shape[0])


def _weight(name: str, t: Any, x: Tensor, *sizes: int | str | tuple[str, int]) -> None:
    _checks.operand(OP, name, t, x)
    _checks.shape(OP, name, t, *sizes)


def check_options(
    x: Tensor, act: str, act_slope: Any, gate: str, upsample: Any, target: str
) -> None:
    _checks.choice(OP, "act", act, ACTS)
    _checks.number(OP, "act_slope", act_slope, minimum=0)
    _checks.choice(OP, "gate", gate, GATES)
    _checks.choice(OP, "target", target, TARGETS)
    if upsample is not None:
        _checks.choice(OP, "upsample", upsample, UPSAMPLINGS[x.dim() - 2])


def check_grids(
    g: Tensor, grid: tuple[int, ...], wanted: tuple[int, ...], upsample: str | None
) -> None:
    """``grid`` is the logits', ``wanted`` that of the map they gate."""
    if upsample is not None:
        return
    if tuple(g.shape[2:]) != grid:
        given = f"{list(g.shape)} and upsample=None"
        _checks.fail(OP, "g", f"lie on theta's grid {list(grid)} or be upsampled to it", given)
    if grid != wanted:
        expected = (
            f"be given: the gate on theta's grid {list(grid)} multiplies a map on {list(wanted)}"
        )
        _checks.fail(OP, "upsample", expected, None)


def check_norm(name: str, norm: Any, x: Tensor, size: int, values: int) -> None:
    """``values`` is the number of values of a channel in the batch, ``size`` that of channels."""
    if norm is None:
        return
    if not isinstance(norm, BatchNorm):
        raise TypeError(f"{OP}: {name} must be a BatchNorm or None, got {type(norm).__name__}")
    _checks.number(OP, f"{name}.momentum", norm.momentum, minimum=0)
    _checks.number(OP, f"{name}.eps", norm.eps, minimum=0)
    if (norm.running_mean is None) != (norm.running_var is None):
        _checks.fail(OP, f"{name}.running_var", "be given exactly with running_mean", "one alone")
    for field in ("running_mean", "running_var", "weight", "bias"):
        t = getattr(norm, field)
        if t is not None:
            _weight(f"{name}.{field}", t, x, size)
    if norm.over_batch and values == 1:
        # torch's own words
        raise ValueError(
            f"{OP}: {name}: Expected more than 1 value per channel when training, got 1 "
            f"(x has shape {list(x.shape)})"
        )


def check_out_norm(norm: Any, x: Tensor, out_weight: Tensor | None, values: int) -> None:
    if norm is not None and out_weight is None:
        _checks.fail(OP, "out_norm", "be None when out_weight is None", type(norm).__name__)
    if out_weight is not None:
        check_norm("out_norm", norm, x, out_weight.shape[0], values)
