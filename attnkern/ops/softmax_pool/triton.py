"""softmax_pool in Triton, the portable GPU path: launchers of the kernels beside it.

Forward: pool (scores, maximum and sum, z of a piece of the items), merge of rows in several pieces.
Backward: pool and merge again, of rows with a peak without that item; delta, of every row; weights (p,
de and dq), items (dvalues, dkeys); for the gated scorer, a segment of items at a time, hidden_grad
(da, db, h), items and outer (dV, dU, dw).  Partial sums are added in a fixed order, so results repeat
bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from attnkern._triton import LAUNCH, tune
from attnkern._triton.linear import sum_rows
from attnkern.ops.softmax_pool import triton_plan as plan
from attnkern.ops.softmax_pool.reference import Inputs, Options
from attnkern.ops.softmax_pool.triton_backward import (
    items_kernel,
    sum_pieces_kernel,
    weights_kernel,
)
from attnkern.ops.softmax_pool.triton_delta import delta_kernel
from attnkern.ops.softmax_pool.triton_forward import merge_kernel, pool_kernel
from attnkern.ops.softmax_pool.triton_gated import HiddenGrad


def _stride(t: Tensor | None, dim: int) -> int:
    """Elements between entries of a dense small tensor, 0 where it broadcasts."""
    return 0 if t is None or t.shape[dim] == 1 else t.stride(dim)


def _scorer(
    i: Inputs, o: Options, shape: plan.Shape, scores: Tensor | None, block: dict[str, int]
) -> plan.Arguments:
    """The arguments of a kernel that scores items."""
    keys = i.values if i.keys is None else i.keys
    return {
        **plan.strided("values", i.values),
        **plan.strided("keys", None if o.scorer == "given" else keys),
        **{name: getattr(i, name) for name in ("query", "V", "b_V", "U", "b_U", "w", "c")},
        "scores": scores,
        "bias": i.bias,
        "offsets": i.offsets,
        "batch": shape.batch,
        **shape.sizes,
        "units": shape.units,
        "scale": o.scale,
        "query_batch": _stride(i.query, 0),
        "c_batch": _stride(i.c, 0),
        "bias_batch": _stride(i.bias, 0),
        "bias_head": _stride(i.bias, 1),
        "bias_query": _stride(i.bias, 2),
        "SCORER": o.scorer,
        "ACT": o.act,
        "EXACT": i.values.dtype == torch.float32,
        **{**LAUNCH, **block},
    }


def _programs(shape: plan.Shape, block: dict[str, int], pieces: int) -> tuple[int]:
    return (pieces * shape.heads * triton.cdiv(shape.queries, block["BLOCK_M"]),)


# ------------------------------------------------------------------ forward


def softmax_pool_fwd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *tensors, scorer, act, scale, return_scores = arguments
    i, o = Inputs(*tensors), Options(scorer, act, scale)
    shape = plan.shape_of(i)
    rows = (shape.batch, shape.heads, shape.queries)
    z = i.values.new_empty(*rows, shape.features, dtype=torch.float32)
    lse, top = z.new_empty(rows), z.new_empty(2, *rows)
    with torch.cuda.device_of(z):
        scores = i.scores
        if scores is None:
            scores = lse.new_empty(i.values.shape[0], shape.heads, shape.queries, shape.items)
        _pool(i, o, shape, scores, z, top, lse=lse)
    if not return_scores:
        return z, lse, top, lse.new_empty(0)
    return z, lse, top, scores.clone() if scores is i.scores else scores


def _pool(
    i: Inputs,
    o: Options,
    shape: plan.Shape,
    scores: Tensor,
    z: Tensor,
    top: Tensor,
    *,
    lse: Tensor | None = None,
    whole: Tensor | None = None,
    peaks: Tensor | None = None,
) -> None:
    """Scores (but given ones), z, top and lse; with ``whole``, top of all, of the rest, and its peaks."""
    block = plan.blocks(i, shape)
    tiles = plan.piece_tiles(i, shape, block)
    length = tiles * block["BLOCK_N"]
    pieces = plan.pieces(shape, length)
    partial, largest, total = z, top, top  # none are written where every row is one piece
    if pieces > shape.batch:
        partial = z.new_empty(pieces, *z.shape[1:])
        largest, total = z.new_empty(2, pieces, *z.shape[1:3])
    pool_kernel[_programs(shape, block, pieces)](
        **_scorer(i, o, shape, scores, block),
        z=z,
        lse=lse,
        top=top,
        whole=whole,
        peaks=peaks,
        partial=partial,
        largest_out=largest,
        total_out=total,
        tiles=tiles,
    )
    if pieces > shape.batch:
        block = plan.merge_blocks(shape, length, shape.features)
        merge_kernel[z[..., 0].numel(), triton.cdiv(shape.features, block["BLOCK_D"])](
            *(partial, largest, total, z, lse, top, i.offsets),
            **shape.sizes,
            length=length,
            **{**LAUNCH, **block},
        )


# ------------------------------------------------------------------ backward


def softmax_pool_bwd(
    dz: Tensor, z: Tensor, dlse: Tensor | None, dscores: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    *tensors, top, scorer, act, scale = arguments[:16]
    need_values, need_keys, need_query, need_weights, need_logits = arguments[16:]
    i, o = Inputs(*tensors), Options(scorer, act, scale)
    shape = plan.shape_of(i)

    def nothing() -> Tensor:
        return i.values.new_empty(0)  # of outputs no two are one tensor

    def like(t: Tensor | None, needed: bool) -> Tensor:
        return torch.empty_like(t) if t is not None and needed else nothing()

    def accumulated(t: Tensor | None, needed: bool = True) -> Tensor:
        return t.new_empty(t.shape, dtype=top.dtype) if t is not None and needed else nothing()

    dvalues, dkeys = like(i.values, need_values), like(i.keys, need_keys)
    dquery = accumulated(i.query, need_query)
    weights = [accumulated(t, need_weights) for t in (i.V, i.b_V, i.U, i.b_U, i.w)]
    by_item = (i.values.shape[0], shape.heads, shape.queries, shape.items)
    dlogits = top.new_empty(by_item) if need_logits else nothing()

    shared = i.keys is None and scorer != "given"
    to_keys = need_keys or (need_values and shared)
    p = top.new_empty(by_item) if need_values else None
    de = top.new_empty(by_item) if to_keys or need_query or need_weights else None
    if p is None and de is None and not need_logits:
        return (dvalues, dkeys, dquery, dlogits, *weights)
    logits = dlogits if need_logits else None
    with torch.cuda.device_of(dz):
        dw = weights[4] if need_weights and scorer == "additive" else None
        # scores that are made again go where de or p will be
        free = next(t for t in (i.scores, de, p, logits) if t is not None)
        by_weight = {"dscores": dscores, "p_out": p, "de_out": de, "dlogits": logits}
        by_weight |= _deltas(i, o, shape, free, dz, z, dlse, top, by_weight)
        _weights_grad(i, o, shape, dz, top, by_weight, dquery if need_query else None, dw)
        if scorer == "gated":
            if de is not None:
                _gated_grad(i, o, shape, dz, p, de, dvalues, weights if need_weights else None)
        else:
            if need_values:
                own = o if shared else o._replace(scorer="given")
                _items_grad(i, own, shape, i.values, p, dz, de, dvalues)
            if need_keys and i.keys is not None:
                _items_grad(i, o, shape, i.keys, None, dz, de, dkeys)
    return (dvalues, dkeys, dquery, dlogits, *weights)


def _deltas(
    i: Inputs,
    o: Options,
    shape: plan.Shape,
    scores: Tensor,
    dz: Tensor,
    z: Tensor,
    dlse: Tensor | None,
    top: Tensor,
    by_weight: plan.Arguments,
) -> plan.Arguments:
    """What dz . v is compared with, and the peaks, whose gradients are made here of the pool of the rest."""
    delta, rest_z, rest_top = (torch.empty_like(t) for t in (top[0], z, top))
    peaks = torch.full_like(delta, -1, dtype=torch.int64)
    _pool(i, o, shape, scores, rest_z, rest_top, whole=top, peaks=peaks)
    deltas = {"delta": delta, "peaks": peaks}
    delta_kernel[(delta.numel(),)](
        **plan.strided("values", i.values),
        **deltas,
        **by_weight,
        dz=dz,
        z=z,
        dlse=dlse,
        top=top,
        rest_z=rest_z,
        rest_top=rest_top,
        **shape.sizes,
        ragged=int(shape.ragged),
        scale=o.scale,
        BLOCK_D=plan.power(shape.features, 16, 1024),
        **LAUNCH,
    )
    return deltas


def _weights_grad(
    i: Inputs,
    o: Options,
    shape: plan.Shape,
    dz: Tensor,
    top: Tensor,
    by_weight: plan.Arguments,
    dquery: Tensor | None,
    dw: Tensor | None,
) -> None:
    block = plan.blocks(i, shape, backward=True)
    tiles = plan.piece_tiles(i, shape, block)
    length = tiles * block["BLOCK_N"]
    pieces = plan.pieces(shape, length)
    groups = parts = dw_parts = None
    if dquery is not None or dw is not None:
        assert i.query is not None
        if i.query.shape[0] == 1:
            groups = plan.groups(shape, block, pieces)
        parts = top.new_empty(pieces if groups is None else groups, *i.query.shape[1:])
    programs = _programs(shape, block, pieces if parts is None else parts.shape[0])
    if dw is not None:
        dw_parts = top.new_empty(programs[0], shape.units)
    weights_kernel[programs](
        **_scorer(i, o, shape, i.scores, block),
        **by_weight,
        top=top,
        dz=dz,
        dquery=parts,
        dw=dw_parts,
        tiles=tiles,
        pieces=pieces,
        groups=groups,
    )
    if parts is not None and dquery is not None and dquery.numel():
        if groups is not None:
            sum_rows(parts.flatten(1), dquery)
        else:
            cols = dquery[0].numel()
            block = plan.merge_blocks(shape, length, cols)
            sum_pieces_kernel[shape.batch * triton.cdiv(cols, block["BLOCK_D"]),](
                *(parts, dquery, i.offsets, cols, shape.items, length), **{**LAUNCH, **block}
            )
    if dw_parts is not None and dw is not None:
        sum_rows(dw_parts, dw)


def _items_grad(
    i: Inputs,
    o: Options,
    shape: plan.Shape,
    x: Tensor,
    p: Tensor | None,
    dz: Tensor,
    de: Tensor | None,
    dx: Tensor,
    skipped: int = 0,
    **gated: Tensor | None,
) -> None:
    """dx of the items of ``shape``, which for the gated scorer may be a segment of them."""
    weights = de if p is None else p
    assert weights is not None
    features = x.shape[3]
    arguments = {
        **plan.strided("x", x),
        **plan.strided("dx", dx),
        **{name: gated.get(name) for name in ("da", "db", "V", "U")},
        "p": p,
        "dz": dz,
        "de": de,
        "query": i.query,
        "w": i.w,
        "offsets": i.offsets,
        "batch": shape.batch,
        **shape.sizes,
        "features": features,  # of keys, these may be others than the values'
        "units": shape.units,
        "skipped": skipped,
        "weights_batch": _stride(weights, 0),
        "weights_head": _stride(weights, 1),
        "weights_query": _stride(weights, 2),
        "query_batch": _stride(i.query, 0),
        "SCORER": o.scorer,
        "ACT": o.act,
        "EXACT": x.dtype == torch.float32,
    }

    def launch(block: dict[str, int]) -> None:
        tiles = plan.item_tiles(shape)
        pieces = plan.pieces(shape, tiles * block["BLOCK_N"])
        grid = pieces * shape.heads, triton.cdiv(features, block["BLOCK_F"])
        items_kernel[grid](**arguments, tiles=tiles, **{**LAUNCH, **block})

    candidates = plan.spread(x, shape, o.scorer)
    block = candidates[0]
    if tune.enabled and len(candidates) > 1:
        kind = shape._replace(batch=shape.batch.bit_length()), features, x.dtype, p is None
        block = tune.choose(("items_kernel", o.scorer, *kind), candidates, launch)
    launch(block)


def _gated_grad(
    i: Inputs,
    o: Options,
    shape: plan.Shape,
    dz: Tensor,
    p: Tensor | None,
    de: Tensor,
    dvalues: Tensor,
    grads: list[Tensor] | None,
) -> None:
    """dvalues, and dV, db_V, dU, db_U, dw in ``grads``, a segment of the items at a time."""
    parts = plan.segments(shape, i.values)
    hidden = HiddenGrad(i, o, shape, parts, grads)
    for b0, b1, n0, n1 in parts:
        here = i._replace(values=i.values[b0:b1, :, n0:n1])
        part_de = de[b0:b1, :, :, n0:n1]
        da, db = hidden.segment(here.values, part_de)
        if p is not None:
            rows = slice(None) if shape.ragged else slice(b0, b1)
            _items_grad(
                here,
                o,
                shape._replace(batch=dz[rows].shape[0], items=n1 - n0),
                here.values,
                p[b0:b1, :, :, n0:n1],
                dz[rows],
                part_de,
                dvalues[b0:b1, :, n0:n1],
                skipped=n0,
                da=da,
                db=db,
                V=i.V,
                U=i.U,
            )
    hidden.finish()
