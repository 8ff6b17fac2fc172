"""The operators behind `attention_gate`: schemas, fakes and autograd, in the normal form of reference.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkern import _autocast, _layout, _library
from attnkern.ops.attention_gate import reference
from attnkern.ops.attention_gate.reference import Branch, Inputs, Options

# ------------------------------------------------------------------ operators and fakes


def _fwd_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    i, o = Inputs(*arguments[:9]), Options(*arguments[9:])
    q = i.theta.new_empty(i.x.shape[0], *reference.grid_of(i.x, o))
    if not o.apply:
        return q, i.x.new_empty(0)
    return q, torch.empty_like(i.x if o.target == "x" else i.g)


def _sums_fake(dq: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    theta = arguments[2]
    hidden = theta.shape[:1]
    return theta.new_empty(hidden), theta.new_empty(hidden), theta.new_empty(hidden)


def _bwd_fake(d: Tensor | None, dq: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    i, (need_x, need_g, need_weights) = Inputs(*arguments[:9]), arguments[-3:]
    hidden = i.theta.shape[:1] if need_weights else 0

    def like(t: Tensor | None, needed: bool) -> Tensor:
        return torch.empty_like(t) if t is not None and needed else i.theta.new_empty(0)

    dx = torch.empty_like(i.x) if need_x else i.x.new_empty(0)
    dg = torch.empty_like(i.g) if need_g else i.x.new_empty(0)
    small = [i.theta.new_empty(hidden), i.theta.new_empty(hidden)]
    dtheta, dphi = like(i.theta, need_weights), like(i.phi, need_weights)
    return dx, dg, dtheta, dphi, *small, i.theta.new_empty(1 if need_weights else 0)


_TENSORS = (
    "Tensor x, Tensor g, Tensor theta, Tensor? phi, Tensor? bias, Tensor psi, Tensor? psi_bias, "
    "Tensor? taps, Tensor? tap_weights"
)
_BRANCHES = (
    "Tensor? theta_scale, Tensor? theta_k0, Tensor? theta_k1, "
    "Tensor? phi_scale, Tensor? phi_k0, Tensor? phi_k1"
)
_OPTIONS = "str act, float act_slope, int k1, int k2, int k3, str target, bool apply"

attention_gate_fwd = _library.define(
    "attention_gate_fwd", f"({_TENSORS}, {_OPTIONS}) -> (Tensor q, Tensor y)", _fwd_fake
)
attention_gate_bwd = _library.define(
    "attention_gate_bwd",
    f"(Tensor? d, Tensor? dq, {_TENSORS}, Tensor q, {_BRANCHES}, {_OPTIONS}, "
    "bool need_x, bool need_g, bool need_weights)"
    " -> (Tensor dx, Tensor dg, Tensor dtheta, Tensor dphi, Tensor dbias, Tensor dpsi, "
    "Tensor dpsi_bias)",
    _bwd_fake,
)
attention_gate_moments = _library.define(
    "attention_gate_moments",
    "(Tensor x, Tensor weight, int k1, int k2, int k3) -> (Tensor mean, Tensor var)",
    lambda x, weight, *_: (weight.new_empty(weight.shape[0]), weight.new_empty(weight.shape[0])),
)
attention_gate_sums = _library.define(
    "attention_gate_sums",
    f"(Tensor dq, {_TENSORS}, Tensor? theta_scale, Tensor? phi_scale, {_OPTIONS})"
    " -> (Tensor dh, Tensor dht, Tensor dhu)",
    _sums_fake,
)
gate_apply_fwd = _library.define(
    "gate_apply_fwd",
    "(Tensor x, Tensor alpha) -> Tensor y",
    lambda x, alpha: torch.empty_like(x),
)
gate_apply_bwd = _library.define(
    "gate_apply_bwd",
    "(Tensor dy, Tensor x, Tensor alpha) -> (Tensor dx, Tensor dalpha)",
    lambda dy, x, alpha: (torch.empty_like(x), torch.empty_like(alpha)),
)


class Kernels:
    """One implementation, or the reference, by the same calls."""

    def __init__(self, impl: str) -> None:
        self.impl = impl
        self.plain = impl == "reference"

    def forward(self, i: Inputs, o: Options) -> tuple[Tensor, Tensor]:
        return reference.forward(i, o) if self.plain else attention_gate_fwd[self.impl](*i, *o)

    def moments(self, x: Tensor, weight: Tensor, o: Options) -> tuple[Tensor, Tensor]:
        if self.plain:
            return reference.moments(x, weight, o)
        return attention_gate_moments[self.impl](x, weight, o.k1, o.k2, o.k3)

    def sums(
        self, dq: Tensor, i: Inputs, o: Options, theta: Branch | None, phi: Branch | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.plain:
            return reference.sums(dq, i, o, theta, phi)
        scales = (None if b is None else b.scale for b in (theta, phi))
        return attention_gate_sums[self.impl](dq, *i, *scales, *o)

    def backward(
        self,
        d: Tensor | None,
        dq: Tensor | None,
        i: Inputs,
        q: Tensor,
        o: Options,
        theta: Branch | None,
        phi: Branch | None,
        needs: tuple[bool, bool, bool],
    ) -> reference.Gradients:
        if self.plain:
            return reference.backward(d, dq, i, q, o, theta, phi)
        nothing = (None, None, None)
        branches = (*(theta or nothing), *(phi or nothing))
        return reference.Gradients(
            *attention_gate_bwd[self.impl](d, dq, *i, q, *branches, *o, *needs)
        )


# ------------------------------------------------------------------ statistics over the batch


class Norms(NamedTuple):
    """Which branch is normalised over the batch: its eps, or None."""

    theta: float | None = None
    phi: float | None = None


class Statistics(NamedTuple):
    """Of a branch t over the batch, all [F]; scale (t - mean) = gamma r (t - mean) enters h."""

    mean: Tensor
    var: Tensor
    r: Tensor
    scale: Tensor


def _of_moments(mean: Tensor, var: Tensor, gamma: Tensor | None, eps: float) -> Statistics:
    r = (var + eps).rsqrt()
    return Statistics(mean, var, r, r if gamma is None else gamma * r)


def _statistics(
    x: Tensor, weight: Tensor, gamma: Tensor | None, eps: float | None, o: Options, k: Kernels
) -> Statistics | None:
    if eps is None:
        return None
    return _of_moments(*k.moments(x, weight, o), gamma, eps)


def _both_statistics(
    i: Inputs, gammas: tuple[Tensor | None, ...], norms: Norms, o: Options, k: Kernels
) -> tuple[Statistics | None, Statistics | None]:
    theta = _statistics(i.x, i.theta, gammas[0], norms.theta, o, k)
    if norms.phi is None:
        return theta, None
    assert i.phi is not None
    return theta, _statistics(i.g, i.phi, gammas[1], norms.phi, o._replace(k1=1, k2=1, k3=1), k)


def _centred_bias(
    bias: Tensor | None, theta: Statistics | None, phi: Statistics | None
) -> Tensor | None:
    for s in (theta, phi):
        if s is not None:
            start = torch.zeros_like(s.mean) if bias is None else bias
            bias = torch.addcmul(start, s.scale, s.mean, value=-1)
    return bias


def _folded(i: Inputs, theta: Statistics | None, phi: Statistics | None) -> Inputs:
    """theta and phi times their scales: what the forward multiplies by."""
    if theta is not None:
        i = i._replace(theta=theta.scale.unsqueeze(1) * i.theta)
    if phi is not None:
        assert i.phi is not None
        i = i._replace(phi=phi.scale.unsqueeze(1) * i.phi)
    return i


def _branch(s: Statistics | None, dh: Tensor, dht: Tensor, count: int) -> Any:
    """The `Branch` that returns through the statistics, and dgamma: h has gamma r (t - mean)."""
    if s is None:
        return None, None
    dgamma = s.r * torch.addcmul(dht, s.mean, dh, value=-1)
    k1 = s.scale * s.r * dgamma / -count
    k0 = torch.addcmul(s.scale * dh / -count, k1, s.mean, value=-1)
    return Branch(s.scale, k0, k1), dgamma


def _by_branch(norms: Norms, moments: Any) -> Any:
    """mean and var of theta's branch and of phi's, from those there are."""
    left = iter(moments)
    return tuple((None, None) if eps is None else (next(left), next(left)) for eps in norms)


# ------------------------------------------------------------------ autograd


class _Gate(torch.autograd.Function):
    """Saves x, g and q: nothing of size [B, F, L].

    Returns q, and y or, where the gate is not applied at once, the target itself: what flows into that
    later is where its gradient begins, so that the two need no addition of their own.
    """

    @staticmethod
    def forward(ctx: Any, impl: str, o: Options, norms: Norms, *tensors: Any) -> Any:
        i, gammas, kernels = Inputs(*tensors[:9]), tensors[9:], Kernels(impl)
        statistics = _both_statistics(i, gammas, norms, o, kernels)
        centred = i._replace(bias=_centred_bias(i.bias, *statistics))
        q, y = kernels.forward(_folded(centred, *statistics), o)
        # without those there are not: torch.compile takes no output that is None
        moments = [t for s in statistics if s is not None for t in (s.mean, s.var)]
        ctx.impl, ctx.options, ctx.norms = impl, o, norms
        ctx.save_for_backward(*tensors, q, *moments)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*moments)
        target = i.x if o.target == "x" else i.g
        return q, y if o.apply else target.view_as(target), *moments

    @staticmethod
    def backward(ctx: Any, dq: Tensor | None, d: Tensor | None, *_: Any) -> Any:
        saved, o = ctx.saved_tensors, ctx.options
        i, gammas, q = Inputs(*saved[:9]), saved[9:11], saved[11]
        needs = ctx.needs_input_grad[3:]
        # create_graph=True: the same formulas in differentiable PyTorch, for double backward
        differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        kernels = Kernels("reference" if differentiable else ctx.impl)
        with _autocast.full_precision(i.x):
            if differentiable:
                statistics = _both_statistics(i, gammas, ctx.norms, o, kernels)
            else:
                theta_saved, phi_saved = (
                    None if eps is None else _of_moments(mean, var, gamma, eps)
                    for eps, gamma, (mean, var) in zip(
                        ctx.norms, gammas, _by_branch(ctx.norms, saved[12:]), strict=True
                    )
                )
                statistics = (theta_saved, phi_saved)
            i = i._replace(bias=_centred_bias(i.bias, *statistics))
            target = i.x if o.target == "x" else i.g
            if o.apply and d is None:
                d = torch.zeros_like(target)
            if not o.apply and dq is None:
                dq = torch.zeros_like(q)
            d = None if d is None else _gradient(d, target, i.x)
            dq = None if dq is None else dq.contiguous()
            theta, phi = (None if s is None else Branch(s.scale) for s in statistics)
            dgammas: tuple[Tensor | None, ...] = (None, None)
            if theta or phi:
                assert dq is not None
                dh, dht, dhu = kernels.sums(dq, i, o, theta, phi)
                count = q.numel()
                theta, dtheta_gamma = _branch(statistics[0], dh, dht, count)
                phi, dphi_gamma = _branch(statistics[1], dh, dhu, count)
                dgammas = (dtheta_gamma, dphi_gamma)
            grads = kernels.backward(
                *(d, dq, i, q, o, theta, phi),
                needs=(needs[0], needs[1], any(needs[2:7])),
            )
        by_input = (*grads, None, None, *dgammas)
        return (
            None,
            None,
            None,
            *(grad if need else None for grad, need in zip(by_input, needs, strict=True)),
        )


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, impl: str, x: Tensor, alpha: Tensor) -> Tensor:
        ctx.impl = impl
        ctx.save_for_backward(x, alpha)
        return gate_apply_fwd[impl](x, alpha)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, alpha = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            with _autocast.full_precision(x):
                return None, *reference.apply_backward(dy, x, alpha)
        return None, *gate_apply_bwd[ctx.impl](_layout.like(dy, x), x, alpha)


def gate(
    impl: str, i: Inputs, o: Options, norms: Norms, gammas: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """q, y (the target where not o.apply), and mean and variance of theta's and phi's branch over the batch."""
    if impl == "reference":
        kernels = Kernels(impl)
        with _autocast.full_precision(i.x):
            statistics = _both_statistics(i, gammas, norms, o, kernels)
            centred = i._replace(bias=_centred_bias(i.bias, *statistics))
            q, y = kernels.forward(_folded(centred, *statistics), o)
        moments = tuple(
            t for s in statistics for t in ((None, None) if s is None else (s.mean, s.var))
        )
        return q, y if o.apply else (i.x if o.target == "x" else i.g), moments
    i = readable(i)
    if norms.theta is not None or norms.phi is not None or needs_grad(*i, *gammas):
        q, y, *moments = _Gate.apply(impl, o, norms, *i, *gammas)
        theta, phi = _by_branch(norms, moments)
        return q, y, (*theta, *phi)
    q, y = attention_gate_fwd[impl](*i, *o)
    return q, y if o.apply else (i.x if o.target == "x" else i.g), (None,) * 4


def apply(impl: str, x: Tensor, alpha: Tensor) -> Tensor:
    """alpha [B, X1, X2, X3] times x [B, C, X1, X2, X3]."""
    if impl == "reference":
        with _autocast.full_precision(x):
            return reference.apply(x, alpha)
    x, alpha = _layout.as_readable(x), alpha.contiguous()
    if needs_grad(x, alpha):
        return _Apply.apply(impl, x, alpha)
    return gate_apply_fwd[impl](x, alpha)


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def readable(i: Inputs) -> Inputs:
    """Maps that kernels read in place, both channels first or both channels last as x is; the rest dense."""
    x = _layout.as_readable(i.x)
    g = _layout.as_readable(i.g)
    if _layout.is_channels_last(g) != _layout.is_channels_last(x):
        g = _in_layout_of(g, x)
    small = (None if t is None else t.contiguous() for t in i[2:])
    return Inputs(x, g, *small)  # type: ignore[arg-type]


def _gradient(d: Tensor, target: Tensor, x: Tensor) -> Tensor:
    """d in the layout of its target as kernels walk it, which is x's: a g of one channel or position has both."""
    if _layout.is_channels_last(x) and not _layout.is_channels_last(target):
        return _in_layout_of(d, x)
    return _layout.like(d, target)


def _in_layout_of(g: Tensor, x: Tensor) -> Tensor:
    """g, of other sizes than x, channels first or last as x is: one copy."""
    if not _layout.is_channels_last(x):
        return g.contiguous()
    return g.movedim(1, -1).contiguous().movedim(-1, 1)
