"""The gradients of the gated scorer's hidden layer in Triton; legend in triton_items.py.

The kernels work on a segment of the items of all samples, item i being item i % N of sample i // N.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnkern._triton import LAUNCH
from attnkern._triton.activation import activation, activation_grad, sigmoid
from attnkern._triton.linear import sum_rows
from attnkern._triton.product import product
from attnkern.ops.softmax_pool import triton_plan as plan
from attnkern.ops.softmax_pool.reference import Inputs, Options
from attnkern.ops.softmax_pool.triton_items import add_spread, hidden, load_rows


@triton.jit(do_not_specialize=["batch", "queries"])
def hidden_grad_kernel(
    x,
    V,
    b_V,
    U,
    b_U,
    w,
    de,
    da,
    db,
    h_out,
    batch,
    items,
    queries,
    features,
    units,
    x_batch,
    x_item,
    x_feature,
    de_batch,
    de_query,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """
    Computes  a = V x + b_V, b = U x + b_U, g = sum_m de w, da = g sigmoid(b) act'(a),
              db = g act(a) sigmoid'(b), h = act(a) sigmoid(b)
    Layout    x [B, N, D] and de [B, M, N] strided; da, db, h [B N, K] float32
    Mapping   a program owns BLOCK_N items and BLOCK_K hidden units
    Traffic   x once a block of hidden units, from L2 after the first
    Numerics  float32 sums of exact products; features and queries in order
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    sample = i // items
    n = i % items
    in_n = sample < batch
    a, b = hidden(
        x, sample * x_batch + n * x_item, in_n, x_feature, V, b_V, U, b_U, k, features, units,
        BLOCK_N, BLOCK_K, BLOCK_F,
    )  # fmt: skip
    g = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for m0 in range(0, queries, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M).to(tl.int64)
        in_m = m < queries
        weights = tl.load(
            de + (sample * de_batch + n)[None, :] + m[:, None] * de_query,
            mask=in_m[:, None] & in_n[None, :],
            other=0.0,
        )
        g = add_spread(weights, load_rows(w, m, in_m, k, units), g, True)
    valid = in_n[:, None] & (k < units)[None, :]
    places = i[:, None] * units + k[None, :]
    h = activation(a, 0.0, ACT)
    if U is not None:
        s = sigmoid(b)
        tl.store(db + places, g * h * s * (1.0 - s), mask=valid)
        g *= s
        h *= s
    tl.store(da + places, activation_grad(g, a, 0.0, ACT), mask=valid)
    if h_out is not None:
        tl.store(h_out + places, h, mask=valid)


