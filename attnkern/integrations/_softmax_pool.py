"""Reads the arguments of the pooling functions off the children of another library's module.

Everything is read at the time of the call, as in ``_squeeze_excite.py``: where the children's
computation cannot be inlined, the module's own forward runs.  One result differs on purpose: a row
that is masked throughout gives 0, where a softmax over -inf gives NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnkern import _activations, _autocast
from attnkern.integrations._children import (
    altered,
    inlinable,
    refuse_child,
    refuse_linear,
    say_refused,
)
from attnkern.ops.softmax_pool import gated_attention_pool, query_attention_pool
from attnkern.ops.softmax_pool.reference import ACTS

_TENSORS = (Tensor, nn.Parameter)


def ready(module: nn.Module, arguments: Any, x: Any) -> bool:
    """Whether to serve this call: else the module's own forward decides."""
    if isinstance(arguments, str):
        say_refused(module, arguments)
        return False
    return inlinable() and _accepts(x, [t for t in arguments if isinstance(t, Tensor)])


def _accepts(x: Any, weights: list[Tensor]) -> bool:
    """Whether the stock module would take x beside these parameters."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() == 0:
        return False
    for t in weights:
        if t.device != x.device or t.dtype is not weights[0].dtype:
            return False
        # sharded and quantised parameters are wrapper subclasses; their layers know them
        if type(t) not in _TENSORS and hasattr(type(t), "__tensor_flatten__"):
            return False
    low = _autocast.lowers_to(x)
    if low is None:
        return x.dtype == weights[0].dtype
    return {x.dtype, weights[0].dtype} <= {torch.float32, low}


def dropping(module: nn.Module) -> bool:
    """Whether a dropout among the children is active."""
    return any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in module.modules())


# ------------------------------------------------------------------ a token that queries the tokens


class Projections(NamedTuple):
    """Query, key and value projections of a multi-head attention."""

    q_weight: Tensor
    q_bias: Tensor | None
    k_weight: Tensor
    k_bias: Tensor | None
    v_weight: Tensor
    v_bias: Tensor | None
    note: str = ""


def token_pool(
    tokens: Tensor, p: Projections, heads: int, scale: float | None, impl: str
) -> Tensor:
    """Multi-head attention of the first token over all: [B, 1, E] for tokens [B, N, D]."""
    query = F.linear(tokens[:, :1], p.q_weight, p.q_bias)
    return query_attention_pool(
        tokens,
        query,
        heads=heads,
        k_weight=p.k_weight,
        k_bias=p.k_bias,
        v_weight=p.v_weight,
        v_bias=p.v_bias,
        scale=scale,
        impl=impl,
    )


# ------------------------------------------------------------------ multiple-instance scorers


class Gated(NamedTuple):
    """What `gated_attention_pool` takes besides the instances."""

    V: Tensor
    b_V: Tensor | None
    U: Tensor | None
    b_U: Tensor | None
    w: Tensor
    b_w: Tensor | None
    act: str
    note: str = ""


def read_gated(V: Any, act: Any, w: Any, U: Any = None, gate: Any = None, note: str = "") -> Any:
    """`Gated` of a scorer's layers, or why they cannot be inlined."""
    for role, layer in (("first layer", V), ("last layer", w), ("gate's layer", U)):
        if layer is not None and (reason := refuse_linear(role, layer)):
            return reason
    found = _activations.read(act)
    if found is None or found.name not in ACTS:
        return f"its activation {type(act).__name__} is not supported"
    if reason := altered(act):
        return f"its activation {reason}"
    if U is None:
        return Gated(V.weight, V.bias, None, None, w.weight, w.bias, found.name, note)
    if reason := refuse_child("gate", gate, nn.Sigmoid):
        return reason
    return Gated(V.weight, V.bias, U.weight, U.bias, w.weight, w.bias, found.name, note)


def gated_pool(x: Tensor, a: Gated, impl: str, **options: Any) -> Any:
    return gated_attention_pool(
        x, a.V, a.b_V, a.U, a.b_U, a.w, a.b_w, act=a.act, impl=impl, **options
    )
