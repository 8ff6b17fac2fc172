"""The public function: a user's gate to normal form, the operator, and the results to the user's shapes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkern import _autocast
from attnkern.ops.attention_gate import checks, op
from attnkern.ops.attention_gate.norm import BatchNorm, in_dtype, of_no_samples, track
from attnkern.ops.attention_gate.normal_form import Evaluated, Evaluation, as_matrix
from attnkern.ops.attention_gate.reference import Inputs, Options, accumulation_dtype
from attnkern.ops.attention_gate.resample import resize, taps


def attention_gate(
    x: Tensor,
    g: Tensor,
    theta_weight: Tensor,
    theta_bias: Tensor | None,
    phi_weight: Tensor,
    phi_bias: Tensor | None,
    psi_weight: Tensor,
    psi_bias: Tensor | None = None,
    *,
    theta_norm: BatchNorm | None = None,
    phi_norm: BatchNorm | None = None,
    psi_norm: BatchNorm | None = None,
    act: str = "relu",
    act_slope: float = 0.01,
    gate: str = "sigmoid",
    upsample: str | None = None,
    align_corners: bool = False,
    target: str = "x",
    out_weight: Tensor | None = None,
    out_bias: Tensor | None = None,
    out_norm: BatchNorm | None = None,
    return_alpha: bool = False,
    impl: str = "auto",
) -> Any:
    r"""Attention gate of a skip connection: weigh the positions of ``x`` by a gate computed from ``x`` and ``g``.

    .. math::
        q = \psi^\top \mathrm{act}(\theta x + b_\theta + \mathrm{up}(\phi g + b_\phi)) + b_\psi,\quad
        \alpha = \mathrm{gate}(q),\quad y = \mathrm{up}(\alpha) \odot x

    Args:
        x: [B, C, *spatial], the skip connection, with one to three spatial dims; float32, bfloat16,
            float16, or float64 (CPU).  Contiguous and channels_last maps are read in place.
        g: [B, G, *spatial], the gating signal, in x's dtype (under autocast both are taken in that of
            the target); on theta's grid, or on any with ``upsample``.  Where its memory format is not
            x's it is copied once.
        theta_weight: [F, C] or [F, C, 1, ...], as ``nn.Linear`` or a 1x1 convolution stores it, or
            [F, C, *kernel]: a convolution whose stride is its kernel, which puts the gate on a coarser
            grid of floor(size / kernel) positions.  Weights have x's dtype or float32.
        theta_bias, phi_bias: [F] or None.
        phi_weight: [F, G] (and trailing ones).
        psi_weight: [1, F] (and trailing ones) or [F].
        psi_bias: [1] or None.
        theta_norm, phi_norm, psi_norm: `BatchNorm` of theta x + b, phi g + b and q, or None.
            In evaluation they are folded into the weights; in training the statistics are those of the
            batch, differentiated through, and the running ones are updated as torch does.
        act: relu, leaky_relu (slope ``act_slope``) or softplus.
        gate: sigmoid, or softmax over all positions of a sample.
        upsample: how phi g is brought to theta's grid, and alpha to its target's: nearest, or
            linear, bilinear, trilinear by the number of spatial dims, as ``F.interpolate`` names them.
        align_corners: as in ``F.interpolate``; without effect for nearest.
        target: the map that alpha multiplies, x or g.
        out_weight, out_bias: a 1x1 convolution [O, C] of y, or None; ``out_norm``: its `BatchNorm`.
        return_alpha: also return alpha [B, 1, *spatial] on theta's grid and on the target's, in its dtype.
        impl: auto, native, triton or reference; an explicit choice never falls back.

    Returns:
        y in the target's shape, dtype and memory format (x's for a g that was copied), with O channels
        after ``out_weight``;
        ``(y, alpha, alpha_full)`` with ``return_alpha``.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what was given.

    Logits and gate are computed in float32 (float64 for float64 maps).  Nothing of size [B, F, L] is
    stored; backward keeps x, g and the logits.  Double backward runs through the reference.

    Source: Oktay et al., Attention U-Net, arXiv:1804.03999.

    >>> x, g = torch.randn(2, 16, 32, 32), torch.randn(2, 16, 32, 32)
    >>> theta, phi, psi = torch.randn(8, 16), torch.randn(8, 16), torch.randn(1, 8)
    >>> attention_gate(x, g, theta, None, phi, None, psi).shape
    torch.Size([2, 16, 32, 32])
    """
    if isinstance(x, Tensor) and isinstance(g, Tensor) and _autocast.enabled(x):
        # as torch promotes alpha to the dtype of the map that it multiplies
        x, g = (x.to(g.dtype), g) if target == "g" else (x, g.to(x.dtype))
    kernel, impl = checks.admit(
        *(impl, x, g),
        checks.Weights(
            *(theta_weight, theta_bias, phi_weight, phi_bias),
            *(psi_weight, psi_bias, out_weight, out_bias),
        ),
        checks.Norms(theta_norm, phi_norm, psi_norm, out_norm),
        checks.Choices(act, act_slope, gate, upsample, target),
    )
    hidden, spatial = theta_weight.shape[0], x.shape[2:]
    grid = tuple(size // k for size, k in zip(spatial, kernel, strict=True))  # of q
    full = tuple(spatial if target == "x" else g.shape[2:])  # of y
    positions = x.shape[0] * math.prod(grid)

    if x.shape[0] == 0:
        theta_norm = of_no_samples(theta_norm, hidden, theta_weight)
        phi_norm = of_no_samples(phi_norm, hidden, phi_weight)
        psi_norm = of_no_samples(psi_norm, 1, psi_weight)
        if out_weight is not None:
            out_norm = of_no_samples(out_norm, out_weight.shape[0], out_weight)
    with _autocast.full_precision(x):
        theta = _convolution(theta_weight, theta_bias, theta_norm, x)
        signal = _signal(impl, g, grid, phi_weight, phi_bias, phi_norm, upsample, align_corners)
        over_psi = psi_norm if psi_norm is not None and psi_norm.over_batch else None
        psi = _convolution(psi_weight, psi_bias, None if over_psi else psi_norm, x)
        norms = op.Norms(theta.eps, signal.phi.eps)
        cancelled = psi.bias if over_psi else None
        over_batch = op.OverBatch(
            *(theta.gamma, signal.phi.gamma, theta.cancelled, signal.phi.cancelled, cancelled)
        )
        i = Inputs(
            *(x, signal.g, theta.weight, signal.phi.weight),
            *(_sum(theta.bias, signal.phi.bias), psi.weight),
            psi.bias if cancelled is None else cancelled.detach(),
            *(signal.taps, signal.tap_weights),
        )
        # phi has been applied to a g that is resampled: it is not the map that the gate multiplies
        carried = target if i.phi is not None else "x"
        at_once = (
            gate == "sigmoid"
            and norms.theta is norms.phi is None
            and over_psi is None
            and grid == full
            and carried == target
        )
        o = Options(act, float(act_slope), *_three(kernel), carried, at_once)
        evaluation = Evaluation(theta.evaluated, signal.phi.evaluated, psi.evaluated)
        q, y, moments = op.gate(impl, i, o, norms, over_batch, evaluation)
        track((theta_norm, phi_norm), (moments[:2], moments[2:]), (theta_bias, phi_bias), positions)
        if at_once and not return_alpha:
            alpha = alpha_full = q
        else:
            alpha = _alpha(q.reshape(q.shape[0], 1, *grid), gate, over_psi)
            alpha_full = _resize(impl, alpha, full, upsample, align_corners)
        if not at_once:
            y = op.apply(impl, y if carried == target else g, alpha_full)
        if out_weight is not None:
            y = _out(impl, y, out_weight, out_bias, out_norm)
    return (y, alpha.to(x.dtype), alpha_full.to(x.dtype)) if return_alpha else y


class _Convolution(NamedTuple):
    """A 1x1 convolution in accumulation dtype, and its norm."""

    weight: Any
    bias: Tensor | None = None
    gamma: Tensor | None = None
    eps: float | None = None
    """None unless the norm is over the batch."""
    cancelled: Tensor | None = None
    """The convolution's own bias, if so."""
    evaluated: Evaluated = Evaluated()


