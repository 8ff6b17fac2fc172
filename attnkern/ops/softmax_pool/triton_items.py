"""Device functions shared by the Triton kernels of softmax_pool; formulas in reference.py.

B samples or bags, H heads, N items, M queries, D features of values, K features of keys or hidden
units.  A program works on items first..last of one row (b, h), a tile of BLOCK_N at a time, and on
BLOCK_M queries: with one query products are sums of elementwise products, else those of matrices.
Items are values [N, D] or keys [N, K] with free strides; small tensors are dense float32.  All
offsets are int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnkern._triton.activation import activation, sigmoid
from attnkern._triton.product import (
    product,
    product_in_two,
    product_of_stored,
    round_to_tf32,
    sum_rows_of_tile,
)


@triton.jit
def bag_start(offsets, b, skipped, items):
    """First item of bag b among ``items`` of all bags that ``skipped`` others precede."""
    return tl.minimum(tl.maximum(tl.load(offsets + b) - skipped, 0), items)


@triton.jit
def row_of_pieces(b, offsets, skipped, items, length):
    """First item of row b and the one after its last, and its first piece.

    A row has ceil(items / length) pieces, an empty one has one.  A bag has a place, and one more for
    each multiple of ``length`` that it passes: that is enough, and leaves one empty at most.
    """
    start, stop = tl.cast(0, tl.int64), tl.cast(items, tl.int64)
    if offsets is None:
        piece = b * tl.maximum(tl.cdiv(stop, length), 1)
    else:
        start = bag_start(offsets, b, skipped, stop)
        stop = bag_start(offsets, b + 1, skipped, stop)
        piece = b + start // length
    return start, stop, piece


@triton.jit
def piece_of(piece, offsets, batch, skipped, items, length):
    """Row of a piece, its first item and the one after its last, and those of the row."""
    if offsets is None:
        b = piece // tl.maximum(tl.cdiv(tl.cast(items, tl.int64), length), 1)
    else:
        b = piece * 0  # the last bag whose first piece is at most this
        last = b + batch - 1
        while b < last:
            middle = (b + last + 1) // 2
            start = bag_start(offsets, middle, skipped, tl.cast(items, tl.int64))
            found = start < (piece - middle + 1) * length
            b = tl.where(found, middle, b)
            last = tl.where(found, last, middle - 1)
    start, stop, first_piece = row_of_pieces(b, offsets, skipped, items, length)
    first = tl.minimum(start + (piece - first_piece) * length, stop)
    return b, first, tl.minimum(first + length, stop), start, stop


@triton.jit
def load_items(x, at, in_n, f, features, feature_stride):
    """The tile of items that start at ``at`` [BLOCK_N], features f: [BLOCK_N, F] in x's dtype."""
    valid = in_n[:, None] & (f < features)[None, :]
    return tl.load(x + at[:, None] + f[None, :] * feature_stride, mask=valid, other=0.0)


@triton.jit
def load_rows(t, m, in_m, f, features):
    """Rows m of t [M, features]: [BLOCK_M, F] float32."""
    valid = in_m[:, None] & (f < features)[None, :]
    return tl.load(t + m[:, None] * features + f[None, :], mask=valid, other=0.0).to(tl.float32)


@triton.jit
def load_weights(t, m, in_m, row_stride, n, in_n):
    """t [M, N] at queries m and items n: [BLOCK_M, BLOCK_N] float32, 0 outside."""
    valid = in_m[:, None] & in_n[None, :]
    return tl.load(t + m[:, None] * row_stride + n[None, :], mask=valid, other=0.0)


