"""Attention gates in plain PyTorch: the oracle, and the fallback where no kernel serves.

    t[f,l]  = sum_c theta[f,c] x[c,l]                     theta 1x1, or k x k with stride k: c runs over patches
    u[f,l]  = sum_c phi[f,c] g[c,l],  or g resampled      g already projected, on a grid of its own
    h[f,l]  = t + u + bias[f]
    q[l]    = sum_f psi[f] act(h[f,l]) + psi_bias         logits
    y[c,l]  = sigmoid(q[l]) * target[c,l]                 target x or g

Oktay et al. 2018, Attention U-Net, arXiv:1804.03999.  B samples, C and G channels of x and g, F hidden
channels, L positions of the logits' grid.  Tensors are in the operator's normal form: x [B, C, X1, X2, X3]
and g [B, G, ...] with three spatial dims (leading ones where there are fewer), theta [F, C k1 k2 k3], phi
[F, G] (None: g is [B, F, ...] on any grid, with ``taps`` to q's), bias and psi [F], psi_bias [1], q
[B, Q1, Q2, Q3] with Qi = floor(Xi / ki).  Everything but x, g and y is in float32 (float64 for float64 maps).

Batch normalisation of t and u is folded: in evaluation into theta, phi and bias; in training their moments
over the batch are, and backward keeps theta and phi as they were and returns through the moments by `Branch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTS = ("relu", "leaky_relu", "softplus")
TARGETS = ("x", "g")


class Options(NamedTuple):
    """The non-tensor arguments, in the order of the operator schema."""

    act: str = "relu"
    act_slope: float = 0.01
    k1: int = 1
    k2: int = 1
    k3: int = 1
    target: str = "x"
    """Which map the gate multiplies, x or g."""
    apply: bool = True
    """Whether it does so at once, as the sigmoid of the logits; else these alone are wanted."""


class Inputs(NamedTuple):
    """The tensor arguments, in the order of the operator schema."""

    x: Tensor
    g: Tensor
    theta: Tensor
    phi: Tensor | None
    bias: Tensor | None
    psi: Tensor
    psi_bias: Tensor | None
    taps: Tensor | None = None
    """[Q1 + Q2 + Q3, 2] int64: the two positions of g, along each dim in turn, that a position of q lies between."""
    tap_weights: Tensor | None = None
    """[Q1 + Q2 + Q3, 2]: how much of each."""


class Branch(NamedTuple):
    """A branch normalised over the batch, all [F]: t enters h as ``scale`` t, and dt = scale dh + k0 + k1 t."""

    scale: Tensor
    k0: Tensor | None = None
    k1: Tensor | None = None


class Gradients(NamedTuple):
    """In the order of the operator schema; None where there is no such input."""

    x: Tensor
    g: Tensor
    theta: Tensor
    phi: Tensor | None
    bias: Tensor
    psi: Tensor
    psi_bias: Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def activation(h: Tensor, act: str, slope: float) -> Tensor:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": F.relu,
        "leaky_relu": lambda h: F.leaky_relu(h, slope),
        "softplus": F.softplus,
    }
    return functions[act](h)


def activation_grad(h: Tensor, act: str, slope: float) -> Tensor:
    """act'(h), with torch's own values at the kinks."""
    if act == "softplus":  # which is the identity beyond 20
        return torch.where(h > 20, torch.ones_like(h), torch.sigmoid(h))
    below = slope if act == "leaky_relu" else 0.0
    return torch.where(h > 0, torch.ones_like(h), torch.full_like(h, below))


# ------------------------------------------------------------------ grids


def grid_of(x: Tensor, o: Options) -> tuple[int, int, int]:
    return x.shape[2] // o.k1, x.shape[3] // o.k2, x.shape[4] // o.k3


def patches(x: Tensor, o: Options) -> Tensor:
    """x [B, C, X1, X2, X3] -> [B, C k1 k2 k3, Q1, Q2, Q3]; what no whole patch covers is left out."""
    if (o.k1, o.k2, o.k3) == (1, 1, 1):
        return x
    q1, q2, q3 = grid_of(x, o)
    x = x[:, :, : q1 * o.k1, : q2 * o.k2, : q3 * o.k3]
    x = x.unflatten(4, (q3, o.k3)).unflatten(3, (q2, o.k2)).unflatten(2, (q1, o.k1))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def unpatch(p: Tensor, x: Tensor, o: Options) -> Tensor:
    """The adjoint of `patches`: zero where no whole patch lies."""
    if (o.k1, o.k2, o.k3) == (1, 1, 1):
        return p
    q1, q2, q3 = grid_of(x, o)
    p = p.unflatten(1, (x.shape[1], o.k1, o.k2, o.k3)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    p = p.reshape(*x.shape[:2], q1 * o.k1, q2 * o.k2, q3 * o.k3)
    left = [size - covered for size, covered in zip(x.shape[2:], p.shape[2:], strict=True)]
    return F.pad(p, (0, left[2], 0, left[1], 0, left[0]))


def _dims(i: Inputs, grid: tuple[int, ...]) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Of each dim: the taps and their weights, [Q, 2], and where both taps are one, shaped to stand beside p.

    One that is met twice has the whole weight: the other's 0 times infinity would be NaN.
    """
    assert i.taps is not None
    assert i.tap_weights is not None
    start = 0
    for dim, size in enumerate(grid, 2):
        taps, weights = i.taps[start : start + size], i.tap_weights[start : start + size]
        one = taps[:, :1] == taps[:, 1:]
        weights = torch.where(one, torch.stack([weights.sum(1), 0 * weights[:, 1]], 1), weights)
        yield dim, taps, weights, one.view([-1 if d == dim else 1 for d in range(5)])
        start += size


