"""Squeeze-and-excitation in plain PyTorch: the oracle, and the fallback where no kernel serves.

    m = src, or mean_l x                                  squeeze     [B, C]
    h = W1 m + b1;   z = W2 act(h) + b2                   excite MLP  [B, R], [B, C] or [B, 2C]
    s, t = apply(gate(z))                                 coefficients [B, C]
    y = out_act(residual + d * gain * (s * x + t))        rescale     [B, C, *spatial]

The MLP has two layers (W1 [R, C], W2 [C, R]), one (W1 [C, C]) or none (z = src).  ``apply``:

    scale        s = g          t = 0        Hu et al. 2018, arXiv:1709.01507
    scale1p      s = 1 + g      t = 0        RSE of PP-OCR
    scale_shift  s = g          t = z[C:]    g = gate(z[:C]); Leela Chess Zero
    shift        s = 1          t = g        GCNet's channel_add

Everything of size [B, C] is computed in float32 (float64 for float64 x), whatever x's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Options(NamedTuple):
    """The non-tensor arguments, in the order of the operator schema."""

    act: str = "relu"
    act_slope: float = 0.01
    gate: str = "sigmoid"
    gate_slope: float = 1 / 6
    gate_offset: float = 0.5
    apply: str = "scale"
    gain: float = 1.0
    out_act: str = "identity"


ACTS = ("identity", "relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu", "mish", "prelu")
OUT_ACTS = ("identity", "relu", "relu6", "silu", "hardswish", "gelu")
GATES = ("sigmoid", "hard_sigmoid", "relu", "tanh", "identity")
APPLIES = ("scale", "scale1p", "scale_shift", "shift")
MASKED_OUT_ACTS = ("relu", "relu6")
"""Output activations whose derivative is one bit an element: the mask replaces the residual in backward."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """[B, C] (or [B]) broadcast over x's remaining dims."""
    return v.reshape(v.shape + (1,) * (x.dim() - v.dim()))


# ------------------------------------------------------------------ activations and derivatives


def activation(h: Tensor, act: str, slope: float = 0.01, weight: Tensor | None = None) -> Tensor:
    if act == "leaky_relu":
        return F.leaky_relu(h, slope)
    if act == "prelu":
        assert weight is not None
        return F.prelu(h, weight.to(h.dtype))
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "identity": lambda h: h,
        # not F.relu: it keeps its output for backward, and blocks change y in place
        "relu": lambda h: torch.where(h <= 0, 0.0, h),
        "relu6": F.relu6,
        "silu": F.silu,
        "hardswish": F.hardswish,
        "gelu": F.gelu,
        "mish": F.mish,
    }
    return functions[act](h)


def activation_grad(
    h: Tensor, act: str, slope: float = 0.01, weight: Tensor | None = None
) -> Tensor:
    """act'(h), with torch's own values at the kinks."""
    one, zero = torch.ones_like(h), torch.zeros_like(h)
    if act == "identity":
        return one
    if act == "relu":
        return torch.where(h <= 0, zero, one)
    if act == "relu6":
        return torch.where((h <= 0) | (h >= 6), zero, one)
    if act == "leaky_relu":
        return torch.where(h > 0, one, slope * one)
    if act == "prelu":
        assert weight is not None
        return torch.where(h > 0, one, weight.to(h.dtype) * one)
    if act == "silu":
        sigma = torch.sigmoid(h)
        return sigma * (1 + h * (1 - sigma))
    if act == "hardswish":
        return torch.where(h <= -3, zero, torch.where(h >= 3, one, h / 3 + 0.5))
    if act == "gelu":
        density = torch.exp(-0.5 * h * h) * 0.3989422804014327  # 1 / sqrt(2 pi)
        return 0.5 * (1 + torch.erf(h * 0.7071067811865476)) + h * density
    assert act == "mish"
    tanh_softplus = torch.tanh(F.softplus(h))
    return tanh_softplus + h * torch.sigmoid(h) * (1 - tanh_softplus * tanh_softplus)


def gate_value(z: Tensor, gate: str, slope: float = 1 / 6, offset: float = 0.5) -> Tensor:
    if gate == "hard_sigmoid":
        v = slope * z + offset
        # not clamp alone: hardsigmoid's derivative is 0 at both ends, and for NaN
        return torch.where((v > 0) & (v < 1), v, v.detach().clamp(0, 1))
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "identity": lambda z: z,
        "sigmoid": torch.sigmoid,
        "relu": F.relu,
        "tanh": torch.tanh,
    }
    return functions[gate](z)


