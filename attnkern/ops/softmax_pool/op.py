"""The operator behind the pooling functions: schema, fakes and autograd, in the normal form of reference.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkern import _autocast, _library, _select
from attnkern.ops.softmax_pool import reference
from attnkern.ops.softmax_pool.reference import Inputs, Options, accumulation_dtype

# ------------------------------------------------------------------ operators and fakes


def rows_of(i: Inputs) -> tuple[int, int, int]:
    """B, H, M: the rows of weights that a call has."""
    batch = i.values.shape[0] if i.offsets is None else i.offsets.shape[0] - 1
    if i.scores is not None:
        queries = i.scores.shape[2]
    elif i.query is not None:
        queries = i.query.shape[2]
    else:
        assert i.w is not None
        queries = i.w.shape[0]
    return batch, i.values.shape[1], queries


def _fwd_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *tensors, _scorer, _act, _scale, return_scores = arguments
    i = Inputs(*tensors)
    rows, (batch, heads, items, features) = rows_of(i), i.values.shape
    small = i.values.new_empty(rows, dtype=accumulation_dtype(i.values.dtype))
    scores = (batch, heads, rows[2], items) if return_scores else 0
    z = small.new_empty(*rows, features)
    return z, small, small.new_empty(2, *rows), small.new_empty(scores)


def _bwd_fake(
    dz: Tensor, z: Tensor, dlse: Tensor | None, dscores: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    *tensors, top, _scorer, _act, _scale = arguments[:16]
    need_values, need_keys, need_query, need_weights, need_logits = arguments[16:]
    i = Inputs(*tensors)
    batch, heads, items, _ = i.values.shape

    def nothing() -> Tensor:  # one each: outputs do not share memory
        return i.values.new_empty(0)

    def like(t: Tensor | None, needed: bool) -> Tensor:
        return torch.empty_like(t) if t is not None and needed else nothing()

    def accumulated(t: Tensor | None, needed: bool) -> Tensor:
        return t.new_empty(t.shape, dtype=top.dtype) if t is not None and needed else nothing()

    return (
        like(i.values, need_values),
        like(i.keys, need_keys),
        accumulated(i.query, need_query),
        top.new_empty(batch, heads, dz.shape[2], items) if need_logits else nothing(),
        *(accumulated(t, need_weights) for t in (i.V, i.b_V, i.U, i.b_U, i.w)),
    )


_TENSORS = (
    "Tensor values, Tensor? keys, Tensor? query, Tensor? scores, Tensor? V, Tensor? b_V, "
    "Tensor? U, Tensor? b_U, Tensor? w, Tensor? c, Tensor? bias, Tensor? offsets"
)
_OPTIONS = "str scorer, str act, float scale"

softmax_pool_fwd = _library.define(
    "softmax_pool_fwd",
    f"({_TENSORS}, {_OPTIONS}, bool return_scores)"
    " -> (Tensor z, Tensor lse, Tensor top, Tensor scores)",
    _fwd_fake,
)
softmax_pool_bwd = _library.define(
    "softmax_pool_bwd",
    f"(Tensor dz, Tensor z, Tensor? dlse, Tensor? dscores, {_TENSORS}, Tensor top, {_OPTIONS}, "
    "bool need_values, bool need_keys, bool need_query, bool need_weights, bool need_logits)"
    " -> (Tensor dvalues, Tensor dkeys, Tensor dquery, Tensor dlogits, "
    "Tensor dV, Tensor db_V, Tensor dU, Tensor db_U, Tensor dw)",
    _bwd_fake,
)

# ------------------------------------------------------------------ autograd


class _Pool(torch.autograd.Function):
    """Saves its inputs, z and top: nothing of the size of the items but what it was given.

    ``top`` [2, B, H, M] is each row's largest logit and the weight of that item; 0 and 0 for a row
    without weights.  The weights are exp(l - largest) times that one: exp(l - lse) has the rounding
    of lse, and a row whose largest weight is nearly 1 is known by it.
    """

    @staticmethod
    def forward(ctx: Any, impl: str, options: Options, return_scores: bool, *tensors: Any) -> Any:
        i = Inputs(*tensors)
        z, lse, top, scores = softmax_pool_fwd[impl](*_typed(i), *options, return_scores)
        ctx.impl, ctx.options, ctx.return_scores = impl, options, return_scores
        ctx.save_for_backward(*i, z, top)
        ctx.set_materialize_grads(False)
        return z, lse, scores

    @staticmethod
    def backward(
        ctx: Any, dz: Tensor | None, dlse: Tensor | None, dscores: Tensor | None
    ) -> tuple[Any, ...]:
        *tensors, z, top = ctx.saved_tensors
        i, options, needs = Inputs(*tensors), ctx.options, Inputs(*ctx.needs_input_grad[3:])
        if not ctx.return_scores:
            dscores = None  # which torch.compile gives all the same, empty
        # z is kept unrounded: items that are nearly alike leave of dp - dz . z what rounding would take
        dz = torch.zeros_like(z) if dz is None else dz
        dz = dz.to(i.values.dtype).contiguous()
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # create_graph=True: the same formulas in differentiable PyTorch, for double backward
            with _autocast.full_precision(i.values):
                grads = reference.backward(dz, dlse, dscores, i, options)
        else:
            dlse = None if dlse is None else dlse.contiguous()
            dscores = None if dscores is None else dscores.contiguous()
            need_logits = bool(needs.scores or needs.bias)
            grads = reference.Gradients(
                *softmax_pool_bwd[ctx.impl](
                    *(dz, z, dlse, dscores, *_typed(i), top, *options),
                    *(bool(needs.values), bool(needs.keys), bool(needs.query)),
                    *(any(needs[4:9]), need_logits),
                )
            )
        by_input: dict[str, Any] = grads._asdict()
        dl = by_input.pop("logits")
        if needs.scores:
            by_input["scores"] = (
                options.scale * dl if dscores is None else options.scale * dl + dscores
            )
        if needs.c:
            assert i.c is not None
            by_input["c"] = _row_sum(dz, z, dlse, dscores, top, i, options)
        if needs.bias:
            assert i.bias is not None
            by_input["bias"] = dl.sum_to_size(i.bias.shape)
        result = [
            by_input[name].to(t.dtype) if need and t is not None else None
            for name, t, need in zip(Inputs._fields, i, needs, strict=True)
        ]
        return None, None, None, *result


def _row_sum(
    dz: Tensor,
    z: Tensor,
    dlse: Tensor | None,
    dscores: Tensor | None,
    top: Tensor,
    i: Inputs,
    o: Options,
) -> Tensor:
    """dc: the sum of de over the items.  That of dl is the gradient of lse: a softmax moves no mass."""
    assert i.c is not None
    product = (dz.to(top.dtype) * z).sum(3)
    row = product - product  # 0, or NaN where a result or its gradient is not finite
    if dlse is not None:
        row = row + torch.where(top[1] == 0, 0.0, dlse)
    row = o.scale * row
    if dscores is not None:
        row = row + reference.bag_sum(dscores, i)
    return row if i.c.shape[0] == row.shape[0] else row.sum(0, keepdim=True)


def _typed(i: Inputs) -> Inputs:
    """The projections in the values' dtype, as the kernels multiply them; they may be given in float32."""
    if i.V is None or i.V.dtype == i.values.dtype:
        return i
    dtype = i.values.dtype
    return i._replace(V=i.V.to(dtype), U=None if i.U is None else i.U.to(dtype))


