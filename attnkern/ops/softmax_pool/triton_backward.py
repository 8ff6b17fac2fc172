"""Backward Triton kernels of softmax_pool that every scorer uses; legend in triton_items.py."""

from __future__ import annotations

import triton
import triton.language as tl

from attnkern._triton.activation import activation, activation_grad
from attnkern._triton.product import product, sum_rows_of_tile
from attnkern.ops.softmax_pool.triton_items import (
    add_spread,
    add_weighted,
    load_items,
    load_rows,
    load_weights,
    logits,
    over_items,
    piece_of,
    row_of_pieces,
    score,
    times_items,
)


@triton.jit
def accumulate(t, value, valid, repeated):
    """t += value where ``repeated``, else t = value, on a tile that this program alone writes."""
    if repeated:
        value += tl.load(t, mask=valid, other=0.0)
    tl.store(t, value, mask=valid)


@triton.jit
def query_grad(
    first,
    last,
    m0,
    m,
    in_m,
    x,
    item_stride,
    feature_stride,
    query,
    w,
    de,
    dquery,
    dw,
    repeated,
    items,
    queries,
    units,
    SCORER: tl.constexpr,
    ACT: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dot: dq = sum_n de k;  additive: dq = sum_n de w act'(k + q), dw = sum_mn de act(k + q)."""
    for k0 in range(0, units, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K).to(tl.int64)
        in_k = k < units
        if SCORER == "dot":
            acc = tl.zeros([BLOCK_N if BLOCK_M == 1 else BLOCK_M, BLOCK_K], tl.float32)
            for n0 in range(first, last, BLOCK_N):
                n = n0 + tl.arange(0, BLOCK_N).to(tl.int64)
                tile = load_items(x, n * item_stride, n < last, k, units, feature_stride)
                weights = load_weights(de, m, in_m, items, n, n < last)
                acc = add_weighted(weights, tile.to(tl.float32), acc, EXACT)
            places = dquery + m[:, None] * units + k[None, :]
            valid = in_m[:, None] & in_k[None, :]
            accumulate(places, over_items(acc, BLOCK_M), valid, repeated)
        else:
            tl.static_assert(SCORER == "additive")
            weight = tl.load(w + k, mask=in_k, other=0.0)[None, :]
            acc_w = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            for one in range(m0, tl.minimum(m0 + BLOCK_M, queries)):
                q = tl.load(query + one * units + k, mask=in_k, other=0.0)[None, :]
                acc_q = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
                for n0 in range(first, last, BLOCK_N):
                    n = n0 + tl.arange(0, BLOCK_N).to(tl.int64)
                    tile = load_items(x, n * item_stride, n < last, k, units, feature_stride)
                    s = tile.to(tl.float32) + q
                    g = tl.load(de + one * items + n, mask=n < last, other=0.0)[:, None]
                    acc_q += activation_grad(g * weight, s, 0.0, ACT)
                    if dw is not None:
                        acc_w += g * activation(s, 0.0, ACT)
                accumulate(dquery + one * units + k, sum_rows_of_tile(acc_q), in_k, repeated)
            if dw is not None:
                accumulate(dw + k, sum_rows_of_tile(acc_w), in_k, repeated)


@triton.jit(do_not_specialize=["batch", "heads", "queries", "tiles", "pieces", "groups"])
def weights_kernel(
    values,
    keys,
    query,
    scores,
    V,
    b_V,
    U,
    b_U,
    w,
    c,
    bias,
    offsets,
    top,
    dz,
    delta,
    peaks,
    dscores,
    p_out,
    de_out,
    dlogits,
    dquery,
    dw,
    batch,
    heads,
    items,
    queries,
    features,
    units,
    tiles,
    pieces,
    groups,
    scale,
    values_batch,
    values_head,
    values_item,
    values_feature,
    keys_batch,
    keys_head,
    keys_item,
    keys_feature,
    query_batch,
    c_batch,
    bias_batch,
    bias_head,
    bias_query,
    SCORER: tl.constexpr,
    ACT: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """
    Computes  p = softmax(l), dl = p (dz . v - delta), de = scale dl + dscores but those of the peaks,
              and over its pieces dq (and additive dw)
    Layout    p, de, dl [B, H, M, N], dq [groups, H, M, K] float32
    Mapping   a program owns a piece, a head and BLOCK_M queries; with ``groups``, where samples share
              the query, all pieces that it gets when groups take them in turn
    Traffic   x from memory once; again from L1 or L2 for scores and dq where they need it, and
              for each block of hidden units
    Numerics  float32, tiles in order; de passes in memory, at a barrier
    """
    blocks = tl.cdiv(queries, BLOCK_M)
    pid = tl.program_id(0).to(tl.int64)
    m0 = (pid % blocks) * BLOCK_M
    m = m0 + tl.arange(0, BLOCK_M)
    in_m = m < queries
    h = pid // blocks % heads
    group = pid // blocks // heads
    rows = tl.cast(batch, tl.int64) * heads * queries
    length = tl.cast(tiles, tl.int64) * BLOCK_N
    end, step = group + 1, 1
    if groups is not None:
        end, step = tl.cast(pieces, tl.int64), groups
    for piece in range(group, end, step):
        b, first, last, _, _ = piece_of(piece, offsets, batch, 0, items, length)
        row = (b * heads + h) * queries
        sample = b if offsets is None else b * 0
        row_n = (sample * heads + h) * queries * items
        row_values = values + sample * values_batch + h * values_head
        row_bias, row_keys, row_query, row_c = bias, keys, query, c
        if bias is not None:
            row_bias += sample * bias_batch + h * bias_head
        if SCORER != "given":
            row_keys += sample * keys_batch + h * keys_head
            if query is not None:
                row_query += b * query_batch + h * queries * units
            if c is not None:
                row_c += b * c_batch + h * queries
        largest = tl.load(top + row + m, mask=in_m, other=0.0)
        weight = tl.load(top + rows + row + m, mask=in_m, other=0.0)
        subtracted = tl.load(delta + row + m, mask=in_m, other=0.0)
        peak = tl.load(peaks + row + m, mask=in_m, other=-1)
        for n0 in range(first, last, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N).to(tl.int64)
            in_n = n < last
            if SCORER == "given":
                e = load_weights(scores + row_n, m, in_m, items, n, in_n)
            else:
                e = score(
                    m0, m, in_m, n, in_n, row_keys, keys_item, keys_feature, row_query,
                    V, b_V, U, b_U, w, row_c, queries, features, units,
                    SCORER, ACT, EXACT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_K,
                )  # fmt: skip
            l = logits(e, row_bias, bias_query, m, in_m, n, in_n, scale)  # noqa: E741
            p = tl.exp(l - largest[:, None]) * weight[:, None]
            places = row_n + m[:, None] * items + n[None, :]
            valid = in_m[:, None] & in_n[None, :] & (n[None, :] != peak[:, None])  # delta_kernel's
            if p_out is not None:
                tl.store(p_out + places, p, mask=valid)
            dp = times_items(
                dz + row * features, m, in_m, row_values, n * values_item, in_n, features,
                values_feature, EXACT, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            dl = p * (dp - subtracted[:, None])
            if dlogits is not None:
                tl.store(dlogits + places, dl, mask=valid)
            if de_out is not None:
                de = scale * dl
                if dscores is not None:
                    de += tl.load(dscores + places, mask=valid, other=0.0)
                tl.store(de_out + places, de, mask=valid)
        if dquery is not None:
            tl.debug_barrier()
            program_dw = dw
            if dw is not None:
                program_dw += pid * units
            query_grad(
                first, last, m0, m, in_m, row_keys, keys_item, keys_feature, row_query, w,
                de_out + row_n, dquery + pid // blocks * queries * units, program_dw, piece > group,
                items, queries, units, SCORER, ACT, EXACT, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip


@triton.jit(do_not_specialize=["items", "length"])
def sum_pieces_kernel(
    parts, out, offsets, cols, items, length, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr
):
    """
    Computes  out = sum of the parts of a row's pieces
    Layout    parts [pieces, cols], out [B, cols] float32
    Mapping   a program owns one sample or bag and BLOCK_D columns
    Traffic   parts once
    Numerics  float32, pieces in order
    """
    blocks = tl.cdiv(cols, BLOCK_D)
    b = tl.program_id(0).to(tl.int64) // blocks
    d = tl.program_id(0).to(tl.int64) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    start, stop, piece = row_of_pieces(b, offsets, 0, items, length)
    pieces = tl.maximum(tl.cdiv(stop - start, length), 1)
    acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for s0 in range(0, pieces, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S).to(tl.int64)
        acc += tl.load(
            parts + (piece + s)[:, None] * cols + d[None, :],
            mask=(s < pieces)[:, None] & (d < cols)[None, :],
            other=0.0,
        )
    tl.store(out + b * cols + d, sum_rows_of_tile(acc), mask=d < cols)


@triton.jit(do_not_specialize=["batch", "heads", "queries", "tiles", "skipped"])
def items_kernel(
    x,
    p,
    dz,
    de,
    query,
    w,
    da,
    db,
    V,
    U,
    offsets,
    dx,
    batch,
    heads,
    items,
    queries,
    features,
    units,
    tiles,
    skipped,
    x_batch,
    x_head,
    x_item,
    x_feature,
    dx_batch,
    dx_head,
    dx_item,
    dx_feature,
    weights_batch,
    weights_head,
    weights_query,
    query_batch,
    SCORER: tl.constexpr,
    ACT: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """
    Computes  dx = sum_m p dz, plus what the scorer adds to its keys: sum_m de q (dot),
              sum_m de w act'(x + q) (additive), V^T da + U^T db (gated)
    Layout    dx like x; p, de [B, H, M, N] strided, da, db [B N, K] float32
    Mapping   a program owns one piece of a row's items and BLOCK_F features
    Traffic   writes dx once; reads x for the additive scorer alone
    Numerics  float32, queries and hidden units in order: tiles do not change a bit
    """
    f = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    in_f = f < features
    pid = tl.program_id(0).to(tl.int64)
    h = pid % heads
    length = tl.cast(tiles, tl.int64) * BLOCK_N
    b, first, last, _, _ = piece_of(pid // heads, offsets, batch, skipped, items, length)
    row = b * heads + h
    sample = b if offsets is None else b * 0
    row_weights = sample * weights_batch + h * weights_head
    for n0 in range(first, last, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N).to(tl.int64)
        in_n = n < last
        acc = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
        for m0 in range(0, queries, BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M).to(tl.int64)
            in_m = m < queries
            if p is not None:
                rows = load_rows(dz + row * queries * features, m, in_m, f, features)
                weights = load_weights(p + row_weights, m, in_m, weights_query, n, in_n)
                acc = add_spread(weights, rows, acc, EXACT)
            if SCORER == "dot":
                rows = load_rows(
                    query + b * query_batch + h * queries * features, m, in_m, f, features
                )
                weights = load_weights(de + row_weights, m, in_m, weights_query, n, in_n)
                acc = add_spread(weights, rows, acc, EXACT)
        if SCORER == "additive":
            places = sample * x_batch + h * x_head + n * x_item
            tile = load_items(x, places, in_n, f, features, x_feature).to(tl.float32)
            weight = tl.load(w + f, mask=in_f, other=0.0)[None, :]
            for one in range(0, queries):
                q = query + b * query_batch + (h * queries + one) * features + f
                s = tile + tl.load(q, mask=in_f, other=0.0)[None, :]
                at = row_weights + tl.cast(one, tl.int64) * weights_query + n
                g = tl.load(de + at, mask=in_n, other=0.0)
                acc += activation_grad(g[:, None] * weight, s, 0.0, ACT)
        if SCORER == "gated":
            at = (sample * items + n) * units
            for k0 in range(0, units, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K).to(tl.int64)
                in_k = k < units
                places = k[:, None] * features + f[None, :]
                valid = in_k[:, None] & in_f[None, :]
                tile = load_items(da, at, in_n, k, units, 1)
                rows = tl.load(V + places, mask=valid, other=0.0).to(tl.float32)
                acc = product(tile, rows, acc, EXACT)
                if U is not None:
                    tile = load_items(db, at, in_n, k, units, 1)
                    rows = tl.load(U + places, mask=valid, other=0.0).to(tl.float32)
                    acc = product(tile, rows, acc, EXACT)
        places = sample * dx_batch + h * dx_head + n[:, None] * dx_item + f[None, :] * dx_feature
        tl.store(dx + places, acc.to(dx.dtype.element_ty), mask=in_n[:, None] & in_f[None, :])