@triton.jit(do_not_specialize=["batch", "splits"])
def outer_kernel(
    a,
    x,
    out,
    sums,
    batch,
    items,
    rows,
    cols,
    splits,
    a_batch,
    a_item,
    a_col,
    x_batch,
    x_item,
    x_col,
    ADD: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """
    Computes  out = sum_i a_i x_i^T and sums = sum_i a_i over a split of the segment; with ADD they
              are added to what is there
    Layout    a [B, N, I] float32 and x [B, N, J] strided, out [splits, I, J], sums [splits, I]
    Mapping   a program owns [BLOCK_I, BLOCK_J] of out and one split
    Traffic   a once a block of columns, x once a block of rows, from L2
    Numerics  float32 sums, items in order
    """
    blocks = tl.cdiv(rows, BLOCK_I)
    pid = tl.program_id(0).to(tl.int64)
    r = (pid % blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
    split = pid // blocks
    col = tl.program_id(1).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    in_r = r < rows
    in_col = col < cols
    steps = tl.cdiv(tl.cdiv(batch * tl.cast(items, tl.int64), BLOCK_N), splits)
    acc = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    total = tl.zeros([BLOCK_I], tl.float32)
    for step in range(split * steps, (split + 1) * steps):
        i = step * BLOCK_N + tl.arange(0, BLOCK_N)
        sample = i // items
        n = i % items
        in_n = sample < batch
        left = tl.load(
            a + r[:, None] * a_col + (sample * a_batch + n * a_item)[None, :],
            mask=in_r[:, None] & in_n[None, :],
            other=0.0,
        )
        right = tl.load(
            x + (sample * x_batch + n * x_item)[:, None] + col[None, :] * x_col,
            mask=in_n[:, None] & in_col[None, :],
            other=0.0,
        ).to(tl.float32)
        acc = product(left, right, acc, EXACT)
        total += tl.sum(left, axis=1)
    valid = in_r[:, None] & in_col[None, :]
    places = out + (split * rows + r[:, None]) * cols + col[None, :]
    if ADD:
        acc += tl.load(places, mask=valid, other=0.0)
    tl.store(places, acc, mask=valid)
    if sums is not None:  # noqa: SIM102  (one condition is the compiler's, one the program's)
        if tl.program_id(1) == 0:
            places_r = sums + split * rows + r
            if ADD:
                total += tl.load(places_r, mask=in_r, other=0.0)
            tl.store(places_r, total, mask=in_r)


class HiddenGrad:
    """da and db a segment of the items at a time, and what their sums over all segments come to."""

    def __init__(
        self,
        i: Inputs,
        o: Options,
        shape: plan.Shape,
        parts: list[plan.Segment],
        grads: list[Tensor] | None,
    ) -> None:
        assert i.V is not None
        assert i.w is not None
        self.i, self.o, self.shape, self.grads, self.first = i, o, shape, grads, True
        self.exact = i.values.dtype == torch.float32
        self.block = plan.hidden_blocks(i, shape)
        count = max(((b1 - b0) * (n1 - n0) for b0, b1, n0, n1 in parts), default=0)
        new = i.w.new_empty
        self.da = new(count, shape.units)
        self.db = None if i.U is None else new(count, shape.units)
        self.h = None if grads is None else new(count, shape.units)
        if grads is not None:
            # with no segment at all nothing is written, and the sums over no rows are 0
            self.partial = [
                new(splits if parts else 0, *t.shape)
                for t, splits in zip(
                    grads, plan.outer_splits(shape, count, self.exact), strict=True
                )
            ]

    def segment(self, x: Tensor, de: Tensor) -> tuple[Tensor, Tensor | None]:
        """da and db [B N, K] for items x [B, 1, N, D] and de [B, 1, M, N]."""
        i, shape = self.i, self.shape
        batch, _, items, _ = x.shape
        count, units = batch * items, shape.units
        grid = triton.cdiv(count, self.block["BLOCK_N"]), triton.cdiv(units, self.block["BLOCK_K"])
        hidden_grad_kernel[grid](
            x=x,
            **{name: getattr(i, name) for name in ("V", "b_V", "U", "b_U", "w")},
            de=de,
            da=self.da,
            db=self.db,
            h_out=self.h,
            batch=batch,
            items=items,
            queries=shape.queries,
            features=shape.features,
            units=units,
            x_batch=x.stride(0),
            x_item=x.stride(2),
            x_feature=x.stride(3),
            de_batch=de.stride(0),
            de_query=de.stride(2),
            ACT=self.o.act,
            **{**LAUNCH, **self.block},
        )
        if self.h is not None:
            of_items, x = (batch, items, units), x[:, 0]
            dV, db_V, dU, db_U, dw = self.partial
            da = self.da[:count].view(of_items)
            self._add(da, x, dV, None if i.b_V is None else db_V, self.exact)
            if self.db is not None:
                db = self.db[:count].view(of_items)
                self._add(db, x, dU, None if i.b_U is None else db_U, self.exact)
            self._add(de[:, 0].transpose(1, 2), self.h[:count].view(of_items), dw, None, True)
            self.first = False
        return self.da, self.db

    def _add(self, a: Tensor, x: Tensor, out: Tensor, sums: Tensor | None, exact: bool) -> None:
        """out [splits, I, J] (+)= sum of a x^T, sums [splits, I] (+)= sum of a, over [B, N]."""
        splits, rows, cols = out.shape
        block = plan.outer_blocks(rows, exact)
        grid = triton.cdiv(rows, block["BLOCK_I"]) * splits, triton.cdiv(cols, block["BLOCK_J"])
        outer_kernel[grid](
            a,
            x,
            out,
            sums,
            *(a.shape[0], a.shape[1], rows, cols, splits),
            *a.stride(),
            *x.stride(),
            ADD=not self.first,
            EXACT=exact,
            **{**LAUNCH, **block},
        )

    def finish(self) -> None:
        if self.grads is not None:
            for partial, total in zip(self.partial, self.grads, strict=True):
                if total.numel():
                    sum_rows(partial.flatten(1), total)
