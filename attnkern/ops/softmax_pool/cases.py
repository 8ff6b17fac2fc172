"""Cases of the pooling functions for tests and benchmarks, and their eager formulations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkern.ops.softmax_pool.functions import (
    additive_attention_pool,
    context_attention_pool,
    gated_attention_pool,
    softmax_pool,
)
from attnkern.ops.softmax_pool.query import query_attention_pool
from attnkern.ops.softmax_pool.reference import ACTS
from attnkern.testing import Case, OpSpec, as_tuple

# ------------------------------------------------------------------ eager


def attend(
    e: Tensor, v: Tensor, keep: Tensor | None, bias: Tensor | None, temperature: float
) -> Any:
    """z, weights and lse of scores e [..., M, N] and values v [..., N, D], as a model writes it today."""
    logits = e / temperature if temperature != 1.0 else e
    if bias is not None:
        logits = logits + bias
    if keep is not None:
        logits = logits.masked_fill(~keep, float("-inf"))
    p = logits.softmax(-1)
    if keep is not None:  # a row that keeps nothing: nothing, not NaN
        p = p.masked_fill(~keep.any(-1, keepdim=True), 0.0)
    lse = torch.logsumexp(logits.to(torch.promote_types(e.dtype, torch.float32)), -1)
    return p @ v, p, lse


def _given(values: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    return scores, values


def _context(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return F.linear(x, weight.flatten(1), bias).transpose(1, 2), x


def _additive(
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    v: Tensor,
    c: Tensor | None = None,
    *,
    act: str = "tanh",
) -> tuple[Tensor, Tensor]:
    h = _act(keys.unsqueeze(-3) + query.unsqueeze(-2), act)
    e = F.linear(h, v.reshape(1, -1), c).squeeze(-1)
    return e, values


def _gated(
    x: Tensor,
    V: Tensor,
    w: Tensor,
    b_V: Tensor | None = None,
    U: Tensor | None = None,
    b_U: Tensor | None = None,
    b_w: Tensor | None = None,
    *,
    act: str = "tanh",
) -> tuple[Tensor, Tensor]:
    h = _act(F.linear(x, V, b_V), act)
    if U is not None:
        h = h * torch.sigmoid(F.linear(x, U, b_U))
    return F.linear(h, w, b_w).transpose(1, 2), x


def _act(h: Tensor, act: str) -> Tensor:
    return F.gelu(h) if act == "gelu" else getattr(torch, act)(h)


def _query(
    x: Tensor,
    query: Tensor,
    keys: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_weight: Tensor | None = None,
    v_bias: Tensor | None = None,
    *,
    heads: int = 1,
    scale: float | None = None,
    fold: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Every key and value projected, in heads: [B, H, M, N] and [B, H, N, D]."""
    k = x if keys is None else keys
    k = k if k_weight is None else F.linear(k, k_weight, k_bias)
    v = x if v_weight is None else F.linear(x, v_weight, v_bias)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, k, v))
    return (q * (scale or q.shape[-1] ** -0.5)) @ k.transpose(-2, -1), v


def eager(
    score: Callable[..., tuple[Tensor, Tensor]],
    *,
    keep: Callable[..., Tensor] | None = None,
    rows: tuple[int, ...] = (),
    lengths: tuple[int, ...] | None = None,
    temperature: float = 1.0,
    channels_first: bool = False,
    returns: tuple[str, ...] = (),
    **arguments: Any,
) -> Any:
    """``score`` and `attend` in the dtype of x; bag by bag with ``lengths``."""
    x = arguments["x"] if "x" in arguments else arguments["values"]
    tensors = {k: t.to(x.dtype) for k, t in arguments.items() if isinstance(t, Tensor)}
    options = {k: t for k, t in arguments.items() if k not in tensors}
    if lengths is not None:
        own = functools.partial(eager, score, temperature=temperature, returns=returns, **options)
        return _by_bag(own, tensors, lengths)
    for name in ("x", "values", "keys"):
        if name in tensors and (channels_first or x.dim() > 3):
            tensors[name] = tensors[name].flatten(2).transpose(1, 2)
    name = "scores" if "scores" in tensors else "query"
    single = name in tensors and tensors[name].dim() == 2
    if single:
        tensors[name] = tensors[name].unsqueeze(1)
    bias = tensors.pop("logit_bias", None)
    e, v = score(**tensors, **options)
    if bias is not None and e.dim() == 4 > bias.dim():
        bias = bias.unsqueeze(1)
    z, p, lse = attend(e, v, None if keep is None else keep(e), bias, temperature)
    if e.dim() == 4:
        z = z.transpose(1, 2).flatten(2)
        if e.shape[1] == 1:
            p, e, lse = p.squeeze(1), e.squeeze(1), lse.squeeze(1)
    if single:
        z, p, e, lse = z.squeeze(1), p.squeeze(-2), e.squeeze(-2), lse.squeeze(-1)
    out = [z, *({"weights": p, "scores": e, "lse": lse}[name] for name in returns)]
    return tuple(out) if len(out) > 1 else z


