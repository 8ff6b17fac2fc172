"""Activations, gates and their derivatives on float32 tiles; names are those of the operators.

Comparisons are written so that NaN takes the branch that keeps it, as torch's do; derivatives have
torch's values at the kinks.  tl.exp is ex2.approx, relative error about 1e-7 (1 + |x|).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def tanh(z):
    # (1 - e) / (1 + e) cancels near 0: there an odd polynomial, relative error 7e-8 on |z| <= 0.55
    q = z * z
    p = -0.00591509 * q + 0.02081386
    p = p * q - 0.05378941
    p = p * q + 0.13331994
    p = p * q - 0.33333301
    e = tl.exp(-2.0 * tl.abs(z))
    t = 1.0 - 2.0 * e / (1.0 + e)
    return tl.where(tl.abs(z) < 0.55, z + z * q * p, tl.where(z < 0, -t, t))


@triton.jit
def softplus(h):
    """log(1 + e^h), and h itself beyond 20, as torch's."""
    # max(h, 0) + log(1 + n), n = e^-|h|: 2 artanh(n / (2 + n)), whose series errs by 2e-8 of it at n = 1
    n = tl.exp(-tl.abs(h))
    s = n / (2.0 + n)
    q = s * s
    p = q * 0.0769230769 + 0.0909090909
    p = p * q + 0.1111111111
    p = p * q + 0.1428571429
    p = p * q + 0.2
    p = p * q + 0.3333333333
    log1p = 2.0 * s + 2.0 * s * q * p
    return tl.where(h > 20.0, h, tl.where(h <= 0, 0.0, h) + log1p)


@triton.jit
def clamp(v, low, high):
    return tl.where(v <= low, low, tl.where(v >= high, high, v))


@triton.jit
def _mish_parts(h):
    # tanh(log(1 + e^h)) = a / (a + b), with n = e^-|h| so that nothing overflows or cancels:
    # h >= 0: a = 1 + 2n, b = 2n^2;  h < 0: a = n^2 + 2n, b = 2
    n = tl.exp(-tl.abs(h))
    a = tl.where(h < 0, n * n + 2.0 * n, 1.0 + 2.0 * n)
    b = tl.where(h < 0, 2.0, 2.0 * n * n)
    return a / (a + b), b / (a + b)


@triton.jit
def activation(h, slope, ACT: tl.constexpr):
    """act(h); ``slope`` is that of leaky_relu or prelu."""
    if ACT == "identity":
        out = h
    elif ACT == "relu":
        out = tl.where(h <= 0, 0.0, h)
    elif ACT == "tanh":
        out = tanh(h)
    elif ACT == "relu6":
        out = clamp(h, 0.0, 6.0)
    elif ACT == "leaky_relu" or ACT == "prelu":
        out = tl.where(h > 0, h, slope * h)
    elif ACT == "softplus":
        out = softplus(h)
    elif ACT == "silu":
        out = h / (1.0 + tl.exp(-h))
    elif ACT == "hardswish":
        out = h * clamp(h + 3.0, 0.0, 6.0) / 6.0
    elif ACT == "gelu":
        out = 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    else:
        tl.static_assert(ACT == "mish")
        t, _ = _mish_parts(h)
        out = h * t
    return out


@triton.jit
def activation_grad(g, h, slope, ACT: tl.constexpr):
    """g act'(h); a derivative of 0 selects 0, whatever g, where torch's does."""
    if ACT == "identity":
        out = g
    elif ACT == "relu":
        out = tl.where(h <= 0, 0.0, g)
    elif ACT == "tanh":
        t = tanh(h)
        out = g * (1.0 - t) * (1.0 + t)
    elif ACT == "relu6":
        out = tl.where((h <= 0) | (h >= 6), 0.0, g)
    elif ACT == "leaky_relu" or ACT == "prelu":
        out = tl.where(h > 0, g, g * slope)
    elif ACT == "softplus":
        out = tl.where(h > 20.0, g, g * sigmoid(h))
    elif ACT == "silu":
        sigma = sigmoid(h)
        out = g * sigma * (1.0 + h * (1.0 - sigma))
    elif ACT == "hardswish":
        out = tl.where(h <= -3, 0.0, tl.where(h >= 3, g, g * (h / 3.0 + 0.5)))
    elif ACT == "gelu":
        density = tl.exp(-0.5 * h * h) * 0.3989422804014327  # 1 / sqrt(2 pi)
        out = g * (0.5 * (1.0 + tl.erf(h * 0.7071067811865476)) + h * density)
    else:
        tl.static_assert(ACT == "mish")
        t, complement = _mish_parts(h)
        out = g * (t + h * sigmoid(h) * complement * (1.0 + t))
    return out


@triton.jit
def gate_value(z, slope, offset, GATE: tl.constexpr):
    if GATE == "identity":
        out = z
    elif GATE == "sigmoid":
        out = sigmoid(z)
    elif GATE == "relu":
        out = tl.where(z <= 0, 0.0, z)
    elif GATE == "tanh":
        out = tanh(z)
    else:
        tl.static_assert(GATE == "hard_sigmoid")
        out = clamp(slope * z + offset, 0.0, 1.0)
    return out


@triton.jit
def gate_grad(g, z, slope, offset, GATE: tl.constexpr):
    """g gate'(z), selecting as `activation_grad` does."""
    if GATE == "identity":
        out = g
    elif GATE == "sigmoid":
        out = g * sigmoid(z) * sigmoid(-z)
    elif GATE == "relu":
        out = tl.where(z <= 0, 0.0, g)
    elif GATE == "tanh":
        out = activation_grad(g, z, 0.0, "tanh")
    else:
        tl.static_assert(GATE == "hard_sigmoid")
        v = slope * z + offset
        out = tl.where((v > 0) & (v < 1), g * slope, 0.0)
    return out