def resample(p: Tensor, i: Inputs, grid: tuple[int, ...]) -> Tensor:
    """p [B, F, ...] on the logits' grid."""
    for dim, taps, weights, one in _dims(i, grid):
        below, above = (
            p.index_select(dim, taps[:, t]) * weights[:, t].view(one.shape) for t in (0, 1)
        )
        p = torch.where(one, below, below + above)
    return p


def resample_adjoint(dp: Tensor, i: Inputs, grid: tuple[int, ...]) -> Tensor:
    """The adjoint of `resample`: [B, F, Q1, Q2, Q3] -> g's grid."""
    for dim, taps, weights, one in _dims(i, grid):
        total = dp.new_zeros([*dp.shape[:dim], i.g.shape[dim], *dp.shape[dim + 1 :]])
        below, above = (dp * weights[:, t].view(one.shape) for t in (0, 1))
        total = total.index_add(dim, taps[:, 0], below)
        dp = total.index_add(dim, taps[:, 1], torch.where(one, 0.0, above))
    return dp


def project(weight: Tensor, t: Tensor) -> Tensor:
    """weight [F, C], t [B, C, ...] -> [B, F, ...] in weight's dtype."""
    return torch.einsum("fc,bcijk->bfijk", weight, t.to(weight.dtype))


# ------------------------------------------------------------------ forward


def branches(i: Inputs, o: Options) -> tuple[Tensor, Tensor]:
    """t = theta x and u = phi g, [B, F, Q1, Q2, Q3]."""
    t = project(i.theta, patches(i.x, o))
    if i.phi is None:
        return t, resample(i.g.to(t.dtype), i, grid_of(i.x, o))
    return t, project(i.phi, i.g)


def per_hidden(v: Tensor) -> Tensor:
    """[F] beside [B, F, Q1, Q2, Q3]."""
    return v.view(-1, 1, 1, 1)


def hidden(
    t: Tensor, u: Tensor, i: Inputs, theta: Branch | None = None, phi: Branch | None = None
) -> Tensor:
    h = (t if theta is None else per_hidden(theta.scale) * t) + (
        u if phi is None else per_hidden(phi.scale) * u
    )
    return h if i.bias is None else h + per_hidden(i.bias)


def forward(i: Inputs, o: Options) -> tuple[Tensor, Tensor]:
    """The logits q, and y (empty unless o.apply), differentiable to any order."""
    a = activation(hidden(*branches(i, o), i), o.act, o.act_slope)
    q = torch.einsum("f,bfijk->bijk", i.psi, a)
    if i.psi_bias is not None:
        q = q + i.psi_bias
    if not o.apply:
        return q, i.x.new_empty(0)
    return q, apply(i.x if o.target == "x" else i.g, torch.sigmoid(q))


def apply(x: Tensor, alpha: Tensor) -> Tensor:
    """alpha [B, ...] times x [B, C, ...], rounded once."""
    return (alpha.unsqueeze(1) * x).to(x.dtype)