def _by_bag(
    function: Callable[..., Any], tensors: dict[str, Tensor], lengths: tuple[int, ...]
) -> Any:
    parts = []
    for bag, (start, end) in enumerate(pairwise(bounds(lengths))):
        own = dict(tensors)
        for name, t in tensors.items():
            if name in ("x", "values", "keys"):
                own[name] = t[start:end][None]
            elif name in ("scores", "logit_bias"):
                own[name] = t[..., start:end][None]
            elif name == "query" and t.shape[0] > 1:
                own[name] = t[bag : bag + 1]
        parts.append(as_tuple(function(**own)))
    outputs = []
    for position, parts_of in enumerate(zip(*parts, strict=True)):
        by_item = position > 0 and parts_of[0].shape[-1] == lengths[0]
        outputs.append(torch.cat([t[0] for t in parts_of], -1) if by_item else torch.cat(parts_of))
    return tuple(outputs) if len(outputs) > 1 else outputs[0]


def bounds(lengths: tuple[int, ...]) -> list[int]:
    return [0, *accumulate(lengths)]


# ------------------------------------------------------------------ masks


def pattern(e: Tensor) -> Tensor:
    """Two items in three, another choice for every row of e, and nothing for the first row."""
    index = torch.arange(e.numel(), device=e.device).reshape(e.shape)
    keep = (index * 7 + index // 5) % 3 > 0
    keep.view(-1, e.shape[-1])[:1] = False
    return keep


def padding(e: Tensor) -> Tensor:
    """Sample b lacks its last b items; one mask for all rows of a sample."""
    kept = e.shape[-1] - torch.arange(e.shape[0], device=e.device)
    keep = torch.arange(e.shape[-1], device=e.device) < kept[:, None]
    return keep.reshape(e.shape[0], *(1,) * (e.dim() - 2), e.shape[-1])


def _mask(keep: Callable[..., Tensor], rows: tuple[int, ...], device: torch.device) -> Tensor:
    mask = keep(torch.empty(rows, device=device))
    return mask.squeeze(1) if mask.dim() > 2 and mask.shape[1] == 1 else mask


def call(
    function: Callable[..., Any],
    *,
    keep: Callable[..., Tensor] | None = None,
    rows: tuple[int, ...] = (),
    lengths: tuple[int, ...] | None = None,
    returns: tuple[str, ...] = (),
    **arguments: Any,
) -> Any:
    """The public ``function``, with mask and offsets made from the options of a case."""
    x = arguments["x"] if "x" in arguments else arguments["values"]
    if lengths is not None:
        arguments["offsets"] = torch.tensor(bounds(lengths), device=x.device)
    if keep is not None:
        arguments["mask"] = _mask(keep, (x.shape[0], *rows), x.device)
    if function is gated_attention_pool:
        arguments = {**dict.fromkeys(("b_V", "U", "b_U")), **arguments}
    if function is not context_attention_pool and "logit_bias" in arguments:
        arguments["bias"] = arguments.pop("logit_bias")
    return function(**arguments, **{f"return_{name}": True for name in returns})


# ------------------------------------------------------------------ cases

WEIGHTS = (
    *("scores", "weight", "bias", "query", "k_weight", "k_bias", "v_weight", "v_bias"),
    *("v", "c", "V", "b_V", "U", "b_U", "w", "b_w", "logit_bias"),
)
ALL = ("weights", "scores", "lse")


def case(name: str, shapes: dict[str, tuple[int, ...]], **options: Any) -> Case:
    """A Case whose linear maps keep the size of what they map; samples are those of every batched tensor."""
    scale = {
        k: 2 * s[1] ** -0.5
        for k, s in shapes.items()
        if k in WEIGHTS and k[-1] != "s" and len(s) > 1
    }
    scale |= {"scores": 2.0, "query": 1.0, "logit_bias": 2.0}
    batched = ("x", "values", "keys", "scores", "query", "logit_bias")
    per_sample = (
        ()
        if "lengths" in options
        else tuple(
            k for k in batched if k in shapes and shapes[k][0] == shapes[next(iter(shapes))][0]
        )
    )
    maps = tuple(k for k in ("x", "values", "keys") if k in shapes)
    return Case(name, shapes, options, maps, WEIGHTS, scale, per_sample)


def _gated_shapes(
    x: tuple[int, ...], hidden: int, branches: int = 1, *, gate: bool = True, bias: bool = True
) -> dict[str, tuple[int, ...]]:
    features = x[1] if len(x) > 3 else x[-1]
    shapes = {"x": x, "V": (hidden, features), "w": (branches, hidden)}
    if gate:
        shapes["U"] = (hidden, features)
    if bias:
        shapes |= {"b_V": (hidden,), "b_w": (branches,)} | ({"b_U": (hidden,)} if gate else {})
    return shapes


def _latent(x: tuple[int, int, int], query: tuple[int, ...], out: int | None = None) -> Any:
    width, features = query[-1], x[2]
    out = out or width
    return {
        **{"x": x, "query": query, "k_weight": (width, features), "k_bias": (width,)},
        **{"v_weight": (out, features), "v_bias": (out,)},
    }


# Sizes are odd on purpose: no vector width or tile divides them.  A bias of the scores moves nothing but
# scores and lse, so every case that has one returns them: the gradient would be rounding noise alone.
_GIVEN = [
    case("pool", {"values": (3, 17, 37), "scores": (3, 17)}),
    case("pool_queries", {"values": (2, 29, 16), "scores": (2, 5, 29)}, returns=ALL),
    case(
        "pool_mask",
        {"values": (3, 29, 9), "scores": (3, 4, 29)},
        keep=pattern,
        rows=(4, 29),
        returns=ALL,
    ),
    case(
        "pool_bias",
        {"values": (2, 31, 20), "scores": (2, 3, 31), "logit_bias": (2, 1, 31)},
        temperature=0.5,
        returns=("weights", "lse"),
    ),
    case("pool_map", {"values": (2, 24, 5, 6), "scores": (2, 3, 30)}),
    case("pool_columns", {"values": (2, 24, 37), "scores": (2, 37)}, channels_first=True),
    case("pool_one_item", {"values": (4, 1, 7), "scores": (4, 2, 1)}, returns=("lse",)),
    case("pool_one_feature", {"values": (2, 50, 1), "scores": (2, 50)}),
    case("pool_long", {"values": (1, 5003, 8), "scores": (1, 5003)}, returns=("lse",)),
    case("pool_bags", {"values": (23, 12), "scores": (3, 23)}, lengths=(7, 0, 11, 5), returns=ALL),
]
_CONTEXT = [
    case("context", {"x": (2, 64, 7, 7), "weight": (1, 64, 1, 1), "bias": (1,)}, returns=ALL),
    case(
        "context_queries",
        {"x": (3, 19, 40), "weight": (4, 40)},
        keep=padding,
        rows=(1, 19),
        returns=ALL,
    ),
    case(
        "context_3d",
        {"x": (2, 6, 3, 4, 5), "weight": (2, 6), "bias": (2,)},
        temperature=2.0,
        returns=("lse",),
    ),
    case("context_long", {"x": (1, 4099, 24), "weight": (1, 24)}, returns=("lse",)),
    case("context_wide", {"x": (2, 33, 700), "weight": (3, 700)}),
    case("context_many", {"x": (2, 9, 21), "weight": (67, 21)}),
    case(
        "context_bags",
        {"x": (40, 18), "weight": (2, 18), "bias": (2,), "logit_bias": (40,)},
        lengths=(13, 1, 0, 26),
        returns=ALL,
    ),
]
_QUERY = [
    case("query", {"x": (2, 21, 32), "query": (2, 32)}),
    case("query_heads", {"x": (2, 21, 32), "query": (1, 3, 32)}, heads=4, returns=ALL),
    case("latent", _latent((2, 25, 48), (1, 1, 48)), heads=4, returns=("scores",)),
    case("latent_queries", _latent((2, 25, 40), (2, 3, 48), 36), heads=3, returns=ALL),
    case("latent_projected", _latent((2, 25, 48), (1, 2, 48)), heads=4, fold=False, returns=ALL),
    case(
        "latent_mask",
        _latent((2, 25, 48), (1, 3, 48)),
        heads=2,
        keep=pattern,
        rows=(2, 3, 25),
        returns=ALL,
    ),
    case("query_values", {"x": (2, 21, 32), "query": (1, 2, 32), "v_weight": (24, 32)}, heads=4),
    case("query_key_map", {"x": (2, 21, 32), "query": (2, 24), "k_weight": (24, 32)}, heads=2),
    case(
        "query_keys",
        {"x": (2, 21, 36), "keys": (2, 21, 24), "query": (1, 2, 24), "v_weight": (12, 36)},
        heads=3,
        scale=0.3,
    ),
    case(
        "query_map", {**_latent((2, 25, 30), (1, 1, 30)), "x": (2, 30, 5, 5)}, heads=3, returns=ALL
    ),
    case(
        "query_bias",
        {"x": (2, 21, 32), "query": (1, 2, 32), "logit_bias": (2, 1, 1, 21)},
        heads=4,
    ),
    case(
        "query_bags", {"x": (31, 16), "query": (4, 2, 16)}, lengths=(9, 0, 20, 2), returns=("lse",)
    ),
]
_ADDITIVE_SHAPES = {"keys": (2, 30, 24), "values": (2, 30, 40), "query": (2, 24), "v": (24,)}
_ADDITIVE = [
    case("additive", {**_ADDITIVE_SHAPES, "c": (1,)}, returns=ALL),
    case(
        "additive_classes",
        {"keys": (3, 10, 7, 7), "values": (3, 32, 7, 7), "query": (1, 11, 10), "v": (1, 10)},
        act="relu",
    ),
    case(
        "additive_mask",
        {**_ADDITIVE_SHAPES, "query": (2, 3, 24)},
        keep=pattern,
        rows=(3, 30),
        returns=ALL,
    ),
    *(case(f"additive_{act}", _ADDITIVE_SHAPES, act=act) for act in ACTS),
    case(
        "additive_bags",
        {"keys": (29, 6), "values": (29, 14), "query": (3, 2, 6), "v": (6,), "c": (1,)},
        lengths=(0, 17, 12),
        returns=ALL,
    ),
]
_GATED = [
    case("gated", _gated_shapes((1, 157, 40), 24), returns=("scores",)),
    case("gated_branches", _gated_shapes((2, 61, 33), 19, 3, bias=False), returns=ALL),
    case("ungated", _gated_shapes((2, 50, 24), 16, gate=False), returns=("lse",)),
    case("gated_mask", _gated_shapes((3, 29, 20), 12, 2), keep=padding, rows=(1, 29), returns=ALL),
    case("gated_map", _gated_shapes((2, 26, 5, 9), 12), returns=("weights", "scores")),
    case("gated_wide", _gated_shapes((1, 70, 300), 130, 2, bias=False)),
    *(case(f"gated_{act}", _gated_shapes((1, 41, 18), 9, bias=False), act=act) for act in ACTS),
    case("gated_bags", _gated_shapes((44, 21), 15, 2), lengths=(20, 0, 1, 23), returns=ALL),
]

SPECS = [
    OpSpec(
        function.__name__,
        functools.partial(call, function),
        functools.partial(eager, score),
        cases,
        "softmax_pool_fwd",
    )
    for function, score, cases in (
        (softmax_pool, _given, _GIVEN),
        (context_attention_pool, _context, _CONTEXT),
        (query_attention_pool, _query, _QUERY),
        (additive_attention_pool, _additive, _ADDITIVE),
        (gated_attention_pool, _gated, _GATED),
    )
]