def gate_grad(z: Tensor, gate: str, slope: float = 1 / 6, offset: float = 0.5) -> Tensor:
    one, zero = torch.ones_like(z), torch.zeros_like(z)
    if gate == "identity":
        return one
    if gate == "relu":
        return torch.where(z <= 0, zero, one)
    if gate == "hard_sigmoid":
        v = slope * z + offset
        return torch.where((v > 0) & (v < 1), slope * one, zero)
    if gate == "tanh":
        g = torch.tanh(z)
        return 1 - g * g
    assert gate == "sigmoid"
    g = torch.sigmoid(z)
    return g * (1 - g)


SELECTING = ("relu", "relu6", "hardswish", "hard_sigmoid")
"""Activations and gates whose derivative selects where it is 0: 0 * NaN is 0 there, as in torch."""


def chain(grad: Tensor, derivative: Tensor, name: str) -> Tensor:
    """grad * derivative, for the derivative of activation or gate ``name``."""
    product = grad * derivative
    return torch.where(derivative == 0, 0.0, product) if name in SELECTING else product


# ------------------------------------------------------------------ forward


def squeeze(x: Tensor) -> Tensor:
    """mean over positions: [B, C, *spatial] -> [B, C] in the accumulation dtype."""
    return x.flatten(2).mean(2, dtype=accumulation_dtype(x.dtype))


