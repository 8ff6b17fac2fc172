"""The pooling functions: user arguments to normal form, the operator, and its results to user shapes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkern import _checks
from attnkern.ops.softmax_pool import checks, reference
from attnkern.ops.softmax_pool.op import pool
from attnkern.ops.softmax_pool.reference import Inputs, Options, accumulation_dtype

Results = tuple[Tensor, Tensor | None, Tensor | None, Tensor]
"""z, weights, scores and lse, in normal form."""


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


def softmax_pool(
    scores: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
    temperature: float = 1.0,
    channels_first: bool = False,
    return_weights: bool = False,
    return_scores: bool = False,
    return_lse: bool = False,
    impl: str = "auto",
) -> Any:
    r"""Pool ``values`` by the softmax of given ``scores``.

    .. math::
        p_{mn} = \mathrm{softmax}_n(e_{mn} / T + b_{mn}), \quad z_m = \sum_n p_{mn} v_n

    Args:
        scores: e, [B, N], or [B, M, N] for M queries over the same values; values' dtype or float32.
        values: [B, N, D], or channels first [B, D, *spatial] (4-D and 5-D tensors always; 3-D ones
            with ``channels_first``), read in place; float32, bfloat16, float16, or float64 (CPU).
        mask: True where an item takes part, [B, N] or [B, M, N]; sizes of 1 broadcast.
        bias: added to e / T, shapes as for ``mask``.
        offsets: [B+1] int64, from 0 to N, not decreasing: items of all bags stand in one row, values
            [N, D], scores, mask and bias [N] or [M, N]; bag b is offsets[b]..offsets[b+1].  Their
            order is checked once a tensor, outside torch.compile.
        temperature: T > 0.
        return_weights: also return p, [B, N] or [B, M, N] ([N] or [M, N] of bags), differentiable.
        return_scores: also return e in the values' dtype.
        return_lse: also return log sum_n exp(e / T + b), [B] or [B, M], float32 (float64 for float64).
        impl: auto, native, triton or reference; an explicit choice never falls back.

    Returns:
        z, [B, M, D] ([B, D] for scores without M) in the values' dtype; with any ``return_...`` a tuple
        of z, weights, scores and lse, those asked for.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what was given.

    A row that is masked throughout, or a bag without items, gives z = 0, lse = -inf and no gradient.
    Sums run in float32 (float64 for float64) in a fixed order: results repeat bit for bit.  Backward
    keeps the inputs, z and lse.

    >>> softmax_pool(torch.zeros(2, 5), torch.ones(2, 5, 3))
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """
    op = "softmax_pool"
    v = checks.items_of(op, "values", values, offsets, channels_first)
    common = Common(
        mask, bias, offsets, temperature, return_weights, return_scores, return_lse, impl
    )
    _checks.tensor(op, "scores", scores)
    ragged = offsets is not None
    single = scores.dim() == 2 - ragged
    rows = (_bags(op, v, offsets), 1, 1 if single else scores.shape[max(0, scores.dim() - 2)])
    kinds = (v.dtype, torch.float32)
    e = checks.per_row(op, "scores", scores, v, rows, ragged, kinds, exact=True)
    results = _run(op, Inputs(v, scores=e), "given", "tanh", common, rows)
    return _results(results[0].squeeze(1), results, common, single)


def context_attention_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    logit_bias: Tensor | None = None,
    offsets: Tensor | None = None,
    temperature: float = 1.0,
    channels_first: bool = False,
    return_weights: bool = False,
    return_scores: bool = False,
    return_lse: bool = False,
    impl: str = "auto",
) -> Any:
    r"""Pool x by a linear scorer: :math:`e_{mn} = w_m \cdot x_n + b_m`, w a learned context vector.

    Args:
        x: items, as the ``values`` of `softmax_pool`.
        weight: w, [M, D], as ``nn.Linear(D, M)`` or a 1x1 convolution stores it; x's dtype or float32.
        bias: b, [M] or None.
        logit_bias: the additive bias of the logits, the ``bias`` of `softmax_pool`.

    The other arguments, the results (z is [B, M, D]) and the errors are those of `softmax_pool`.

    Source: Cao et al., GCNet, arXiv:1904.11492.

    >>> context_attention_pool(torch.randn(2, 64, 7, 7), torch.randn(1, 64, 1, 1)).shape
    torch.Size([2, 1, 64])
    """
    op = "context_attention_pool"
    v = checks.items_of(op, "x", x, offsets, channels_first)
    common = Common(
        mask, logit_bias, offsets, temperature, return_weights, return_scores, return_lse, impl
    )
    checks.small(op, "weight", weight, v, "M", v.shape[3])
    queries = weight.shape[0]
    c = None
    if bias is not None:
        checks.small(op, "bias", bias, v, queries)
        c = bias.reshape(1, 1, queries)
    i = Inputs(v, query=weight.reshape(1, 1, queries, v.shape[3]), c=c)
    results = _run(op, i, "dot", "tanh", common, (_bags(op, v, offsets), 1, queries))
    return _results(results[0].squeeze(1), results, common, False)


def query_attention_pool(
    x: Tensor,
    query: Tensor,
    *,
    heads: int = 1,
    keys: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_weight: Tensor | None = None,
    v_bias: Tensor | None = None,
    scale: float | None = None,
    fold: bool | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
    temperature: float = 1.0,
    channels_first: bool = False,
    return_weights: bool = False,
    return_scores: bool = False,
    return_lse: bool = False,
    impl: str = "auto",
) -> Any:
    r"""Pool x by scaled dot products with given queries, in heads: attention that keeps few queries.

    .. math::
        e^h_{mn} = s\, q^h_m \cdot k^h_n, \quad z^h_m = \sum_n \mathrm{softmax}_n(e^h_{mn}) v^h_n,
        \quad k = W_k x + b_k,\ v = W_v x + b_v

    Keys and values that are linear maps of x are *folded* away: with :math:`u^h_m = {W^h_k}^T q^h_m`
    the scores are :math:`s\,(u^h_m \cdot x_n + q^h_m \cdot b^h_k)` and
    :math:`z^h_m = W^h_v \sum_n p^h_{mn} x_n + b^h_v`, so that x is read once and never projected.

    Args:
        x: items, as the ``values`` of `softmax_pool`.
        query: q, [1, M, E] shared by all samples or [B, M, E]; without M, z has none.  E is the width
            of the keys, D where there is no projection; head h has columns h E/H to (h+1) E/H.
        heads: H, which divides E and the width of the values.
        keys: given keys of x's layout, of width E: for keys that are no linear map of x (normalised,
            rotated).  Excludes ``k_weight``; scores are then computed from them.
        k_weight, k_bias: W_k [E, D] and b_k [E] or None; None: the keys are x.
        v_weight, v_bias: W_v [F, D] and b_v [F] or None; None: the values are x.
        scale: s; 1/sqrt(E/H) when None.
        fold: fold projections (True), project every item (False), or fold where it needs fewer
            multiplications, M H < E (None).
        bias: added to the logits, as for `softmax_pool`; [B, H, M, N] a head.

    The other arguments and the errors are those of `softmax_pool`.

    Returns:
        z, [B, M, F] ([B, F] for a query without M), heads side by side, in x's dtype; weights and
        scores [B, H, M, N], lse [B, H, M], without H for one head.

    Source: Vaswani et al., arXiv:1706.03762; Lee et al., Set Transformer, arXiv:1810.00825 (latent queries).

    >>> x, q, w = torch.randn(2, 50, 64), torch.randn(1, 1, 64), torch.randn(64, 64)
    >>> query_attention_pool(x, q, heads=8, k_weight=w, v_weight=w).shape
    torch.Size([2, 1, 64])
    """
    op = "query_attention_pool"
    v = checks.items_of(op, "x", x, offsets, channels_first)
    common = Common(
        mask, bias, offsets, temperature, return_weights, return_scores, return_lse, impl
    )
    bags, width = _bags(op, v, offsets), v.shape[3]
    if not isinstance(heads, int) or heads < 1:
        _checks.fail(op, "heads", "be an int of at least 1", heads)
    k = None
    if keys is not None:
        if k_weight is not None:
            _checks.fail(op, "k_weight", "be None when keys are given", "a tensor")
        k = checks.items_of(op, "keys", keys, offsets, channels_first, like=v)
        if k.shape[:3] != v.shape[:3]:
            _checks.fail(op, "keys", f"have the items of x {list(x.shape)}", list(keys.shape))
        width = k.shape[3]
    if k_weight is not None:
        checks.small(op, "k_weight", k_weight, v, "E", v.shape[3])
        k_weight, width = k_weight.flatten(1), k_weight.shape[0]
    if k_bias is not None:
        if k_weight is None:
            _checks.fail(op, "k_bias", "be None when k_weight is None", "a tensor")
        checks.small(op, "k_bias", k_bias, v, width)
    out = v.shape[3]
    if v_weight is not None:
        checks.small(op, "v_weight", v_weight, v, "F", v.shape[3])
        v_weight, out = v_weight.flatten(1), v_weight.shape[0]
    if v_bias is not None:
        if v_weight is None:
            _checks.fail(op, "v_bias", "be None when v_weight is None", "a tensor")
        checks.small(op, "v_bias", v_bias, v, out)
    for name, size in (("E", width), ("F", out)):
        if size % heads:
            _checks.fail(op, "heads", f"divide the width of keys and values, {name}={size}", heads)
    if scale is not None:
        _checks.number(op, "scale", scale)
    q = checks.queries_of(op, query, v, bags, width)  # [B or 1, M, E]
    single, queries = query.dim() == 2, q.shape[1]
    acc = accumulation_dtype(v.dtype)
    scale = (width // heads) ** -0.5 if scale is None else float(scale)
    q = _split(q.to(acc) * scale, heads)  # [B or 1, H, M, E/H]
    few = queries * heads < width if fold is None else fold

    c = None
    if k_bias is not None:
        c = torch.einsum("bhme,he->bhm", q, k_bias.to(acc).reshape(heads, -1))
    few = queries * heads < width if fold is None else fold
    if few and keys is None and (k_weight is not None or v_weight is not None):
        u = _as_features(q, k_weight, v.shape[3])
        results = _run(op, Inputs(v, query=u, c=c), "dot", "tanh", common, (bags, heads, queries))
        z = _project(results[0], results[3], v_weight, v_bias)
    else:
        if fold and keys is not None:
            _checks.fail(
                op,
                "fold",
                "be None or False when keys are given, which may be no linear map of x",
                fold,
            )
        if k_weight is not None:
            k = F.linear(v, k_weight.to(v.dtype))
        if v_weight is not None:
            k = v if k is None else k
            v = F.linear(v, v_weight.to(v.dtype), None if v_bias is None else v_bias.to(v.dtype))
        i = Inputs(_split(v[:, 0], heads), None if k is None else _split(k[:, 0], heads), q, c=c)
        results = _run(op, i, "dot", "tanh", common, (bags, heads, queries))
        z = results[0]
    z = z.transpose(1, 2).flatten(2).to(x.dtype)  # [B, M, F]
    return _results(z, results, common, single, heads > 1)


def additive_attention_pool(
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    v: Tensor,
    c: Tensor | None = None,
    *,
    act: str = "tanh",
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
    temperature: float = 1.0,
    channels_first: bool = False,
    return_weights: bool = False,
    return_scores: bool = False,
    return_lse: bool = False,
    impl: str = "auto",
) -> Any:
    r"""Pool ``values`` by an additive scorer: :math:`e_{mn} = v \cdot \mathrm{act}(k_n + q_m) + c`.

    The keys (W x_n + b) are projected once and queried at every step of a decoder, whose query
    (U h) is small; act(k_n + q_m) is never stored.

    Args:
        keys: k, [B, N, K] or channels first [B, K, *spatial] as ``values``.
        values: as for `softmax_pool`, over the same items.
        query: q, [B, K] or [B, M, K]; [1, M, K] is shared by all samples.  Values' dtype or float32.
        v: [K] (or [1, K], as ``nn.Linear(K, 1)`` stores it).
        c: one element, or None.
        act: tanh, relu or gelu.

    The other arguments, the results (z is [B, D] for a query [B, K]) and the errors are those of
    `softmax_pool`.

    Source: Bahdanau et al., arXiv:1409.0473; Xu et al., Show, Attend and Tell, arXiv:1502.03044.

    >>> k, x, q = torch.randn(2, 9, 8), torch.randn(2, 9, 16), torch.randn(2, 8)
    >>> additive_attention_pool(k, x, q, torch.randn(8)).shape
    torch.Size([2, 16])
    """
    op = "additive_attention_pool"
    x = checks.items_of(op, "values", values, offsets, channels_first)
    k = checks.items_of(op, "keys", keys, offsets, channels_first, like=x)
    if k.shape[:3] != x.shape[:3]:
        _checks.fail(op, "keys", f"have the items of values {list(values.shape)}", list(keys.shape))
    common = Common(
        mask, bias, offsets, temperature, return_weights, return_scores, return_lse, impl
    )
    bags, width = _bags(op, x, offsets), k.shape[3]
    q = checks.queries_of(op, query, x, bags, width)
    _checks.tensor(op, "v", v)
    checks.small(op, "v", v, x, *((width,) if v.dim() == 1 else (1, width)))
    if c is not None:
        checks.small(op, "c", c, x)
        if c.numel() != 1:
            _checks.fail(op, "c", "have one element", list(c.shape))
        c = c.reshape(1, 1, 1).expand(1, 1, q.shape[1])
    i = Inputs(x, k, q.unsqueeze(1), w=v.reshape(1, width), c=c)
    results = _run(op, i, "additive", act, common, (bags, 1, q.shape[1]))
    return _results(results[0].squeeze(1), results, common, query.dim() == 2)


def gated_attention_pool(
    x: Tensor,
    V: Tensor,
    b_V: Tensor | None,
    U: Tensor | None,
    b_U: Tensor | None,
    w: Tensor,
    b_w: Tensor | None = None,
    *,
    act: str = "tanh",
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
    temperature: float = 1.0,
    channels_first: bool = False,
    return_weights: bool = False,
    return_scores: bool = False,
    return_lse: bool = False,
    impl: str = "auto",
) -> Any:
    r"""Pool x by a gated scorer, the attention of multiple-instance learning.

    .. math::
        e_{mn} = w_m \cdot (\mathrm{act}(V x_n + b_V) \odot \sigma(U x_n + b_U)) + b_{w,m}

    Without U the scorer is the ungated one, w act(V x + b_V).  Nothing of size [N, K] is stored:
    backward computes the hidden layer again.

    Args:
        x: instances, as the ``values`` of `softmax_pool`: a bag of N is [1, N, D].
        V, b_V: [K, D] and [K] or None; x's dtype or float32.
        U, b_U: [K, D] and [K] or None, or both None.
        w, b_w: [M, K] and [M] or None; M branches.
        act: tanh, relu or gelu.

    The other arguments, the results (z is [B, M, D]) and the errors are those of `softmax_pool`.
    ``return_scores`` gives what CLAM calls A_raw.

    Source: Ilse et al., Attention-based Deep Multiple Instance Learning, arXiv:1802.04712.

    >>> x, V, U, w = torch.randn(1, 100, 64), torch.randn(16, 64), torch.randn(16, 64), torch.randn(1, 16)
    >>> gated_attention_pool(x, V, None, U, None, w).shape
    torch.Size([1, 1, 64])
    """
    op = "gated_attention_pool"
    items = checks.items_of(op, "x", x, offsets, channels_first)
    common = Common(
        mask, bias, offsets, temperature, return_weights, return_scores, return_lse, impl
    )
    width = items.shape[3]
    checks.small(op, "V", V, items, "K", width)
    hidden = V.shape[0]
    checks.small(op, "w", w, items, "M", hidden)
    queries = w.shape[0]
    if U is None and b_U is not None:
        _checks.fail(op, "b_U", "be None when U is None", "a tensor")
    if U is not None:
        checks.small(op, "U", U, items, hidden, width)
        if U.dtype != V.dtype:
            _checks.fail(op, "U", f"have the dtype of V ({V.dtype})", U.dtype)
    for name, b, size in (("b_V", b_V, hidden), ("b_U", b_U, hidden), ("b_w", b_w, queries)):
        if b is not None:
            checks.small(op, name, b, items, size)
    i = Inputs(
        items,
        V=V.reshape(hidden, width),
        b_V=b_V,
        U=None if U is None else U.reshape(hidden, width),
        b_U=b_U,
        w=w.reshape(queries, hidden),
        c=None if b_w is None else b_w.reshape(1, 1, queries),
    )
    results = _run(op, i, "gated", act, common, (_bags(op, items, offsets), 1, queries))
    return _results(results[0].squeeze(1), results, common, False)


def merge_pools(z: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    r"""Merge pools over disjoint parts of the items into the pool over all of them.

    .. math::
        \mathrm{lse} = \log \sum_s e^{\mathrm{lse}_s}, \quad z = \sum_s e^{\mathrm{lse}_s - \mathrm{lse}} z_s

    Args:
        z: [S, ..., D], pools of S parts.
        lse: [S, ...], what ``return_lse`` gives for each; float32 (float64 for float64 z).

    Returns:
        z [..., D] in z's dtype and lse [...], differentiable to any order.

    Parts without items (lse = -inf) take no part; z = 0 and lse = -inf where all are empty.

    >>> x, w = torch.randn(1, 100, 8), torch.randn(1, 8)
    >>> parts = [context_attention_pool(t, w, return_lse=True) for t in x.split(30, 1)]
    >>> z, _ = merge_pools(*(torch.stack(t) for t in zip(*parts, strict=True)))
    >>> torch.testing.assert_close(z, context_attention_pool(x, w))
    """
    op = "merge_pools"
    _checks.tensor(op, "z", z)
    _checks.tensor(op, "lse", lse)
    _checks.dtype(op, "z", z, checks.DTYPES)
    _checks.dtype(op, "lse", lse, (accumulation_dtype(z.dtype),))
    _checks.device(op, "lse", lse, z, "z")
    if z.dim() < 2 or z.shape[0] == 0:
        _checks.fail(op, "z", "have shape [S, ..., D] with S of at least 1", list(z.shape))
    if lse.shape != z.shape[:-1]:
        _checks.fail(op, "lse", f"have shape {list(z.shape[:-1])}", list(lse.shape))
    largest = lse.detach().amax(0)
    largest = torch.where(largest == float("-inf"), 0.0, largest)
    parts = torch.exp(lse - largest)  # [S, ...]
    total = parts.sum(0)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    merged = ((parts / total).unsqueeze(-1) * z).sum(0).to(z.dtype)
    return merged, torch.where(empty, float("-inf"), total.log() + largest)


# ------------------------------------------------------------------ normal form and back


def _bags(op: str, values: Tensor, offsets: Any) -> int:
    if offsets is None:
        return values.shape[0]
    checks.check_offsets(op, offsets, values)
    return offsets.shape[0] - 1


def _run(
    op: str, i: Inputs, scorer: str, act: str, common: Common, rows: tuple[int, int, int]
) -> Results:
    """z [B, H, M, D], weights and scores [B, H, M, N] where asked for (B = 1 of bags), lse [B, H, M].

    Where every head reads whole items (one head of values, H heads of queries) heads are queries.
    """
    checks.check_options(op, act, common.temperature)
    ragged = common.offsets is not None
    bias = checks.logit_bias(op, common.mask, common.bias, i.values, rows, ragged)
    heads = rows[1]
    shared = heads > i.values.shape[1]
    if shared:
        i = i._replace(query=_heads_as_queries(i.query), c=_heads_as_queries(i.c))
        if bias is not None and bias.shape[1:3] != (1, 1):
            bias = _heads_as_queries(bias.expand(-1, *rows[1:], -1))
    offsets = None if common.offsets is None else common.offsets.contiguous()
    i = i._replace(bias=bias, offsets=offsets)
    o = Options(scorer, act, 1.0 / common.temperature)
    want_scores = common.return_weights or common.return_scores
    z, lse, e = pool(op, common.impl, i, o, want_scores)
    weights = reference.weights_of(e, lse, i, o) if common.return_weights else None
    scores = e if common.return_scores else None
    if not shared:
        return z, weights, scores, lse
    z, lse = _queries_as_heads(z, heads), _queries_as_heads(lse, heads)
    weights, scores = (t if t is None else _queries_as_heads(t, heads) for t in (weights, scores))
    return z, weights, scores, lse


def _results(z: Tensor, results: Results, common: Common, single: bool, heads: bool = False) -> Any:
    """z [B, M, D] and what was asked for besides, without the axes that the call does not have."""
    _, weights, scores, lse = results
    out = [z.squeeze(1) if single else z]
    for t in (weights, scores):
        if t is not None:
            t = t.squeeze(2) if single else t
            t = t if heads else t.squeeze(1)
            out.append((t if common.offsets is None else t.squeeze(0)).to(z.dtype))
    if common.return_lse:
        lse = lse.squeeze(2) if single else lse
        out.append(lse if heads else lse.squeeze(1))
    return tuple(out) if len(out) > 1 else out[0]


def _split(x: Tensor, heads: int) -> Tensor:
    """[B, N, H d] -> [B, H, N, d], a view."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _heads_as_queries(t: Any) -> Any:
    """[B, H, M, ...] -> [B, 1, H M, ...]."""
    return None if t is None else t.flatten(1, 2).unsqueeze(1)