@triton.jit
def times_items(
    t,
    m,
    in_m,
    x,
    at,
    in_n,
    features,
    feature_stride,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """sum_f t[m, f] x[n, f]: [BLOCK_M, BLOCK_N]."""
    acc = tl.zeros([BLOCK_N, BLOCK_F] if BLOCK_M == 1 else [BLOCK_M, BLOCK_N], tl.float32)
    for f0 in range(0, features, BLOCK_F):
        f = f0 + tl.arange(0, BLOCK_F).to(tl.int64)
        rows = load_rows(t, m, in_m, f, features)
        tile = load_items(x, at, in_n, f, features, feature_stride).to(tl.float32)
        if BLOCK_M == 1:
            acc += rows * tile
        else:
            acc = product_in_two(rows, tl.trans(tile), acc, EXACT)
    return tl.sum(acc, axis=1)[None, :] if BLOCK_M == 1 else acc


@triton.jit
def add_weighted(p, tile, acc, EXACT: tl.constexpr):
    """acc + sum_n p[m, n] tile[n, f]; for one query acc is [BLOCK_N, F], see `over_items`."""
    return acc + tl.trans(p) * tile if p.shape[0] == 1 else product(p, tile, acc, EXACT)


@triton.jit
def over_items(acc, BLOCK_M: tl.constexpr):
    """[BLOCK_M, F] of what `add_weighted` summed."""
    return sum_rows_of_tile(acc)[None, :] if BLOCK_M == 1 else acc


@triton.jit
def add_spread(p, rows, acc, EXACT: tl.constexpr):
    """acc + sum_m p[m, n] rows[m, f]: [BLOCK_N, F]."""
    return acc + tl.trans(p) * rows if p.shape[0] == 1 else product(tl.trans(p), rows, acc, EXACT)


@triton.jit
def hidden(
    x,
    at,
    in_n,
    feature_stride,
    V,
    b_V,
    U,
    b_U,
    k,
    features,
    units,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """V x_n + b_V and U x_n + b_U for hidden units k: two [BLOCK_N, BLOCK_K]; the first twice without U."""
    in_k = k < units
    acc = tl.zeros([BLOCK_N, BLOCK_K if U is None else 2 * BLOCK_K], tl.float32)
    for f0 in range(0, features, BLOCK_F):
        f = f0 + tl.arange(0, BLOCK_F).to(tl.int64)
        tile = load_items(x, at, in_n, f, features, feature_stride)
        places = k[None, :] * features + f[:, None]
        valid = in_k[None, :] & (f < features)[:, None]
        weights = tl.load(V + places, mask=valid, other=0.0)
        if U is not None:
            # units of V and U in turn: of two products of 16 bits Triton makes each in four warps
            weights = tl.join(weights, tl.load(U + places, mask=valid, other=0.0))
            weights = tl.reshape(weights, [BLOCK_F, 2 * BLOCK_K])
        acc = product_of_stored(tile, weights, acc)
    a, b = acc, acc
    if U is not None:
        a, b = tl.split(tl.reshape(acc, [BLOCK_N, BLOCK_K, 2]))
    if b_V is not None:
        a += tl.load(b_V + k, mask=in_k, other=0.0)[None, :]
    if b_U is not None:
        b += tl.load(b_U + k, mask=in_k, other=0.0)[None, :]
    # 0 outside, where an infinite item times the padding of V is NaN
    a = tl.where(in_k[None, :], a, 0.0)
    b = tl.where(in_k[None, :], b, 0.0)
    return a, a if U is None else b


@triton.jit
def score(
    m0,
    m,
    in_m,
    n,
    in_n,
    x,
    item_stride,
    feature_stride,
    query,
    V,
    b_V,
    U,
    b_U,
    w,
    c,
    queries,
    features,
    units,
    SCORER: tl.constexpr,
    ACT: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """e [BLOCK_M, BLOCK_N] of a row whose keys, query and c these are."""
    at = n * item_stride
    if SCORER == "dot":
        e = times_items(
            query, m, in_m, x, at, in_n, units, feature_stride, EXACT, BLOCK_M, BLOCK_N, BLOCK_K
        )
    elif SCORER == "gated":
        e = tl.zeros([BLOCK_N, BLOCK_K] if BLOCK_M == 1 else [BLOCK_M, BLOCK_N], tl.float32)
        for k0 in range(0, units, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K).to(tl.int64)
            a, b = hidden(
                x, at, in_n, feature_stride, V, b_V, U, b_U, k, features, units,
                BLOCK_N, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            a = activation(a, 0.0, ACT)
            if U is not None:
                a *= sigmoid(b)
            rows = load_rows(w, m, in_m, k, units)
            if BLOCK_M == 1:
                e += rows * a
            else:
                e = product(rows, tl.trans(a if EXACT else round_to_tf32(a)), e, EXACT)
        if BLOCK_M == 1:
            e = tl.sum(e, axis=1)[None, :]
    else:
        tl.static_assert(SCORER == "additive")
        e = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k0 in range(0, units, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K).to(tl.int64)
            tile = load_items(x, at, in_n, k, units, feature_stride).to(tl.float32)
            weight = tl.load(w + k, mask=k < units, other=0.0)[None, :]
            for one in range(m0, tl.minimum(m0 + BLOCK_M, queries)):
                q = tl.load(query + one * units + k, mask=k < units, other=0.0)[None, :]
                terms = activation(tile + q, 0.0, ACT) * weight  # w is 0 outside, act(0 + 0) finite
                e += tl.where((m == one)[:, None], tl.sum(terms, axis=1)[None, :], 0.0)
    if c is not None:
        e += tl.load(c + m, mask=in_m, other=0.0)[:, None]
    return e


@triton.jit
def logits(e, bias, bias_query, m, in_m, n, in_n, scale):
    """l = scale e + bias, -inf where the bias is and outside the tile's items and queries."""
    l = scale * e  # noqa: E741
    valid = in_m[:, None] & in_n[None, :]
    if bias is not None:
        added = tl.load(bias + m[:, None] * bias_query + n[None, :], mask=valid, other=0.0)
        l = tl.where(added == float("-inf"), added, l + added)  # noqa: E741
    return tl.where(valid, l, float("-inf"))