def apply_backward(dy: Tensor, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """dx = alpha dy;  dalpha = sum_c dy x."""
    return apply(dy, alpha), (dy.to(alpha.dtype) * x).sum(1)


def moments(x: Tensor, weight: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    """Mean and variance (over n, biased) of weight x, over batch and positions, [F]."""
    t = project(weight, patches(x, o))
    return t.mean((0, 2, 3, 4)), t.var((0, 2, 3, 4), unbiased=False)


def coefficients(
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """scale and shift, [F]: batch_norm(t + bias) = scale t + shift."""
    scale = torch.rsqrt(var + eps)
    if gamma is not None:
        scale = gamma * scale
    centre = -mean if bias is None else bias - mean
    return scale, scale * centre if beta is None else torch.addcmul(beta, scale, centre)


def norm_forward(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """A product by ``weight`` [F, C] and its norm as one product: its weight, its bias, and the norm's scale."""
    scale, shift = coefficients(bias, gamma, beta, mean, var, eps)
    return scale.unsqueeze(1) * weight, shift, scale


# ------------------------------------------------------------------ backward


def hidden_grad(dq: Tensor, h: Tensor, psi: Tensor, o: Options) -> Tensor:
    """dh = dq psi act'(h), 0 where act' is, whatever dq."""
    slope = activation_grad(h, o.act, o.act_slope)
    dh = dq.unsqueeze(1) * per_hidden(psi) * slope
    return torch.where(slope == 0, 0.0, dh)


def fold_backward(
    dfolded: Tensor,
    dshift: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> tuple[Tensor | None, ...]:
    """The gradients of the tensors of `norm_forward` in evaluation, themselves differentiable."""
    r = torch.rsqrt(var + eps)
    scale = r if gamma is None else gamma * r
    centre = -mean if bias is None else bias - mean
    dscale = torch.addcmul((dfolded * weight).sum(1), dshift, centre)
    dbias = scale * dshift
    return (
        scale.unsqueeze(1) * dfolded,
        None if bias is None else dbias,
        None if gamma is None else r * dscale,
        None if beta is None else dshift,
        -dbias,
        scale * dscale * r * r / -2,
    )


def norm_backward(
    dq: Tensor, dh: Tensor, dht: Tensor, mean: Tensor, var: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    r"""k0 and k1 of the `Branch` that returns through the statistics of a branch t, and dgamma.

    With r = (var + eps)^-1/2 and the sums dh, dht over n values, of which dq has as many:

        dgamma = r (dht - mean dh);   k1 = -scale r dgamma / n;   k0 = -scale dh / n - k1 mean
    """
    n = dq.numel()
    r = torch.rsqrt(var + eps)
    dgamma = r * torch.addcmul(dht, mean, dh, value=-1)
    k1 = scale * r * dgamma / -n
    return torch.addcmul(scale * dh / -n, k1, mean, value=-1), k1, dgamma


def sums(
    dq: Tensor, i: Inputs, o: Options, theta: Branch | None, phi: Branch | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the batch's statistics need, [F] each: the sums of dh, dh t and dh u over batch and positions."""
    t, u = branches(i, o)
    dh = hidden_grad(dq, hidden(t, u, i, theta, phi), i.psi, o)
    return dh.sum((0, 2, 3, 4)), (dh * t).sum((0, 2, 3, 4)), (dh * u).sum((0, 2, 3, 4))


def backward(
    d: Tensor | None,
    dq: Tensor | None,
    i: Inputs,
    q: Tensor,
    o: Options,
    theta: Branch | None = None,
    phi: Branch | None = None,
) -> Gradients:
    r"""The derived gradients that the kernels compute, themselves differentiable.

    With a = sigmoid(q):

        apply:      d is dy;   dq += a (1 - a) sum_c d target;   the target's gradient begins with a d
        otherwise:  d is what has flowed into the target since;  the target's gradient begins with d
        dh = dq psi act'(h);   dpsi = sum dq act(h);   dpsi_bias = sum dq;   dbias = sum dh
        dt = dh, or of a `Branch` scale dh + k0 + k1 t;    dtheta = sum dt x^T;   dx += theta^T dt
        du = dh, or of a `Branch` scale dh + k0 + k1 u;    dphi = sum du g^T;     dg += phi^T du,  or resampled back
    """
    acc = i.theta.dtype
    begin: Tensor | None = None
    if o.apply:
        assert d is not None
        target, alpha = (i.x if o.target == "x" else i.g), torch.sigmoid(q)
        own = alpha * (1 - alpha) * (d.to(acc) * target).sum(1)
        dq = own if dq is None else dq + own
        begin = alpha.unsqueeze(1) * d
    elif d is not None:
        begin = d.to(acc)
    assert dq is not None

    t, u = branches(i, o)
    h = hidden(t, u, i, theta, phi)
    dh = hidden_grad(dq, h, i.psi, o)
    dpsi = torch.einsum("bijk,bfijk->f", dq, activation(h, o.act, o.act_slope))

    def before(normed: Branch | None, t: Tensor) -> Tensor:
        if normed is None:
            return dh
        assert normed.k0 is not None
        assert normed.k1 is not None
        return per_hidden(normed.scale) * dh + per_hidden(normed.k0) + per_hidden(normed.k1) * t

    dt, du = before(theta, t), before(phi, u)
    dtheta = torch.einsum("bfijk,bcijk->fc", dt, patches(i.x, o).to(acc))
    dx = unpatch(torch.einsum("fc,bfijk->bcijk", i.theta, dt), i.x, o)
    if i.phi is None:
        dphi, dg = None, resample_adjoint(du, i, grid_of(i.x, o))
    else:
        dphi = torch.einsum("bfijk,bcijk->fc", du, i.g.to(acc))
        dg = torch.einsum("fc,bfijk->bcijk", i.phi, du)
    if begin is not None and o.target == "x":
        dx = begin + dx
    elif begin is not None:
        dg = begin + dg
    return Gradients(
        dx.to(i.x.dtype), dg.to(i.g.dtype), dtheta, dphi, dh.sum((0, 2, 3, 4)), dpsi, dq.sum()[None]
    )
