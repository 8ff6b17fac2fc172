"""Softmax-weighted pooling in plain PyTorch: the oracle, and the fallback where no kernel serves.

    e[m,n]  by the scorer                                 raw scores
    l[m,n]  = scale * e[m,n] + bias[m,n]                  logits; -inf where masked
    p[m,n]  = exp(l[m,n] - lse[m]),  lse[m] = log sum_n exp l[m,n]
    z[m]    = sum_n p[m,n] v[n]

    given      e = scores[m,n]
    dot        e = q[m] . k[n] + c[m]                     Luong et al. 2015, arXiv:1508.04025
    additive   e = w . act(k[n] + q[m]) + c[m]            Bahdanau et al. 2015, arXiv:1409.0473
    gated      e = w[m] . (act(V v[n] + b_V) * sigmoid(U v[n] + b_U)) + c[m]
                                                          Ilse et al. 2018, arXiv:1802.04712

B samples, H heads, N items, D features, M queries, K key features or hidden units.  Tensors are in
the operator's normal form: values [B, H, N, D], keys [B, H, N, K] (None: the values), query
[B or 1, H, M, K], scores [B, H, M, N], V and U [K, D], w [M, K] ([1, K] for additive), c
[B or 1, H, M], bias broadcastable to [B, H, M, N].  With ``offsets`` [B+1] the items of all B bags
stand in one row, bag b at offsets[b]..offsets[b+1]: values are [1, H, N, D], scores [1, H, M, N].

Scores and sums are in float32 (float64 for float64 values).  A row whose logits are all -inf, or
that has no items, has lse = -inf, p = 0, z = 0 and no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SCORERS = ("given", "dot", "additive", "gated")
ACTS = ("tanh", "relu", "gelu")
# A row whose largest weight is above PEAKED has a peak, its item of a weight above PEAK, whose gradient needs care
# (csrc/ops/softmax_pool/params.h says why). Where all others weigh less than ALONE, that weight is 1 in float64 and
# no gradient is left.
PEAKED, PEAK, ALONE = 0.625, 0.5, 2.0**-54


class Options(NamedTuple):
    """The non-tensor arguments, in the order of the operator schema."""

    scorer: str
    act: str = "tanh"
    scale: float = 1.0


class Inputs(NamedTuple):
    """The tensor arguments, in the order of the operator schema."""

    values: Tensor
    keys: Tensor | None = None
    query: Tensor | None = None
    scores: Tensor | None = None
    V: Tensor | None = None
    b_V: Tensor | None = None
    U: Tensor | None = None
    b_U: Tensor | None = None
    w: Tensor | None = None
    c: Tensor | None = None
    bias: Tensor | None = None
    offsets: Tensor | None = None


class Gradients(NamedTuple):
    """In the order of the operator schema; None where there is no such input."""

    values: Tensor
    keys: Tensor | None
    query: Tensor | None
    logits: Tensor
    V: Tensor | None
    b_V: Tensor | None
    U: Tensor | None
    b_U: Tensor | None
    w: Tensor | None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def activation(h: Tensor, act: str) -> Tensor:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "tanh": torch.tanh,
        "relu": F.relu,
        "gelu": F.gelu,
    }
    return functions[act](h)


def activation_grad(h: Tensor, act: str) -> Tensor:
    """act'(h), with torch's own values at the kinks."""
    if act == "tanh":
        t = torch.tanh(h)
        return 1 - t * t
    if act == "relu":
        return torch.where(h <= 0, torch.zeros_like(h), torch.ones_like(h))
    density = torch.exp(-0.5 * h * h) * 0.3989422804014327  # 1 / sqrt(2 pi)
    return 0.5 * (1 + torch.erf(h * 0.7071067811865476)) + h * density


# ------------------------------------------------------------------ bags


def bag_of(offsets: Tensor, items: int) -> Tensor:
    """The bag of every item, [N]."""
    return torch.searchsorted(offsets, torch.arange(items, device=offsets.device), right=True) - 1


def by_item(t: Tensor, i: Inputs) -> Tensor:
    """t [B or 1, H, M, ...] for every item: [B or 1, H, 1, M, ...], or of its bag [1, H, N, M, ...]."""
    if i.offsets is None or t.shape[0] == 1:
        return t.unsqueeze(2)
    return t[bag_of(i.offsets, i.values.shape[2])].movedim(0, 1).unsqueeze(0)


def sum_to(t: Tensor, like: Tensor, i: Inputs) -> Tensor:
    """The adjoint of `by_item`: t [B, H, N, M, ...] summed to the shape of ``like`` [B or 1, H, M, ...]."""
    if i.offsets is None or like.shape[0] == 1:
        t = t.sum(2)
        return t if t.shape[0] == like.shape[0] else t.sum(0, keepdim=True)
    bags = torch.zeros(like.shape, dtype=t.dtype, device=t.device)
    return bags.index_add(0, bag_of(i.offsets, t.shape[2]), t[0].movedim(1, 0))


def bag_sum(t: Tensor, i: Inputs) -> Tensor:
    """Sum over the items of each bag: [1, H, M, N] -> [B, H, M]; [B, H, M, N] -> [B, H, M].

    Bags are summed one item after another, so in float64, and on a GPU too in the same order each time.
    """
    if i.offsets is None:
        return t.sum(3)
    bags = t.new_zeros(len(i.offsets) - 1, *t.shape[1:3], dtype=torch.float64)
    items = t[0].movedim(2, 0).double()
    return bags.index_put((bag_of(i.offsets, t.shape[3]),), items, accumulate=True).to(t.dtype)


def of_row(t: Tensor, i: Inputs) -> Tensor:
    """t [B, H, M] beside the logits: [B, H, M, 1], or of each item's bag [1, H, M, N]; the adjoint of `bag_sum`."""
    if i.offsets is None:
        return t.unsqueeze(3)
    exact = t.double() if t.is_floating_point() else t  # so that its gradient is summed in float64
    rows = exact[bag_of(i.offsets, i.values.shape[2])].to(t.dtype)
    return rows.movedim(0, 2).unsqueeze(0)