def linear(v: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """v W^T + b with W stored [out, in, 1...], in v's dtype."""
    out = v @ weight.flatten(1).to(v.dtype).t()
    return out if bias is None else out + bias.to(v.dtype)


def excite_mlp(
    m: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    act_weight: Tensor | None,
    o: Options,
) -> tuple[Tensor, Tensor]:
    """m -> (hidden h, logits z); h is empty when the MLP has fewer than two layers."""
    if w1 is None:
        return m.new_empty(0), m
    h = linear(m, w1, b1)
    if w2 is None:
        return m.new_empty(0), h
    return h, linear(activation(h, o.act, o.act_slope, act_weight), w2, b2)


def gate_of(logits: Tensor, channels: int, o: Options) -> Tensor:
    """The gate [B, C] that ``return_gate`` returns."""
    return gate_value(logits[:, :channels], o.gate, o.gate_slope, o.gate_offset)


def coefficients(logits: Tensor, channels: int, o: Options) -> tuple[Tensor, Tensor | None]:
    """s and t of y = s x + t, before gain and drop path; t None where it is zero."""
    g = gate_of(logits, channels, o)
    if o.apply == "scale":
        return g, None
    if o.apply == "scale1p":
        return 1 + g, None
    if o.apply == "scale_shift":
        return g, logits[:, channels:]
    assert o.apply == "shift"
    return torch.ones_like(g), g


def forward(
    x: Tensor,
    src: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    act_weight: Tensor | None,
    residual: Tensor | None,
    drop_path: Tensor | None,
    o: Options,
) -> tuple[Tensor, Tensor]:
    """(y, logits), differentiable to any order."""
    _, logits = excite_mlp(squeeze(x) if src is None else src, w1, b1, w2, b2, act_weight, o)
    return rescale(x, logits, residual, drop_path, o), logits


def rescale(
    x: Tensor, logits: Tensor, residual: Tensor | None, drop_path: Tensor | None, o: Options
) -> Tensor:
    return activation(_pre_activation(x, logits, residual, drop_path, o), o.out_act).to(x.dtype)


def _pre_activation(
    x: Tensor, logits: Tensor, residual: Tensor | None, drop_path: Tensor | None, o: Options
) -> Tensor:
    """u = residual + d * gain * (s * x + t), in the accumulation dtype."""
    s, t = coefficients(logits, x.shape[1], o)
    u = x * per_channel(s, x)
    if t is not None:
        u = u + per_channel(t, x)
    if o.gain != 1.0:
        u = u * o.gain
    if drop_path is not None:
        u = u * per_channel(drop_path, x)
    return u if residual is None else u + residual


# ------------------------------------------------------------------ backward


class Gradients(NamedTuple):
    """Gradients in the order of the differentiable arguments; None where the argument is None.

    ``residual`` is always computed: it is v, whether or not the residual itself was kept.
    """

    x: Tensor | None
    src: Tensor | None
    w1: Tensor | None
    b1: Tensor | None
    w2: Tensor | None
    b2: Tensor | None
    act_weight: Tensor | None
    residual: Tensor | None
    drop_path: Tensor | None


def unpack_mask(mask: Tensor, x: Tensor, channels_last: bool) -> Tensor:
    """The bits of ``mask`` [rows, ceil(cols / 8)] as 0/1 of x's shape, least significant bit first.

    A row is a (sample, channel) of L positions, or channels last a (sample, position) of C channels.
    """
    batch, channels, length = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    columns = channels if channels_last else length
    shifts = torch.arange(8, device=mask.device, dtype=torch.uint8)
    bits = ((mask[:, :, None] >> shifts) & 1).flatten(1)[:, :columns]
    if channels_last:
        return bits.reshape(batch, length, channels).transpose(1, 2).reshape(x.shape)
    return bits.reshape(x.shape)


def backward(
    dy: Tensor,
    dlogits: Tensor | None,
    x: Tensor,
    src: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    act_weight: Tensor | None,
    residual: Tensor | None,
    drop_path: Tensor | None,
    o: Options,
    bits: Tensor | None = None,
) -> Gradients:
    """The derived gradients that the kernels compute, themselves differentiable.

    With v the gradient at u, all sums over the L positions of a channel, and products with a
    derivative as in `chain`:

        v  = dy * out_act'(u)                      residual's gradient
        ds = d gain sum_l v x,   dt = d gain sum_l v
        dz = gate'(z) ds  (dt where the gate shifts), plus what flows into the logits
        dW2 = dz^T a, db2 = sum_b dz, dh = act'(h) (dz W2), dW1 = dh^T m, db1 = sum_b dh
        dm = dh W1
        dx = d gain s v + dm / L                   the only pass over x besides ds
        dd = gain sum_c (s sum_l v x + t sum_l v)

    ``bits`` stands for out_act'(u) where it is 0 or 1, so that the residual need not be kept.
    """
    acc = accumulation_dtype(x.dtype)
    channels = x.shape[1]
    m = squeeze(x) if src is None else src
    h, z = excite_mlp(m, w1, b1, w2, b2, act_weight, o)
    s, t = coefficients(z, channels, o)

    if o.out_act == "identity":
        v = dy.to(acc)
    elif bits is not None:
        v = chain(dy, bits.to(acc), o.out_act)
    else:
        u = _pre_activation(x, z, residual, drop_path, o)
        v = chain(dy, activation_grad(u, o.out_act), o.out_act)
    v_sum = v.flatten(2).sum(2)  # [B, C]
    vx_sum = (v * x).flatten(2).sum(2)  # [B, C]

    scale = torch.full_like(m[:, :1], o.gain)  # [B, 1]
    if drop_path is not None:
        scale = scale * drop_path[:, None]
    ds, dt = scale * vx_sum, scale * v_sum

    slope = gate_grad(z[:, :channels], o.gate, o.gate_slope, o.gate_offset)
    dz = chain(dt if o.apply == "shift" else ds, slope, o.gate)
    if o.apply == "scale_shift":
        dz = torch.cat([dz, dt], 1)
    if dlogits is not None:
        dz = dz + dlogits

    def parameter_grad(weight: Tensor | None, grad: Callable[[], Tensor]) -> Tensor | None:
        return None if weight is None else grad().to(weight.dtype).reshape(weight.shape)

    dm, dw2, db2, dact_weight = dz, None, None, None
    dfirst = dz  # gradient at the output of the first layer
    if w2 is not None:
        a = activation(h, o.act, o.act_slope, act_weight)
        dw2 = parameter_grad(w2, lambda: dz.t() @ a)
        db2 = parameter_grad(b2, lambda: dz.sum(0))
        da = dz @ w2.flatten(1).to(acc)
        if act_weight is not None:
            negative = torch.where(h > 0, 0.0, h * da)
            dact_weight = (negative.sum() if act_weight.numel() == 1 else negative.sum(0)).to(
                act_weight.dtype
            )
            dact_weight = dact_weight.reshape(act_weight.shape)
        dfirst = chain(da, activation_grad(h, o.act, o.act_slope, act_weight), o.act)
    dw1 = parameter_grad(w1, lambda: dfirst.t() @ m)
    db1 = parameter_grad(b1, lambda: dfirst.sum(0))
    if w1 is not None:
        dm = dfirst @ w1.flatten(1).to(acc)

    dx = v * per_channel(scale * s, x)
    if src is None:
        dx = dx + per_channel(dm / math.prod(x.shape[2:]), x)
    ddrop_path = None
    if drop_path is not None:
        ddrop_path = o.gain * (s * vx_sum + (0 if t is None else t * v_sum)).sum(1)
    return Gradients(
        dx.to(x.dtype),
        None if src is None else dm,
        dw1,
        db1,
        dw2,
        db2,
        dact_weight,
        v.to(x.dtype),
        ddrop_path,
    )
