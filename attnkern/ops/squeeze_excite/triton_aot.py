"""Representative calls of the Triton launchers, for compilation ahead of time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from attnkern.ops.squeeze_excite.cases import case
from attnkern.ops.squeeze_excite.reference import Options
from attnkern.ops.squeeze_excite.triton import squeeze_excite_bwd, squeeze_excite_fwd
from attnkern.testing import Case

_SHORTCUT = {"residual": True, "out_act": "relu"}
_ONE = {"gain": 2.0, "drop_path": True, "out_act": "hardswish"}
_LC0 = {"act": "mish", "apply": "scale_shift", **_SHORTCUT}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_INPUTS = ("x", "src", "w1", "b1", "w2", "b2", "act_weight", "residual", "drop_path")


def _train(c: Case, dtype: torch.dtype, weight_dtype: torch.dtype, channels_last: bool) -> None:
    """Forward and backward with every gradient, on meta tensors."""
    given: dict[str, Any] = {}
    for name, shape in c.shapes.items():
        kind = weight_dtype if name in c.weights else dtype if name in c.maps else torch.float32
        given[name] = torch.empty(shape, dtype=kind, device="meta")
        if channels_last and name in c.maps:
            given[name] = given[name].to(memory_format=torch.channels_last)
    tensors: list[Any] = [given.get(name) for name in _INPUTS]
    o = Options(**c.options)
    masked = o.out_act in ("relu", "relu6")
    y, *saved = squeeze_excite_fwd(*tensors, *o, masked)
    if masked or o.out_act == "identity":
        tensors[7] = None
    dlogits = torch.empty_like(saved[2])
    needs = (True, True, o.out_act != "identity")
    squeeze_excite_bwd(torch.empty_like(y), dlogits, *tensors, *saved, *o, *needs)


def _call(dtype: str, weights: str, layout: str, *args: Any, **options: Any) -> tuple[str, Any]:
    c = case(*args, **options)
    kinds = _DTYPES[dtype], _DTYPES[weights]
    call = functools.partial(_train, c, *kinds, layout == "last")
    return f"{c.name}, {dtype}, channels {layout}", call


# Stages of real networks, then the options that none of them has, then a program a sample.
CALLS: dict[str, Callable[[], None]] = dict(
    [
        _call("bf16", "bf16", "first", "seresnet50 stage 1", 32, 256, (56, 56), 16, **_SHORTCUT),
        _call("bf16", "bf16", "last", "seresnet50 stage 1", 32, 256, (56, 56), 16, **_SHORTCUT),
        _call("bf16", "bf16", "first", "seresnet50 stage 4", 256, 2048, (7, 7), 128, **_SHORTCUT),
        _call("fp16", "fp32", "first", "efficientnet_b0", 64, 32, (112, 112), 8, act="silu"),
        _call("fp16", "fp16", "last", "mobilenet_v3", 64, 960, (7, 7), 240, gate="hard_sigmoid"),
        _call("fp16", "fp16", "first", "lc0", 256, 1024, (8, 8), 64, **_LC0),
        _call("bf16", "fp32", "first", "silu", 8, 128, (28, 28), 8, residual=True, out_act="silu"),
        _call("fp32", "fp32", "last", "gelu", 8, 128, (28, 28), 8, act="gelu", out_act="gelu"),
        _call("bf16", "bf16", "last", "relu6", 8, 128, (28, 28), 8, act="relu6", out_act="relu6"),
        _call("fp16", "fp16", "first", "prelu", 8, 128, (28, 28), 8, prelu=8, apply="shift"),
        _call("fp32", "fp32", "first", "one sample", 1, 64, (512, 512), 4, **_ONE),
        _call("bf16", "bf16", "first", "one layer", 3, 51, (37, 39), None, layers=1, gate="tanh"),
        _call("fp32", "fp32", "last", "excite", 3, 51, (7, 9), None, layers=0, src=True),
        _call("fp16", "fp16", "first", "lc0 small", 256, 512, (8, 8), 64, **_LC0),
        _call("bf16", "fp32", "first", "odd", 8, 113, (7, 7), 9, prelu=9, **_SHORTCUT),
        _call("fp32", "fp32", "last", "odd", 8, 113, (7, 7), 9, residual=True, out_act="silu"),
        _call("bf16", "bf16", "last", "given", 8, 128, (7, 7), None, layers=1, src=True, **_ONE),
    ]
)
