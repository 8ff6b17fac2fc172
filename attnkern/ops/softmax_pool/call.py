"""What the pooling functions share: their options to normal form, the operator, and its results to user shapes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkern.ops.softmax_pool import checks, reference
from attnkern.ops.softmax_pool.op import pool
from attnkern.ops.softmax_pool.reference import Inputs, Options

Results = tuple[Tensor, Tensor | None, Tensor | None, Tensor]
"""z, weights, scores and lse, in normal form and accumulation dtype."""


class Common(NamedTuple):
    """The options that every pooling function has."""

    mask: Tensor | None = None
    bias: Tensor | None = None
    offsets: Tensor | None = None
    temperature: float = 1.0
    return_weights: bool = False
    return_scores: bool = False
    return_lse: bool = False
    impl: str = "auto"
    bias_name: str = "bias"


def bags_of(op: str, values: Tensor, offsets: Any) -> int:
    if offsets is None:
        return values.shape[0]
    checks.check_offsets(op, offsets, values)
    return offsets.shape[0] - 1


def run(
    op: str, i: Inputs, scorer: str, act: str, common: Common, rows: tuple[int, int, int]
) -> Results:
    """z [B, H, M, D], weights and scores [B, H, M, N] where asked for (B = 1 of bags), lse [B, H, M].

    Where every head reads whole items (one head of values, H heads of queries) heads are queries.
    """
    checks.check_options(op, act, common.temperature)
    offsets = common.offsets
    ragged = offsets is not None
    bias = checks.logit_bias(op, common.mask, common.bias, common.bias_name, i.values, rows, ragged)
    heads = rows[1]
    shared = heads > i.values.shape[1]
    if shared:
        i = i._replace(query=_heads_as_queries(i.query), c=_heads_as_queries(i.c))
        if bias is not None and bias.shape[1:3] != (1, 1):
            bias = _heads_as_queries(bias.expand(-1, *rows[1:], -1))
    if offsets is not None or bias is not None:
        i = i._replace(bias=bias, offsets=None if offsets is None else offsets.contiguous())
    o = Options(scorer, act, 1.0 / common.temperature)
    want_scores = common.return_weights or common.return_scores
    z, lse, e = pool(op, common.impl, i, o, want_scores)
    weights = reference.weights_of(e, i, o) if common.return_weights else None
    scores = e if common.return_scores else None
    if not shared:
        return z, weights, scores, lse
    z, lse = _queries_as_heads(z, heads), _queries_as_heads(lse, heads)
    weights, scores = (t if t is None else _queries_as_heads(t, heads) for t in (weights, scores))
    return z, weights, scores, lse


def results_of(
    z: Tensor,
    results: Results,
    common: Common,
    dtype: torch.dtype,
    single: bool = False,
    heads: bool = False,
) -> Any:
    """z [B, M, D] and what was asked for besides, in ``dtype``, without the axes that the call does not have."""
    _, weights, scores, lse = results
    out = [(z.squeeze(1) if single else z).to(dtype)]
    for t in (weights, scores):
        if t is not None:
            t = t.squeeze(2) if single else t
            t = t if heads else t.squeeze(1)
            out.append((t if common.offsets is None else t.squeeze(0)).to(dtype))
    if common.return_lse:
        lse = lse.squeeze(2) if single else lse
        out.append(lse if heads else lse.squeeze(1))
    return tuple(out) if len(out) > 1 else out[0]


def _heads_as_queries(t: Any) -> Any:
    """[B, H, M, ...] -> [B, 1, H M, ...]."""
    return None if t is None else t.flatten(1, 2).unsqueeze(1)


def _queries_as_heads(t: Tensor, heads: int) -> Tensor:
    """[B, 1, H M, ...] -> [B, H, M, ...]."""
    return t.squeeze(1).unflatten(1, (heads, -1))