def _convolution(
    weight: Tensor, bias: Tensor | None, norm: BatchNorm | None, x: Tensor
) -> _Convolution:
    acc = accumulation_dtype(x.dtype)
    w, b = in_dtype(weight, acc), in_dtype(bias, acc)
    if norm is None:
        return _Convolution(w, b)
    mean, var, gamma, beta = (in_dtype(t, acc) for t in norm[:4])
    if norm.over_batch:
        return _Convolution(w, beta, gamma, norm.eps, b)
    return _Convolution(w, evaluated=Evaluated(b, gamma, beta, mean, var, norm.eps))


def _folded(
    impl: str, weight: Tensor, bias: Tensor | None, norm: BatchNorm | None, x: Tensor
) -> tuple[Tensor, Tensor | None]:
    """weight [O, C] and bias of a convolution with a norm that is not over the batch."""
    c: Any = _convolution(as_matrix(weight), bias, norm, x)
    return (c.weight, c.bias) if norm is None else op.fold(impl, c.weight, *c.evaluated)


class _Signal(NamedTuple):
    """The gating signal: g and phi on q's grid, or phi g on a grid of its own and the taps to q's."""

    g: Tensor
    phi: _Convolution
    taps: Tensor | None = None
    tap_weights: Tensor | None = None


def _signal(
    impl: str,
    g: Tensor,
    grid: tuple[int, ...],
    weight: Tensor,
    bias: Tensor | None,
    norm: BatchNorm | None,
    upsample: str | None,
    align_corners: bool,
) -> _Signal:
    if tuple(g.shape[2:]) == grid:
        return _Signal(g, _convolution(weight, bias, norm, g))
    assert upsample is not None
    given = g.shape[2:]
    over_batch = norm if norm is not None and norm.over_batch else None
    phi, b = _folded(impl, weight, bias, None if over_batch else norm, g)
    g = F.conv1d(g.flatten(2), phi.to(g.dtype).unsqueeze(2)).unflatten(2, given)
    if over_batch is not None:
        g, b = _batch_norm(g, over_batch, b), None
    where = taps(given, grid, upsample, align_corners, phi.dtype, g.device)
    return _Signal(g, _Convolution(None, b), *where)


