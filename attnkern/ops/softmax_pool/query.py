"""``query_attention_pool``: attention that keeps few queries, its projections folded away."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkern import _autocast, _checks
from attnkern.ops.softmax_pool import checks
from attnkern.ops.softmax_pool.call import Common, bags_of, results_of, run
from attnkern.ops.softmax_pool.reference import Inputs, accumulation_dtype


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
    bags, width = bags_of(op, v, offsets), v.shape[3]
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
    if fold and keys is not None:
        needed = "be None or False when keys are given, which may be no linear map of x"
        _checks.fail(op, "fold", needed, fold)
    few = queries * heads < width if fold is None else fold
    folded = few and keys is None and (k_weight is not None or v_weight is not None)
    scale = (width // heads) ** -0.5 if scale is None else float(scale)
    rows = (bags, heads, queries)
    with _autocast.full_precision(v):
        q = _split(q.to(accumulation_dtype(v.dtype)) * scale, heads)  # [B or 1, H, M, E/H]
        c = None
        if k_bias is not None:
            c = (q @ k_bias.to(q.dtype).reshape(heads, -1, 1)).squeeze(3)
        if folded:
            u = _as_features(q, k_weight, v.shape[3])
            results = run(op, Inputs(v, query=u, c=c), "dot", "tanh", common, rows)
            z = _project(results[0], results[3], v_weight, v_bias)
        else:
            k, v = _projected(v, k, k_weight, v_weight, v_bias)
            keys = None if k is None else _split(k.squeeze(1), heads)
            i = Inputs(_split(v.squeeze(1), heads), keys, q, c=c)
            results = run(op, i, "dot", "tanh", common, rows)
            z = results[0]
    z = z.transpose(1, 2).flatten(2)  # [B, M, F]
    return results_of(z, results, common, v.dtype, single, heads > 1)


def halves(kv: Any) -> dict[str, Any]:
    """The key and value halves of a fused projection, as `query_attention_pool` names them."""
    k_weight, v_weight = kv.weight.chunk(2)
    k_bias, v_bias = (None, None) if kv.bias is None else kv.bias.chunk(2)
    return {"k_weight": k_weight, "k_bias": k_bias, "v_weight": v_weight, "v_bias": v_bias}


def _projected(
    x: Tensor,
    keys: Tensor | None,
    k_weight: Tensor | None,
    v_weight: Tensor | None,
    v_bias: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """Keys (None: they are the values) and values of every item; b_k is in the scores' bias."""
    if k_weight is not None:
        keys = F.linear(x, k_weight.to(x.dtype))
    if v_weight is None:
        return keys, x
    values = F.linear(x, v_weight.to(x.dtype), None if v_bias is None else v_bias.to(x.dtype))
    return x if keys is None else keys, values


def _split(x: Tensor, heads: int) -> Tensor:
    """[B, N, H d] -> [B, H, N, d], a view."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _per_head(t: Tensor, weight: Tensor) -> Tensor:
    """t [B, H, M, E] times weight [H, E, F]: one product a head, of all samples (einsum takes 10 us to say so)."""
    batch, _, queries, _ = t.shape
    product = t.transpose(0, 1).flatten(1, 2) @ weight  # [H, B M, F]
    return product.unflatten(1, (batch, queries)).transpose(0, 1)


def _as_features(q: Tensor, k_weight: Tensor | None, features: int) -> Tensor:
    """u = W_k^T q, [B or 1, H, M, D] for q [B or 1, H, M, E/H]; q in its head's columns without W_k."""
    heads, width = q.shape[1], q.shape[3]
    if k_weight is None:
        return torch.diag_embed(q.movedim(1, 3), dim1=1, dim2=3).flatten(3)
    return _per_head(q, k_weight.to(q.dtype).reshape(heads, width, features))


def _project(z: Tensor, lse: Tensor, v_weight: Tensor | None, v_bias: Tensor | None) -> Tensor:
    """W_v z + b_v a head, [B, H, M, F/H] for z [B, H, M, D]; its own columns of z without W_v."""
    heads = z.shape[1]
    if v_weight is None:
        return z.unflatten(3, (heads, -1)).diagonal(dim1=1, dim2=3).movedim(3, 1)
    z = _per_head(z.to(lse.dtype), v_weight.to(lse.dtype).unflatten(0, (heads, -1)).mT)
    if v_bias is not None:
        z = z + v_bias.to(lse.dtype).reshape(heads, 1, -1)
    return torch.where((lse == float("-inf")).unsqueeze(3), 0.0, z)
