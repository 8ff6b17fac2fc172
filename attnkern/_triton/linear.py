"""Small fully connected layers on float32 rows: forward, both gradients, and sums over rows.

Rows [B, K] are dense float32, weights dense of their own dtype.  Every sum runs in a fixed order.
Sizes are not specialised: one compiled kernel serves every network of a dtype and activation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from attnkern._triton import LAUNCH
from attnkern._triton.activation import activation, activation_grad

SHARED_WEIGHTS = 1 << 22
"""Products from which 16 samples share the tiles of W they read, at a barrier a step."""


@triton.jit
def _activate(v, slopes, k, valid, slope, slope_stride, ACT: tl.constexpr):
    """act(v) where v's last dim is k; prelu takes its slopes [k] from memory."""
    if ACT == "prelu":
        slope = tl.load(slopes + k * slope_stride, mask=valid, other=0.0).to(tl.float32)[None, :]
    return activation(v, slope, ACT)


@triton.jit
def _linear_tile(
    b,
    o,
    v,
    w,
    bias,
    slopes,
    pre,
    out,
    slope_terms,
    batch,
    inputs,
    outputs,
    slope,
    slope_stride,
    TRANSPOSED: tl.constexpr,
    ACT: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Outputs o [BLOCK_O] of samples b [BLOCK_B]; see linear_kernel."""
    acc = (
        tl.zeros([BLOCK_B, BLOCK_O], tl.float32)
        if DOT
        else tl.zeros([BLOCK_O, BLOCK_K], tl.float32)
    )
    for k0 in range(0, inputs, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K).to(tl.int64)
        a = tl.load(
            v + b[:, None] * inputs + k[None, :],
            mask=(b < batch)[:, None] & (k < inputs)[None, :],
            other=0.0,
        )
        if pre is None:
            a = _activate(a, slopes, k, k < inputs, slope, slope_stride, ACT)
        offsets = (
            k[None, :] * outputs + o[:, None] if TRANSPOSED else o[:, None] * inputs + k[None, :]
        )
        weights = tl.load(
            w + offsets,
            mask=(o < outputs)[:, None] & (k < inputs)[None, :],
            other=0.0,
        ).to(tl.float32)
        if DOT:
            acc = tl.dot(a, tl.trans(weights), acc, input_precision="ieee")
        else:
            acc += a * weights
    total = acc if DOT else tl.sum(acc, axis=1)[None, :]
    if bias is not None:
        total += tl.load(bias + o, mask=o < outputs, other=0.0).to(tl.float32)[None, :]
    valid = (b < batch)[:, None] & (o < outputs)[None, :]
    offsets = b[:, None] * outputs + o[None, :]
    if pre is not None:
        h = tl.load(pre + offsets, mask=valid, other=0.0)
        if slope_terms is not None:
            tl.store(slope_terms + offsets, tl.where(h > 0, 0.0, h) * total, mask=valid)
        if ACT == "prelu":
            slope = tl.load(slopes + o * slope_stride, mask=o < outputs, other=0.0)
            slope = slope.to(tl.float32)[None, :]
        total = activation_grad(total, h, slope, ACT)
    tl.store(out + offsets, total, mask=valid)


@triton.jit(do_not_specialize=["batch", "inputs", "outputs", "slope_stride"])
def linear_kernel(
    v,
    w,
    bias,
    slopes,
    pre,
    out,
    slope_terms,
    batch,
    inputs,
    outputs,
    slope,
    slope_stride,
    TRANSPOSED: tl.constexpr,
    ACT: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """
    Computes  out = act(v) W^T + bias;  with ``pre`` [B, O], out = (v W^T) * act'(pre) instead, and
              slope_terms = (v W^T) * min(pre, 0), whose sum over samples is prelu's gradient
    Layout    v [B, K], out [B, O], W [O, K], or stored [K, O] with TRANSPOSED
    Mapping   a program owns [BLOCK_B, BLOCK_O] outputs and walks K; DOT False has BLOCK_B = 1
    Traffic   W once per BLOCK_B samples, from L2
    Numerics  float32, fixed order; DOT is IEEE float32 (no TF32)
    """
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o = tl.program_id(1).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    _linear_tile(
        b, o, v, w, bias, slopes, pre, out, slope_terms, batch, inputs, outputs,
        slope, slope_stride, TRANSPOSED, ACT, DOT, BLOCK_B, BLOCK_O, BLOCK_K,
    )  # fmt: skip


@triton.jit
def linear_sample(
    b,
    v,
    w,
    bias,
    slopes,
    pre,
    out,
    slope_terms,
    inputs,
    outputs,
    slope,
    slope_stride,
    TRANSPOSED: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """linear_kernel's work on sample b by one program; all its threads may then read ``out``."""
    for o0 in range(0, outputs, BLOCK_O):
        o = o0 + tl.arange(0, BLOCK_O).to(tl.int64)
        _linear_tile(
            b + tl.arange(0, 1), o, v, w, bias, slopes, pre, out, slope_terms, b + 1, inputs,
            outputs, slope, slope_stride, TRANSPOSED, ACT, False, 1, BLOCK_O, BLOCK_K,
        )  # fmt: skip
    tl.debug_barrier()


@triton.jit(do_not_specialize=["batch", "inputs", "outputs", "slope_stride"])
def weight_grad_kernel(
    g,
    v,
    slopes,
    dw,
    dbias,
    batch,
    outputs,
    inputs,
    slope,
    slope_stride,
    ACT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """
    Computes  dW = g^T act(v) and dbias = sum_b g
    Layout    g [B, O], v [B, K], dW [O, K]
    Mapping   a program owns [BLOCK_O, BLOCK_K] of dW and walks the samples
    Traffic   g once per BLOCK_K columns and v once per BLOCK_O rows, from L2
    Numerics  IEEE float32, samples in ascending order; zeros for B = 0
    """
    o = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_O, BLOCK_K], tl.float32)
    total = tl.zeros([BLOCK_O], tl.float32)
    for b0 in range(0, batch, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B).to(tl.int64)
        rows = tl.load(
            g + b[:, None] * outputs + o[None, :],
            mask=(b < batch)[:, None] & (o < outputs)[None, :],
            other=0.0,
        )
        a = tl.load(
            v + b[:, None] * inputs + k[None, :],
            mask=(b < batch)[:, None] & (k < inputs)[None, :],
            other=0.0,
        )
        a = _activate(a, slopes, k, k < inputs, slope, slope_stride, ACT)
        acc = tl.dot(tl.trans(rows), a, acc, input_precision="ieee")
        total += tl.sum(rows, axis=0)
    tl.store(
        dw + o[:, None] * inputs + k[None, :],
        acc.to(dw.dtype.element_ty),
        mask=(o < outputs)[:, None] & (k < inputs)[None, :],
    )
    if dbias is not None:  # noqa: SIM102  (one condition is the compiler's, one the program's)
        if tl.program_id(1) == 0:
            tl.store(dbias + o, total.to(dbias.dtype.element_ty), mask=o < outputs)


