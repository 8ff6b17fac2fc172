"""The pooling functions but `query_attention_pool`, one for each scorer, and `merge_pools`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkern import _checks
from attnkern.ops.softmax_pool import checks
from attnkern.ops.softmax_pool.call import Common, bags_of, results_of, run
from attnkern.ops.softmax_pool.reference import Inputs, accumulation_dtype


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
            order is checked once a tensor (at every call one made in inference mode), outside
            torch.compile.
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
    keeps the inputs, z and each row's largest logit and weight.

    >>> softmax_pool(torch.zeros(2, 4), torch.ones(2, 4, 3))
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
    rows = (bags_of(op, v, offsets), 1, scores.shape[-2] if scores.dim() > 1 and not single else 1)
    e = checks.per_row(op, "scores", scores, v, rows, ragged, exact=True)
    results = run(op, Inputs(v, scores=e), "given", "tanh", common, rows)
    return results_of(results[0].squeeze(1), results, common, v.dtype, single)


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
        *(mask, logit_bias, offsets, temperature, return_weights, return_scores, return_lse, impl),
        bias_name="logit_bias",
    )
    checks.small(op, "weight", weight, v, "M", v.shape[3])
    queries = weight.shape[0]
    c = None
    if bias is not None:
        checks.small(op, "bias", bias, v, queries)
        c = bias.reshape(1, 1, queries)
    i = Inputs(v, query=weight.reshape(1, 1, queries, v.shape[3]), c=c)
    results = run(op, i, "dot", "tanh", common, (bags_of(op, v, offsets), 1, queries))
    return results_of(results[0].squeeze(1), results, common, v.dtype)


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
    bags, width = bags_of(op, x, offsets), k.shape[3]
    q = checks.queries_of(op, query, x, bags, width)
    _checks.tensor(op, "v", v)
    checks.small(op, "v", v, x, *((width,) if v.dim() == 1 else (1, width)))
    if c is not None:
        checks.small(op, "c", c, x)
        if c.numel() != 1:
            _checks.fail(op, "c", "have one element", list(c.shape))
        c = c.reshape(1, 1, 1).expand(1, 1, q.shape[1])
    i = Inputs(x, k, q.unsqueeze(1), w=v.reshape(1, width), c=c)
    results = run(op, i, "additive", act, common, (bags, 1, q.shape[1]))
    return results_of(results[0].squeeze(1), results, common, x.dtype, query.dim() == 2)


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
    results = run(op, i, "gated", act, common, (bags_of(op, items, offsets), 1, queries))
    return results_of(results[0].squeeze(1), results, common, items.dtype)


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
    _checks.dtype(op, "z", z, _checks.DTYPES)
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
