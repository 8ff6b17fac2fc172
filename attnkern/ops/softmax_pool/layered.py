"""Pools whose scorers are called on every item, as layers that are more than their weights need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from attnkern.ops.softmax_pool import checks
from attnkern.ops.softmax_pool.call import bags_of
from attnkern.ops.softmax_pool.functions import softmax_pool
from attnkern.ops.softmax_pool.query import query_attention_pool
from attnkern.ops.softmax_pool.reference import Inputs, activation, by_item

Layer = Callable[[Tensor], Tensor]


def gated(
    scorer: Layer, x: Tensor, *, offsets: Any = None, channels_first: bool = False, **options: Any
) -> Any:
    """`gated_attention_pool` by a scorer of items, [B, N, D] -> [B, N, M]."""
    items = checks.items_of("gated_attention_pool", "x", x, offsets, channels_first)
    scores = _per_query(scorer(items.squeeze(1)), offsets)
    return softmax_pool(scores, x, offsets=offsets, channels_first=channels_first, **options)


def additive(
    scorer: Layer,
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    act: str,
    *,
    offsets: Any = None,
    channels_first: bool = False,
    **options: Any,
) -> Any:
    """`additive_attention_pool` by a scorer of hidden units, [B, N, M, K] -> [B, N, M, 1]."""
    op = "additive_attention_pool"
    x = checks.items_of(op, "values", values, offsets, channels_first)
    k = checks.items_of(op, "keys", keys, offsets, channels_first, like=x)
    q = checks.queries_of(op, query, x, bags_of(op, x, offsets), k.shape[3])
    hidden = by_item(q.unsqueeze(1), Inputs(x, offsets=offsets)) + k.unsqueeze(3)
    scores = _per_query(scorer(activation(hidden, act).squeeze(1)).squeeze(3), offsets)
    if query.dim() == 2:
        scores = scores.squeeze(-2)
    return softmax_pool(scores, values, offsets=offsets, channels_first=channels_first, **options)


def query(
    kv: Layer,
    x: Tensor,
    queries: Tensor,
    *,
    offsets: Any = None,
    channels_first: bool = False,
    fold: bool | None = None,
    **options: Any,
) -> Any:
    """`query_attention_pool` with keys and values side by side from a projection; none is folded."""
    items = checks.items_of("query_attention_pool", "x", x, offsets, channels_first)
    rows = items[:, 0] if offsets is None else items[0, 0]
    keys, values = kv(rows).chunk(2, -1)
    return query_attention_pool(values, queries, keys=keys, offsets=offsets, **options)


def _per_query(scores: Tensor, offsets: Any) -> Tensor:
    """[B, N, M] -> [B, M, N], of bags [1, N, M] -> [M, N]."""
    scores = scores.transpose(1, 2)
    return scores if offsets is None else scores.squeeze(0)