def _queries_as_heads(t: Tensor, heads: int) -> Tensor:
    """[B, 1, H M, ...] -> [B, H, M, ...]."""
    return t.squeeze(1).unflatten(1, (heads, -1))


def _as_features(q: Tensor, k_weight: Tensor | None, features: int) -> Tensor:
    """u = W_k^T q, [B or 1, H, M, D] for q [B or 1, H, M, E/H]; q in its head's columns without W_k."""
    heads, width = q.shape[1], q.shape[3]
    if k_weight is None:
        k_weight = torch.eye(features, dtype=q.dtype, device=q.device)
    return torch.einsum("bhme,hed->bhmd", q, k_weight.to(q.dtype).reshape(heads, width, features))


def _project(z: Tensor, lse: Tensor, v_weight: Tensor | None, v_bias: Tensor | None) -> Tensor:
    """W_v z + b_v a head, [B, H, M, F/H] for z [B, H, M, D]; its own columns of z without W_v."""
    heads = z.shape[1]
    if v_weight is None:
        return z.unflatten(3, (heads, -1)).diagonal(dim1=1, dim2=3).movedim(3, 1)
    z = torch.einsum(
        "bhmd,hfd->bhmf", z.to(lse.dtype), v_weight.to(lse.dtype).unflatten(0, (heads, -1))
    )
    if v_bias is not None:
        z = z + v_bias.to(lse.dtype).reshape(heads, 1, -1)
    return torch.where((lse == float("-inf")).unsqueeze(3), 0.0, z)
