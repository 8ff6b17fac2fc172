"""Representative calls of the Triton launchers, for compilation ahead of time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnkern.ops.softmax_pool.reference import Inputs, Options
from attnkern.ops.softmax_pool.triton import softmax_pool_bwd, softmax_pool_fwd

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _train(
    dtype: torch.dtype,
    scorer: str,
    rows: tuple[int, int, int],
    items: int,
    features: int,
    units: int = 0,
    act: str = "tanh",
    *,
    columns: bool = False,
    keys: bool = False,
    ragged: bool = False,
    biased: bool = False,
    shared_query: bool = False,
    gate: bool = True,
    frozen: bool = False,
) -> None:
    """Forward and backward on meta tensors, with every gradient but that of ``frozen`` items."""

    def new(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    def items_of(size: int) -> Tensor:
        shape = (1 if ragged else rows[0], rows[1])
        if columns:
            return new(*shape, size, items, kind=dtype).transpose(2, 3)
        return new(*shape, items, size, kind=dtype)

    batch, heads, queries = rows
    samples = 1 if ragged else batch
    tensors = {"values": items_of(features)}
    if ragged:
        tensors["offsets"] = new(batch + 1, kind=torch.int64)
    if biased:
        tensors |= {"bias": new(samples, 1, queries, items)}
    if scorer == "given":
        tensors["scores"] = new(samples, heads, queries, items)
    elif scorer == "gated":
        for name in ("V", "U") if gate else ("V",):
            tensors[name] = new(units, features, kind=dtype)
            if biased:
                tensors[f"b_{name}"] = new(units)
        tensors["w"] = new(queries, units)
    else:
        units = units if keys else features
        if keys:
            tensors["keys"] = items_of(units)
        tensors["query"] = new(1 if shared_query else batch, heads, queries, units)
        if scorer == "additive":
            tensors["w"] = new(1, units)
    if biased and scorer != "given":
        tensors["c"] = new(1, heads, queries)
    i, o = Inputs(**tensors), Options(scorer, act, 0.5)
    z, _, top, scores = softmax_pool_fwd(*i, *o, biased)
    dscores = torch.empty_like(scores) if biased else None
    dlse = torch.empty_like(z[..., 0]) if biased else None
    needs = (not frozen, keys, scorer in ("dot", "additive"), i.w is not None, biased)
    softmax_pool_bwd(torch.empty_like(z), z, dlse, dscores, *i, top, *o, *needs)


def _call(name: str, dtype: str, *args: Any, **options: Any) -> tuple[str, Callable[[], None]]:
    return f"{name}, {dtype}", functools.partial(_train, _DTYPES[dtype], *args, **options)


# Heads of real networks, then the options that none of them has, then sizes that align with nothing.
CALLS: dict[str, Callable[[], None]] = dict(
    [
        _call("pool", "bf16", "given", (64, 1, 1), 196, 768),
        _call("pool map", "fp16", "given", (32, 1, 1), 3136, 256, columns=True, biased=True),
        _call("pool queries", "fp32", "given", (16, 1, 8), 256, 512, biased=True),
        _call("context", "bf16", "dot", (32, 1, 1), 3136, 256, columns=True, shared_query=True),
        _call("context", "fp32", "dot", (1, 1, 1), 100_000, 1024, shared_query=True, biased=True),
        _call("latent", "bf16", "dot", (32, 1, 16), 729, 1152, shared_query=True),
        _call("latent", "fp32", "dot", (32, 1, 16), 729, 1152, shared_query=True),
        _call("heads", "fp16", "dot", (8, 12, 67), 196, 64, 64, keys=True, biased=True),
        _call("captions", "fp32", "additive", (32, 1, 1), 196, 2048, 512, "relu", keys=True),
        _call("classes", "bf16", "additive", (1024, 1, 91), 49, 256, 128, keys=True),
        _call("gated bag", "bf16", "gated", (1, 1, 1), 100_000, 1024, 256, biased=True),
        _call("gated bag", "fp32", "gated", (1, 1, 2), 10_000, 1024, 256, frozen=True),
        _call("gated bags", "fp16", "gated", (32, 1, 3), 20_000, 512, 128, "gelu", ragged=True),
        _call("ungated", "bf16", "gated", (8, 1, 1), 2000, 384, 96, "relu", gate=False),
        _call("query bags", "bf16", "dot", (512, 1, 4), 200_000, 384, ragged=True),
        _call("odd bags", "fp16", "given", (7, 1, 3), 1001, 37, ragged=True),
        _call("odd bags", "fp32", "additive", (7, 1, 2), 1001, 37, ragged=True),
        _call("odd", "fp32", "dot", (7, 3, 5), 101, 33, biased=True),
        _call("odd", "bf16", "additive", (3, 1, 2), 57, 21, act="gelu", biased=True),
        _call("odd map", "fp32", "gated", (3, 1, 1), 49, 75, 19, columns=True, biased=True),
    ]
)