# ------------------------------------------------------------------ forward


def hidden(i: Inputs, act: str) -> tuple[Tensor, Tensor | None]:
    """Pre-activations of the gated scorer: V v + b_V and U v + b_U, [B, H, N, K]."""
    assert i.V is not None
    v = i.values.to(accumulation_dtype(i.values.dtype))
    a = F.linear(v, i.V.to(v.dtype), i.b_V)
    return a, None if i.U is None else F.linear(v, i.U.to(v.dtype), i.b_U)


def raw_scores(i: Inputs, o: Options) -> Tensor:
    """e [B, H, M, N] ([1, H, M, N] of bags)."""
    if o.scorer == "given":
        assert i.scores is not None
        return i.scores
    acc = accumulation_dtype(i.values.dtype)
    if o.scorer == "gated":
        assert i.w is not None
        a, b = hidden(i, o.act)
        h = activation(a, o.act) if b is None else activation(a, o.act) * torch.sigmoid(b)
        e = h @ i.w.t()  # [B, H, N, M]
    else:
        assert i.query is not None
        k = (i.values if i.keys is None else i.keys).to(acc)
        if o.scorer == "dot" and (i.offsets is None or i.query.shape[0] == 1):
            e = k @ i.query.transpose(2, 3)
        elif o.scorer == "dot":
            e = (by_item(i.query, i) * k.unsqueeze(3)).sum(4)
        else:
            assert i.w is not None
            e = activation(by_item(i.query, i) + k.unsqueeze(3), o.act) @ i.w[0]
    if i.c is not None:
        e = e + by_item(i.c, i)
    return e.transpose(2, 3)


def logits_of(e: Tensor, i: Inputs, o: Options) -> Tensor:
    """scale * e + bias, [B, H, M, N]; -inf where bias is, whatever the score."""
    logits = o.scale * e
    if i.bias is None:
        return logits
    return torch.where(i.bias == float("-inf"), i.bias, logits + i.bias)


class Softmax(NamedTuple):
    """Of logits: p [B, H, M, N], lse [B, H, M], and of each row its peak and whether that is alone.

    The peak is the item of a weight above PEAKED, -1 where there is none; alone it is where all others
    weigh less than ALONE.
    """

    p: Tensor
    lse: Tensor
    peak: Tensor
    alone: Tensor