def pool(
    op: str, impl: str, i: Inputs, options: Options, return_scores: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """z [B, H, M, D], lse [B, H, M] and, on request, the raw scores [B, H, M, N], all unrounded."""
    impl = _select.select(op, impl, i.values.device, i.values.dtype, "softmax_pool_fwd")
    acc = accumulation_dtype(i.values.dtype)
    values, keys, query, scores, V, b_V, U, b_U, w, c, bias, offsets = i
    query, scores, b_V, b_U = _as(acc, query), _as(acc, scores), _as(acc, b_V), _as(acc, b_U)
    w, c, bias = _as(acc, w), _as(acc, c), _as(acc, bias)
    if impl == "reference":
        with _autocast.full_precision(values):
            i = Inputs(values, keys, query, scores, V, b_V, U, b_U, w, c, bias, offsets)
            return reference.forward(i, options)
    values = readable(values)
    keys = None if keys is None else readable(keys)
    V, U = None if V is None else V.contiguous(), None if U is None else U.contiguous()
    i = Inputs(values, keys, query, scores, V, b_V, U, b_U, w, c, bias, offsets)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in i):
        return _Pool.apply(impl, options, return_scores, *i)
    z, lse, _, scores = softmax_pool_fwd[impl](*_typed(i), *options, return_scores)
    return z, lse, scores


def _as(dtype: torch.dtype, t: Tensor | None) -> Tensor | None:
    """t in this dtype, contiguous; as most are, which torch takes 0.7 us a tensor to find."""
    if t is None or (t.dtype == dtype and t.is_contiguous()):
        return t
    return t.to(dtype).contiguous()


def readable(x: Tensor) -> Tensor:
    """x [B, H, N, D] when kernels can read it in place: items or features are adjacent; else a copy."""
    *_, items, features = x.shape
    item_stride, feature_stride = x.stride()[2:]
    rows = (features == 1 or feature_stride == 1) and (items == 1 or item_stride >= features)
    columns = (items == 1 or item_stride == 1) and (features == 1 or feature_stride >= items)
    return x if rows or columns else x.contiguous()
