"""Representative calls of the Triton launchers, for compilation ahead of time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnkern.ops.attention_gate.reference import Branch, Inputs, Options
from attnkern.ops.attention_gate.triton import (
    attention_gate_bwd,
    attention_gate_fwd,
    attention_gate_moments,
    attention_gate_sums,
    gate_apply_bwd,
    gate_apply_fwd,
    gate_norm_bwd,
    gate_norm_fwd,
)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Three = tuple[int, int, int]


def _new(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=kind, device="meta")


def _train(
    dtype: torch.dtype,
    shape: tuple[int, int, int, int, int],
    hidden: int,
    *,
    gating: tuple[int, int, int, int] | None = None,
    kernel: Three = (1, 1, 1),
    act: str = "relu",
    target: str = "x",
    last: bool = False,
    bias: bool = True,
    norm: bool = False,
) -> None:
    """Forward and backward on meta tensors; ``gating`` is G and g's sizes, resampled where not the grid's."""

    def map_of(*shape: int) -> Tensor:
        if last:
            return _new(shape[0], *shape[2:], shape[1], kind=dtype).movedim(-1, 1)
        return _new(*shape, kind=dtype)

    batch, channels, *sizes = shape
    grid = [size // k for size, k in zip(sizes, kernel, strict=True)]
    g_channels, *g_sizes = gating or (channels, *grid)
    x, like = map_of(*shape), _new(hidden)
    theta = _new(hidden, channels * kernel[0] * kernel[1] * kernel[2])
    if g_sizes == grid:
        g, phi, taps = map_of(batch, g_channels, *g_sizes), _new(hidden, g_channels), None
    else:
        g, phi = map_of(batch, hidden, *g_sizes), None
        taps = _new(sum(grid), 2, kind=torch.int64)
    i = Inputs(
        *(x, g, theta, phi, like if bias else None, like, _new(1) if bias else None, taps),
        tap_weights=None if taps is None else _new(sum(grid), 2),
    )
    applied = not norm and phi is not None and kernel == (1, 1, 1)
    o = Options(act, 0.1, *kernel, target, applied)
    q, _ = attention_gate_fwd(*i, *o)
    gated = x if target == "x" else g
    theta_branch = phi_branch = Branch(None, None, None)  # type: ignore[arg-type]
    if norm:
        moments = attention_gate_moments(x, theta, *kernel)
        gate_norm_fwd(theta, None, like, like if bias else None, *moments, 1e-5)
        gate_norm_bwd(q, like, like, *moments, like, 1e-5)
        theta_branch = Branch(like, like, like)
        if phi is not None:
            attention_gate_moments(g, phi, 1, 1, 1)
            phi_branch = theta_branch
        attention_gate_sums(q, *i, theta_branch.scale, phi_branch.scale, *o)
    if not applied:
        alpha = _new(batch, *gated.shape[2:])
        gate_apply_bwd(gate_apply_fwd(gated, alpha), gated, alpha)
    d, dq = torch.empty_like(gated), None if applied else q
    attention_gate_bwd(d, dq, *i, q, *theta_branch, *phi_branch, *o, True, True, True)


def _call(name: str, dtype: str, *args: Any, **options: Any) -> tuple[str, Callable[[], None]]:
    return f"{name}, {dtype}", functools.partial(_train, _DTYPES[dtype], *args, **options)


# Gates of real networks at their levels, then the options that none of them has, then sizes that align with nothing.
CALLS: dict[str, Callable[[], None]] = dict(
    [
        _call("monai, top", "bf16", (4, 32, 1, 256, 256), 16),
        _call("monai, top", "fp32", (4, 32, 1, 256, 256), 16),
        _call("monai, 3-D", "fp16", (2, 64, 96, 96, 96), 32),
        _call("monai, deep", "bf16", (8, 512, 1, 32, 32), 256),
        _call("monai, deep", "fp16", (8, 256, 1, 32, 32), 128, last=True),
        _call("monai, training", "fp32", (4, 256, 1, 64, 64), 128, norm=True, last=True),
        _call("monai, training", "fp16", (4, 256, 1, 64, 64), 128, norm=True),
        _call("oktay", "bf16", (2, 64, 48, 80, 80), 64, gating=(128, 12, 20, 20), kernel=(2, 2, 2)),
        _call("oktay", "fp32", (2, 64, 48, 80, 80), 64, gating=(128, 12, 20, 20), kernel=(2, 2, 2)),
        _call("strided", "bf16", (4, 32, 1, 128, 128), 32, gating=(64, 1, 64, 64), kernel=(1, 2, 2), norm=True),
        _call("coarse, training", "fp16", (8, 128, 1, 64, 64), 64, gating=(256, 1, 32, 32), norm=True),
        _call("coarse", "bf16", (8, 128, 1, 64, 64), 64, gating=(256, 1, 32, 32), last=True),
        _call("of g", "bf16", (4, 64, 1, 64, 64), 32, target="g", act="leaky_relu", last=True),
        _call("softplus", "fp32", (4, 64, 1, 64, 64), 32, act="softplus", bias=False),
        _call("odd", "fp32", (3, 75, 1, 7, 7), 19, gating=(37, 1, 7, 7), norm=True),
        _call("odd", "bf16", (3, 75, 1, 7, 7), 67, gating=(37, 1, 7, 7)),
        _call("odd patches", "fp16", (3, 33, 5, 7, 9), 19, gating=(9, 2, 3, 4), kernel=(1, 2, 2), norm=True),
        _call("odd patches", "fp32", (3, 33, 5, 7, 9), 19, gating=(9, 2, 3, 4), kernel=(1, 2, 2), last=True),
    ]
)  # fmt: skip