def softmax(logits: Tensor, i: Inputs) -> Softmax:
    """p = 0 and lse = -inf for a row without items, or all of whose logits are -inf.

    p is exp(l - largest) over its own sum: lse is rounded, to 1e-6 at 16, and exp(l - lse) would have
    that error.  A peak's gradient is what those of the others leave, for its own would be the rounding
    of two terms that are nearly the same.
    """
    fixed = logits.detach()
    top = largest_item(fixed, i)
    largest = at_item(fixed, top, i)
    real = largest.isfinite()  # infinite, it makes NaN of its row: inf - inf
    items = torch.arange(logits.shape[3], device=logits.device)
    base = torch.where(largest == float("-inf"), 0.0, largest)
    others = torch.where(items == of_row(top, i), 0.0, torch.exp(fixed - of_row(base, i)))
    rest = bag_sum(others, i)
    peak = torch.where(real & (PEAKED * (1 + rest) < 1), top, -1)
    alone = (peak >= 0) & (rest < ALONE)
    largest = torch.where(peak < 0, base, at_item(logits, peak, i))
    base = torch.where(alone, base, largest)
    masked = logits == float("-inf")
    itself = items == of_row(peak, i)
    less = torch.where(masked | itself, 0.0, logits - of_row(base, i))
    p = torch.where(masked, 0.0, torch.exp(less))
    total = bag_sum(p, i)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, float("-inf"), total.log() + largest)
    return Softmax(p / of_row(total, i), lse, peak, alone)


def largest_item(logits: Tensor, i: Inputs) -> Tensor:
    """The item of each row's largest logit, the first of several, [B, H, M]; 0 for a row without items."""
    if i.offsets is None:
        if logits.shape[3] == 0:
            return logits.new_zeros(logits.shape[:3], dtype=torch.int64)
        return logits.argmax(3)
    rows = (len(i.offsets) - 1, *logits.shape[1:3])
    index = bag_of(i.offsets, logits.shape[3])[:, None, None].expand(-1, *rows[1:])
    largest = logits.new_full(rows, float("-inf"))
    largest = largest.scatter_reduce(0, index, logits[0].movedim(2, 0), "amax")
    items = torch.arange(logits.shape[3], device=logits.device).expand(logits.shape)
    beyond = logits.shape[3]
    items = torch.where(logits == of_row(largest, i), items, beyond)[0].movedim(2, 0)
    first = items.new_full(rows, beyond).scatter_reduce(0, index, items, "amin")
    return torch.where(first == beyond, 0, first)


def at_item(t: Tensor, item: Tensor, i: Inputs) -> Tensor:
    """t [B, H, M, N] at one item of each row, [B, H, M]; 0 where there is none."""
    if t.shape[3] == 0:
        return t.new_zeros(item.shape)
    real = item.clamp(min=0)
    if i.offsets is None:
        found = t.gather(3, real.unsqueeze(3)).squeeze(3)
    else:
        found = t[0].gather(2, real.movedim(0, 2)).movedim(2, 0)
    return torch.where(item < 0, 0.0, found)


def weights_of(e: Tensor, i: Inputs, o: Options) -> Tensor:
    """The weights of raw scores, [B, H, M, N]; 0 where masked, and in a row without a logit above -inf."""
    return softmax(logits_of(e, i, o), i).p


def forward(i: Inputs, o: Options) -> tuple[Tensor, Tensor, Tensor]:
    """z [B, H, M, D], lse [B, H, M] and raw scores e [B, H, M, N]."""
    e = raw_scores(i, o)
    p, lse, *_ = softmax(logits_of(e, i, o), i)
    z = weighted_sum(p, i)
    z = torch.where((lse == float("-inf")).unsqueeze(3), 0.0, z)  # whatever the values
    return z, lse, e