def _three(sizes: Any) -> tuple[int, int, int]:
    return (*(1,) * (3 - len(sizes)), *sizes)


def _sum(*terms: Tensor | None) -> Tensor | None:
    total: Tensor | None = None
    for t in terms:
        if t is not None:
            total = t if total is None else total + t
    return total


def _alpha(q: Tensor, gate: str, psi_norm: BatchNorm | None) -> Tensor:
    """[B, 1, *grid] -> the same: small maps, by torch itself."""
    if psi_norm is not None:
        q = _batch_norm(q, psi_norm)
    if gate == "sigmoid":
        return torch.sigmoid(q)
    return q.flatten(1).softmax(1).view_as(q)


def _resize(
    impl: str, alpha: Tensor, full: tuple[int, ...], upsample: str | None, align_corners: bool
) -> Tensor:
    if tuple(alpha.shape[2:]) == full:
        return alpha
    assert upsample is not None
    if impl != "reference":
        return resize(alpha, full, upsample, align_corners)
    corners = None if upsample == "nearest" else align_corners
    return F.interpolate(alpha, full, mode=upsample, align_corners=corners)


def _batch_norm(t: Tensor, norm: BatchNorm, bias: Tensor | None = None) -> Tensor:
    """t + bias normalised by the statistics of the batch."""
    if bias is not None:
        norm, bias = _cancelled(norm, bias)
        t = t + bias.to(t.dtype).view(-1, *(1,) * (t.dim() - 2))
    given, momentum, eps = norm[:4], norm.momentum, norm.eps
    if all(p is None or p.dtype == t.dtype for p in given):
        return F.batch_norm(t, *given, True, momentum, eps)
    # parameters of another precision, which F.batch_norm takes in some combinations only
    acc = accumulation_dtype(t.dtype)
    mean, var, gamma, beta = (in_dtype(p, acc) for p in given)
    y = F.batch_norm(in_dtype(t, acc), mean, var, gamma, beta, True, momentum, eps)
    for running, moved in zip(given[:2], (mean, var), strict=True):
        if running is not None and running is not moved:
            running.copy_(moved)
    return in_dtype(y, t.dtype)


def _cancelled(norm: BatchNorm, bias: Tensor) -> tuple[BatchNorm, Tensor]:
    """A norm over the batch takes the bias before it off again: a gradient of 0 instead of rounding errors."""
    if norm.bias is None:
        return norm, bias
    beta = norm.bias + in_dtype(0.0 * bias, norm.bias.dtype)
    return norm._replace(bias=beta), bias.detach()


def _out(
    impl: str, y: Tensor, weight: Tensor, bias: Tensor | None, norm: BatchNorm | None
) -> Tensor:
    over_batch = norm if norm is not None and norm.over_batch else None
    w, b = _folded(impl, weight, bias, None if over_batch else norm, y)
    if over_batch is not None and b is not None:
        over_batch, b = _cancelled(over_batch, b)
    convolution = (F.conv1d, F.conv2d, F.conv3d)[y.dim() - 3]
    w = w.view(*w.shape, *(1,) * (y.dim() - 2))
    y = convolution(y, in_dtype(w, y.dtype), in_dtype(b, y.dtype))
    return y if over_batch is None else _batch_norm(y, over_batch)
