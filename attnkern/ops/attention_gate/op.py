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


def _vectors(like: Tensor, count: int) -> tuple[Tensor, ...]:
    """So many [F], ``like`` being [F, ...]."""
    return tuple(like.new_empty(like.shape[0]) for _ in range(count))


def _sums_fake(dq: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    theta = arguments[2]
    return _vectors(theta, 3)


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
    lambda x, weight, *_: _vectors(weight, 2),
)
attention_gate_sums = _library.define(
    "attention_gate_sums",
    f"(Tensor dq, {_TENSORS}, Tensor? theta_scale, Tensor? phi_scale, {_OPTIONS})"
    " -> (Tensor dh, Tensor dht, Tensor dhu)",
    _sums_fake,
)
gate_norm_fwd = _library.define(
    "gate_norm_fwd",
    "(Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor mean, Tensor var, float eps)"
    " -> (Tensor folded, Tensor shift, Tensor scale)",
    lambda weight, *rest: (torch.empty_like(weight), *_vectors(weight, 2)),
)
gate_norm_bwd = _library.define(
    "gate_norm_bwd",
    "(Tensor dq, Tensor dh, Tensor dht, Tensor mean, Tensor var, Tensor scale, float eps)"
    " -> (Tensor k0, Tensor k1, Tensor dgamma)",
    lambda dq, dh, *_: _vectors(dh, 3),
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

    def norm(
        self,
        weight: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        moments: tuple[Tensor, Tensor],
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        run = reference.norm_forward if self.plain else gate_norm_fwd[self.impl]
        return run(weight, None, gamma, beta, *moments, eps)

    def norm_backward(
        self, dq: Tensor, dh: Tensor, dht: Tensor, s: Statistics, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        run = reference.norm_backward if self.plain else gate_norm_bwd[self.impl]
        return run(dq, dh, dht, *s, eps)

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


class OverBatch(NamedTuple):
    """What norms over the batch take besides, all [F]."""

    theta_gamma: Tensor | None = None
    phi_gamma: Tensor | None = None
    theta_bias: Tensor | None = None
    """Of the convolution before: the mean takes it off again, and its gradient is 0, as DDP wants one."""
    phi_bias: Tensor | None = None
    psi_bias: Tensor | None = None
    """[1], where q has a norm over the batch, which wants the bias (without a gradient) for its mean."""


class Statistics(NamedTuple):
    """Of a branch t over the batch, all [F]; scale (t - mean) enters h."""

    mean: Tensor
    var: Tensor
    scale: Tensor


def _normed(
    i: Inputs, more: OverBatch, norms: Norms, o: Options, k: Kernels
) -> tuple[Inputs, tuple[Statistics | None, Statistics | None]]:
    """theta, phi and bias with their norms folded in, which the forward multiplies by, and the statistics."""
    theta, phi = i.theta, i.phi
    bias, of_theta, of_phi = i.bias, None, None
    if norms.theta is not None:
        moments = k.moments(i.x, theta, o)
        theta, bias, scale = k.norm(theta, more.theta_gamma, bias, moments, norms.theta)
        of_theta = Statistics(*moments, scale)
    if norms.phi is not None:
        assert phi is not None
        moments = k.moments(i.g, phi, o._replace(k1=1, k2=1, k3=1))
        phi, bias, scale = k.norm(phi, more.phi_gamma, bias, moments, norms.phi)
        of_phi = Statistics(*moments, scale)
    return i._replace(theta=theta, phi=phi, bias=bias), (of_theta, of_phi)


def _by_branch(norms: Norms, tensors: Any, each: int = 2) -> Any:
    """``each`` tensors of theta's branch and of phi's, from those there are."""
    left = iter(tensors)
    return tuple(
        (None,) * each if eps is None else tuple(next(left) for _ in range(each)) for eps in norms
    )


# ------------------------------------------------------------------ autograd


class _Gate(torch.autograd.Function):
    """Saves x, g and q: nothing of size [B, F, L].

    Returns q, and y or, where the gate is not applied at once, the target itself: what flows into that
    later is where its gradient begins, so that the two need no addition of their own.
    """

    @staticmethod
    def forward(ctx: Any, impl: str, o: Options, norms: Norms, *tensors: Any) -> Any:
        i, more, kernels = Inputs(*tensors[:9]), OverBatch(*tensors[9:]), Kernels(impl)
        folded, statistics = _normed(i, more, norms, o, kernels)
        q, y = kernels.forward(folded, o)
        known = [s for s in statistics if s is not None]
        # without those there are not: torch.compile takes no output that is None
        moments = [t for s in known for t in (s.mean, s.var)]
        ctx.impl, ctx.options, ctx.norms = impl, o, norms
        ctx.save_for_backward(*tensors, q, folded.bias, *(t for s in known for t in s))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*moments)
        target = i.x if o.target == "x" else i.g
        return q, y if o.apply else target.view_as(target), *moments

    @staticmethod
    def backward(ctx: Any, dq: Tensor | None, d: Tensor | None, *_: Any) -> Any:
        saved, o, norms = ctx.saved_tensors, ctx.options, ctx.norms
        i, more, q, bias = Inputs(*saved[:9]), OverBatch(*saved[9:14]), saved[14], saved[15]
        needs = ctx.needs_input_grad[3:]
        # create_graph=True: the same formulas in differentiable PyTorch, for double backward
        differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        kernels = Kernels("reference" if differentiable else ctx.impl)
        with _autocast.full_precision(i.x):
            statistics: Any
            if differentiable:
                folded, statistics = _normed(i, more, norms, o, kernels)
                bias = folded.bias
            else:
                statistics = _by_branch(norms, saved[16:], 3)
                statistics = tuple(None if s[0] is None else Statistics(*s) for s in statistics)
            i = i._replace(bias=bias)
            target = i.x if o.target == "x" else i.g
            if o.apply and d is None:
                d = torch.zeros_like(target)
            if not o.apply and dq is None:
                dq = torch.zeros_like(q)
            d = None if d is None else _gradient(d, target, i.x)
            dq = None if dq is None else dq.contiguous()
            branches: list[Branch | None] = [
                None if s is None else Branch(s.scale) for s in statistics
            ]
            dgammas: list[Tensor | None] = [None, None]
            if any(branches):
                assert dq is not None
                dh, *by_branch = kernels.sums(dq, i, o, *branches)
                for n, (s, dht, eps) in enumerate(zip(statistics, by_branch, norms, strict=True)):
                    if s is not None:
                        *k, dgammas[n] = kernels.norm_backward(dq, dh, dht, s, eps)
                        branches[n] = Branch(s.scale, *k)
            wanted = (needs[0], needs[1], any(needs[2:7]))
            grads = kernels.backward(d, dq, i, q, o, branches[0], branches[1], wanted)
            cancelled = (None if b is None else torch.zeros_like(b) for b in more[2:])
        by_input = (*grads, None, None, *dgammas, *cancelled)
        return (
            None,
            None,
            None,
            *(grad if need else None for grad, need in zip(by_input, needs, strict=True)),
        )


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, impl: str, eps: float, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        folded, shift, _ = gate_norm_fwd[impl](*tensors, eps)
        ctx.eps = eps
        # copies: a batch that trains may move the running statistics before backward
        statistics = (t if t is None or t.requires_grad else t.clone() for t in tensors[4:])
        ctx.save_for_backward(*tensors[:4], *statistics)
        return folded, shift

    @staticmethod
    def backward(ctx: Any, dfolded: Tensor, dshift: Tensor) -> Any:
        grads = reference.fold_backward(*(dfolded, dshift, *ctx.saved_tensors, ctx.eps))
        return None, None, *grads


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
    impl: str, i: Inputs, o: Options, norms: Norms, more: OverBatch
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """q, y (the target where not o.apply), and mean and variance of theta's and phi's branch over the batch."""
    if impl == "reference":
        with _autocast.full_precision(i.x):
            for b in (more.theta_bias, more.phi_bias):
                if b is not None:  # a gradient of 0
                    i = i._replace(bias=0.0 * b if i.bias is None else i.bias + 0.0 * b)
            if more.psi_bias is not None:
                i = i._replace(psi_bias=more.psi_bias.detach() + 0.0 * more.psi_bias)
            folded, statistics = _normed(i, more, norms, o, Kernels(impl))
            q, y = reference.forward(folded, o)
        moments = tuple(t for s in statistics for t in ((None, None) if s is None else s[:2]))
        return q, y if o.apply else (i.x if o.target == "x" else i.g), moments
    i = readable(i)
    if norms.theta is not None or norms.phi is not None or needs_grad(*i, *more):
        q, y, *moments = _Gate.apply(impl, o, norms, *i, *more)
        theta, phi = _by_branch(norms, moments)
        return q, y, (*theta, *phi)
    q, y = attention_gate_fwd[impl](*i, *o)
    return q, y if o.apply else (i.x if o.target == "x" else i.g), (None,) * 4


def fold(impl: str, *tensors: Any, eps: float) -> tuple[Tensor, Tensor]:
    """weight [F, C] and bias of a convolution with its norm in evaluation, as `reference.norm_forward` takes them."""
    if impl == "reference":
        return reference.norm_forward(*(*tensors, eps))[:2]
    dense = [None if t is None else t.contiguous() for t in tensors]
    if needs_grad(*tensors):
        return _Fold.apply(impl, eps, *dense)
    return gate_norm_fwd[impl](*dense, eps)[:2]


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