def weighted_sum(p: Tensor, i: Inputs) -> Tensor:
    """sum_n p[m,n] v[n], [B, H, M, D]."""
    v = i.values.to(p.dtype)
    if i.offsets is None:
        return p @ v
    items = p[0].permute(2, 0, 1).unsqueeze(3) * v[0].movedim(1, 0).unsqueeze(2)  # [N, H, M, D]
    bags = items.new_zeros(len(i.offsets) - 1, *items.shape[1:])
    return bags.index_add(0, bag_of(i.offsets, items.shape[0]), items)


# ------------------------------------------------------------------ backward


def backward(
    dz: Tensor, dlse: Tensor | None, dscores: Tensor | None, i: Inputs, o: Options
) -> Gradients:
    """Gradients of every input.

        dp = dz . v,  dl = p (dp - sum_n p dp + dlse)         softmax; the sum is dz . z
        de = scale * dl + dscores
        dv = sum_m p dz,  and through the scorer (dk where there are keys):
        dot       dk = sum_m de q,                            dq = sum_n de k
        additive  dk = sum_m dq_n,  dq_n = de w act'(k + q),  dq = sum_n dq_n,  dw = sum de act(k + q)
        gated     g = sum_m de w;  da = g sigmoid(b) act'(a), db = g act(a) sigmoid'(b)
                  dv += V^T da + U^T db,                      dV = sum_n da v^T, dU = sum_n db v^T

    The operator returns dl for scores and bias; dc, a sum of de over a row, is known without it.
    """
    acc = accumulation_dtype(i.values.dtype)
    v, dz = i.values.to(acc), dz.to(acc)
    e = raw_scores(i, o)
    p, _, peak, alone = softmax(logits_of(e, i, o), i)
    if i.offsets is None:
        dp = dz @ v.transpose(2, 3)
        dv = p.transpose(2, 3) @ dz
    else:
        dp = (by_item(dz, i) * v.unsqueeze(3)).sum(4).transpose(2, 3)
        dv = (p.transpose(2, 3).unsqueeze(4) * by_item(dz, i)).sum(3)
    dp = dp - of_row(at_item(dp, peak, i), i)  # which is 0 of the peak, and leaves dl as it is
    delta = torch.where(alone, 0.0, bag_sum(p * dp, i))
    dl = p * (dp - of_row(delta if dlse is None else delta - dlse, i))
    de = o.scale * dl
    if dscores is not None:
        de = de + dscores
    de_items = de.transpose(2, 3)  # [B, H, N, M]

    dk = dq = dV = db_V = dU = db_U = dw = None
    if o.scorer == "gated":
        assert i.V is not None
        assert i.w is not None
        a, b = hidden(i, o.act)
        t = activation(a, o.act)
        s = torch.ones_like(t) if b is None else torch.sigmoid(b)
        g = de_items @ i.w
        dw = torch.einsum("bhnm,bhnk->mk", de_items, t * s)
        da = g * s * activation_grad(a, o.act)
        db_V = None if i.b_V is None else da.sum((0, 1, 2))
        dV = torch.einsum("bhnk,bhnd->kd", da, v)
        dv = dv + da @ i.V.to(acc)
        if i.U is not None:
            db = g * t * s * (1 - s)
            db_U = None if i.b_U is None else db.sum((0, 1, 2))
            dU = torch.einsum("bhnk,bhnd->kd", db, v)
            dv = dv + db @ i.U.to(acc)
    elif o.scorer != "given":
        assert i.query is not None
        k = v if i.keys is None else i.keys.to(acc)
        q = by_item(i.query, i)
        if o.scorer == "dot":
            dkey = (de_items.unsqueeze(4) * q).sum(3)
            dq = sum_to(de_items.unsqueeze(4) * k.unsqueeze(3), i.query, i)
        else:
            assert i.w is not None
            h = q + k.unsqueeze(3)
            dh = de_items.unsqueeze(4) * i.w[0] * activation_grad(h, o.act)
            dw = (de_items.unsqueeze(4) * activation(h, o.act)).sum((0, 1, 2, 3)).unsqueeze(0)
            dkey, dq = dh.sum(3), sum_to(dh, i.query, i)
        if i.keys is None:
            dv = dv + dkey
        else:
            dk = dkey.to(i.keys.dtype)
    return Gradients(dv.to(i.values.dtype), dk, dq, dl, dV, db_V, dU, db_U, dw)