@triton.jit(do_not_specialize=["rows", "cols", "row_stride", "divisor"])
def sum_rows_kernel(
    terms, out, rows, cols, row_stride, divisor, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    """
    Computes  out = sum_r terms[r] / divisor
    Layout    terms [rows, cols] float32, rows of adjacent elements, out [cols]
    Mapping   a program owns BLOCK_COLS columns
    Traffic   reads terms once
    Numerics  float32, fixed order
    """
    col = tl.program_id(0).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for r0 in range(0, rows, BLOCK_ROWS):
        row = r0 + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        acc += tl.load(
            terms + row[:, None] * row_stride + col[None, :],
            mask=(row < rows)[:, None] & (col < cols)[None, :],
            other=0.0,
        )
    total = tl.sum(acc, axis=0) / divisor
    tl.store(out + col, total.to(out.dtype.element_ty), mask=col < cols)


class Layer(NamedTuple):
    """A fully connected layer with the activation before it: v -> W act(v) + b.

    W [O, K, 1...] and b [O] have any dtype; prelu's ``slopes`` are [K] or [1].
    """

    weight: Tensor
    bias: Tensor | None
    act: str = "identity"
    slope: float = 0.0
    slopes: Tensor | None = None

    def forward(self, v: Tensor) -> Tensor:
        """out [B, O] for v [B, K]."""
        out = v.new_empty(v.shape[0], self.weight.shape[0])
        return self._linear(v, out, False, bias=self.bias, pre=None, slope_terms=None)

    def backward(
        self, g: Tensor, out: Tensor, pre: Tensor | None = None, slope_terms: Tensor | None = None
    ) -> Tensor:
        """out = (g W) act'(pre), ``pre`` the forward's v; without it (g W).

        ``slope_terms``, like ``pre``, receives what sums over samples to prelu's gradient.
        """
        return self._linear(g, out, True, bias=None, pre=pre, slope_terms=slope_terms)

    def weight_grad(self, g: Tensor, v: Tensor, dw: Tensor, db: Tensor) -> None:
        """dw = g^T act(v), db = sum_b g."""
        outputs, inputs = self.weight.shape[:2]
        weight_grad_kernel[triton.cdiv(outputs, 32), triton.cdiv(inputs, 32)](
            g=g,
            v=v,
            dw=dw,
            dbias=None if self.bias is None else db,
            batch=v.shape[0],
            outputs=outputs,
            inputs=inputs,
            **self.activation(),
            BLOCK_B=16,
            BLOCK_O=32,
            BLOCK_K=32,
            **LAUNCH,
        )

    def activation(self) -> dict[str, Any]:
        """The kernels' arguments for the activation before it."""
        stride = 1 if self.slopes is not None and self.slopes.numel() > 1 else 0
        return {"slopes": self.slopes, "slope": self.slope, "slope_stride": stride, "ACT": self.act}

    def _linear(self, v: Tensor, out: Tensor, transposed: bool, **own: Any) -> Tensor:
        (batch, inputs), outputs = v.shape, out.shape[1]
        if batch >= 16 and batch * inputs * outputs >= SHARED_WEIGHTS:
            blocks = {"DOT": True, "BLOCK_B": 16, "BLOCK_O": 32, "BLOCK_K": 16}
        else:
            block_k = 256 if inputs >= 256 else 32
            blocks = {"DOT": False, "BLOCK_B": 1, "BLOCK_O": 2048 // block_k, "BLOCK_K": block_k}
        if batch:
            tiles = triton.cdiv(batch, blocks["BLOCK_B"]), triton.cdiv(outputs, blocks["BLOCK_O"])
            linear_kernel[tiles](
                v=v,
                w=self.weight,
                out=out,
                batch=batch,
                inputs=inputs,
                outputs=outputs,
                TRANSPOSED=transposed,
                **own,
                **self.activation(),
                **blocks,
                **LAUNCH,
            )
        return out


def sum_rows(terms: Tensor, out: Tensor, divisor: float = 1.0) -> None:
    """out = terms.sum(0) / divisor in a fixed order."""
    rows, cols = terms.shape[0], out.numel()
    if cols:
        sum_rows_kernel[triton.cdiv(cols, 32),](
            terms,
            out,
            rows,
            cols,
            terms.stride(0),
            float(divisor),
            BLOCK_ROWS=32,
            BLOCK_COLS=32,
            **LAUNCH,
        )
