"""Forward Triton kernels of softmax_pool; legend in triton_items.py."""

from __future__ import annotations

import triton
import triton.language as tl

from attnkern._triton.product import sum_rows_of_tile
from attnkern.ops.softmax_pool.reference import PEAK, PEAKED
from attnkern.ops.softmax_pool.triton_items import (
    add_weighted,
    load_items,
    load_weights,
    logits,
    over_items,
    piece_of,
    row_of_pieces,
    score,
)

_PEAKED, _PEAK = tl.constexpr(PEAKED), tl.constexpr(PEAK)


@triton.jit
def _divisor(total):
    """total, or 1 for a row without a logit above -inf, whose sum is 0."""
    return tl.where(total == 0, 1.0, total)


@triton.jit
def log_sum(total, base):
    """log of a sum of exponentials relative to ``base``; -inf where it is empty."""
    return tl.where(total == 0, float("-inf"), tl.log(_divisor(total)) + base)


@triton.jit
def store_row(lse, top, row, rows, base, total, valid):
    """lse (if not None) and top of rows whose exponentials relative to ``base`` have this sum."""
    if lse is not None:
        tl.store(lse + row, log_sum(total, base), mask=valid)
    tl.store(top + row, tl.where(total == 0, 0.0, base), mask=valid)
    tl.store(top + rows + row, tl.where(total == 0, 0.0, 1.0 / _divisor(total)), mask=valid)


@triton.jit
def peak_bounds(whole, row, rows, valid):
    """The logit that only a row's peak is above, infinite where it has none."""
    largest = tl.load(whole + row, mask=valid, other=0.0)
    weight = tl.load(whole + rows + row, mask=valid, other=0.0)
    peaked = weight > _PEAKED
    return tl.where(peaked, largest - tl.log(tl.where(peaked, weight, 1.0) / _PEAK), float("inf"))


@triton.jit(do_not_specialize=["batch", "heads", "queries", "tiles"])
def pool_kernel(
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
    z,
    lse,
    top,
    whole,
    peaks,
    partial,
    largest_out,
    total_out,
    batch,
    heads,
    items,
    queries,
    features,
    units,
    tiles,
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
    Computes  e, l = scale e + bias, and over a piece of a row max l, sum exp(l - max) and
              z = sum_n exp(l - max) v[n]; where that is all of the row lse, top and z themselves.
              With ``whole`` the pool of the rest (csrc/ops/softmax_pool/params.h) of the rows that
              have a peak
    Layout    scores [B, H, M, N] float32: given, or written; z [B, H, M, D], partial [pieces, H, M, D]
    Mapping   a program owns one piece, head and BLOCK_M queries: scores of the piece, then their
              maximum and sum, then z by blocks of features
    Traffic   x from memory once; again from L1 or L2 for z where scores are made of x too, and for
              each block of hidden units
    Numerics  float32, tiles in order, a tree within a tile; scores pass in memory, at a barrier
    """
    blocks = tl.cdiv(queries, BLOCK_M)
    pid = tl.program_id(0).to(tl.int64)
    m0 = (pid % blocks) * BLOCK_M
    m = m0 + tl.arange(0, BLOCK_M)
    h = pid // blocks % heads
    length = tl.cast(tiles, tl.int64) * BLOCK_N
    b, first, last, start, stop = piece_of(pid // blocks // heads, offsets, batch, 0, items, length)
    row = b * heads + h
    sample = b if offsets is None else b * 0
    in_m = m < tl.where((first < last) | (start == stop), queries, 0)  # none of a piece too many
    values += sample * values_batch + h * values_head
    scores += (sample * heads + h) * queries * items
    if bias is not None:
        bias += sample * bias_batch + h * bias_head
    rows = tl.cast(batch, tl.int64) * heads * queries
    if whole is not None:
        bound = peak_bounds(whole, row * queries + m, rows, in_m)
        last = tl.where(tl.min(bound, axis=0) < float("inf"), last, first)

    if SCORER != "given":
        keys += sample * keys_batch + h * keys_head
        if query is not None:
            query += b * query_batch + h * queries * units
        if c is not None:
            c += b * c_batch + h * queries
        for n0 in range(first, last, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N).to(tl.int64)
            e = score(
                m0, m, in_m, n, n < last, keys, keys_item, keys_feature, query, V, b_V, U, b_U, w, c,
                queries, features, units, SCORER, ACT, EXACT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_K,
            )  # fmt: skip
            tl.store(
                scores + m[:, None] * items + n[None, :],
                e,
                mask=in_m[:, None] & (n < last)[None, :],
            )
        tl.debug_barrier()

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    base = tl.zeros([BLOCK_M], tl.float32)  # largest, or 0 where that is -inf
    for n0 in range(first, last, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N).to(tl.int64)
        e = load_weights(scores, m, in_m, items, n, n < last)
        l = logits(e, bias, bias_query, m, in_m, n, n < last, scale)  # noqa: E741
        if whole is not None:
            peak = l > bound[:, None]
            item = tl.broadcast_to(n[None, :], peak.shape)
            tl.store(peaks + row * queries + m[:, None] + item * 0, item, mask=peak)
            l = tl.where(peak, float("-inf"), l)  # noqa: E741
        new = tl.maximum(largest, tl.max(l, axis=1))
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(l - base[:, None]), axis=1)
        largest = new

    alone = stop - start <= length
    row_out = tl.where(alone, row, pid // blocks) * queries + m
    if alone:
        store_row(lse, top, row_out, rows, base, total, in_m)
    else:
        tl.store(largest_out + row_out, largest, mask=in_m)
        tl.store(total_out + row_out, total, mask=in_m)
    for d0 in range(0, features, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D).to(tl.int64)
        acc = tl.zeros([BLOCK_N if BLOCK_M == 1 else BLOCK_M, BLOCK_D], tl.float32)
        for n0 in range(first, last, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N).to(tl.int64)
            e = load_weights(scores, m, in_m, items, n, n < last)
            l = logits(e, bias, bias_query, m, in_m, n, n < last, scale)  # noqa: E741
            if whole is not None:
                l = tl.where(l > bound[:, None], float("-inf"), l)  # noqa: E741
            tile = load_items(values, n * values_item, n < last, d, features, values_feature)
            acc = add_weighted(tl.exp(l - base[:, None]), tile.to(tl.float32), acc, EXACT)
        out = over_items(acc, BLOCK_M)
        places = row_out[:, None] * features + d[None, :]
        valid = in_m[:, None] & (d < features)[None, :]
        if alone:
            out = tl.where((total == 0)[:, None], 0.0, out / _divisor(total)[:, None])
            tl.store(z + places, out, mask=valid)
        else:
            tl.store(partial + places, out, mask=valid)


@triton.jit(do_not_specialize=["heads", "items", "queries", "length"])
def merge_kernel(
    partial,
    largest_in,
    total_in,
    z,
    lse,
    top,
    offsets,
    heads,
    items,
    queries,
    features,
    length,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """
    Computes  lse = log sum_s total_s exp(max_s - max) + max, top,  z = sum_s exp(max_s - lse) partial_s
              of the rows that have several pieces s
    Layout    partial [pieces, H, M, D], max and total [pieces, H, M] float32; z [B, H, M, D]
    Mapping   a program owns one row and BLOCK_D features
    Traffic   partial once
    Numerics  float32, pieces in order
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = tl.cast(heads, tl.int64) * queries  # of a piece
    start, stop, piece = row_of_pieces(row // rows, offsets, 0, items, length)
    pieces = tl.cdiv(stop - start, length)
    if pieces > 1:
        place = piece * rows + row % rows
        largest = tl.full([BLOCK_S], float("-inf"), tl.float32)
        for s0 in range(0, pieces, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S).to(tl.int64)
            here = tl.load(largest_in + place + s * rows, mask=s < pieces, other=float("-inf"))
            largest = tl.maximum(largest, here)
        base = tl.max(largest, axis=0)
        base = tl.where(base == float("-inf"), 0.0, base)
        sums = tl.zeros([BLOCK_S], tl.float32)
        acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
        for s0 in range(0, pieces, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S).to(tl.int64)
            in_s = s < pieces
            here = tl.load(largest_in + place + s * rows, mask=in_s, other=float("-inf"))
            share = tl.exp(here - base)
            sums += share * tl.load(total_in + place + s * rows, mask=in_s, other=0.0)
            tile = tl.load(
                partial + (place + s * rows)[:, None] * features + d[None, :],
                mask=in_s[:, None] & (d < features)[None, :],
                other=0.0,
            )
            acc += share[:, None] * tile
        total = tl.sum(sums, axis=0)
        out = tl.where(total == 0, 0.0, sum_rows_of_tile(acc) / _divisor(total))
        tl.store(z + row * features + d, out, mask=d < features)
        if tl.program_id(1) == 0:
            all_rows = tl.num_programs(0).to(tl.int64)
            store_row(lse, top, row, all_rows, base, total, total == total)
