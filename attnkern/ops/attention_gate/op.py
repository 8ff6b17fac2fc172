"""`attention_gate` between its public function and its operators: autograd, and norms over the batch."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkern import _autocast, _layout
from attnkern.ops.attention_gate import reference
from attnkern.ops.attention_gate.normal_form import (
    Evaluation,
    as_given,
    as_map,
    folded,
    gradient_like,
    normal,
    readable,
    target_of,
)
from attnkern.ops.attention_gate.reference import Branch, Inputs, Options
from attnkern.ops.attention_gate.schemas import (
    attention_gate_bwd,
    attention_gate_eval,
    attention_gate_fwd,
    attention_gate_moments,
    attention_gate_sums,
    gate_apply_bwd,
    gate_apply_fwd,
    gate_norm_bwd,
    gate_norm_fwd,
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
        normed, statistics = _normed(i, more, norms, o, kernels)
        q, y = kernels.forward(normed, o)
        known = [s for s in statistics if s is not None]
        # without those there are not: torch.compile takes no output that is None
        moments = [t for s in known for t in (s.mean, s.var)]
        ctx.impl, ctx.options, ctx.norms = impl, o, norms
        ctx.save_for_backward(*tensors, q, normed.bias, *(t for s in known for t in s))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*moments)
        target = target_of(i, o)
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
                normed, statistics = _normed(i, more, norms, o, kernels)
                bias = normed.bias
            else:
                statistics = _by_branch(norms, saved[16:], 3)
                statistics = tuple(None if s[0] is None else Statistics(*s) for s in statistics)
            i = i._replace(bias=bias)
            target = target_of(i, o)
            if o.apply and d is None:
                d = torch.zeros_like(target)
            if not o.apply and dq is None:
                dq = torch.zeros_like(q)
            d = None if d is None else gradient_like(d, target, i.x)
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
        product, shift, _ = gate_norm_fwd[impl](*tensors, eps)
        ctx.eps = eps
        # copies: a batch that trains may move the running statistics before backward
        statistics = (t if t is None or t.requires_grad else t.clone() for t in tensors[4:])
        ctx.save_for_backward(*tensors[:4], *statistics)
        return product, shift

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
    impl: str, given: Inputs, o: Options, norms: Norms, more: OverBatch, evaluation: Evaluation
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """q, y (the target where not o.apply), and mean and variance of theta's and phi's branch over the batch.

    Maps have one to three spatial dims, weights any after the first.
    """
    trained = (
        norms.theta is not None
        or norms.phi is not None
        or needs_grad(*given, *more, *(t for n in evaluation for t in n[:5]))
    )
    if impl != "reference" and not trained:
        dense = [t.contiguous() if isinstance(t, Tensor) else t for n in evaluation for t in n]
        q, y = attention_gate_eval[impl](*readable(given), *dense, *o)
        return q, y if o.apply else target_of(given, o), (None,) * 4
    i = folded(normal(given), evaluation, functools.partial(fold, impl))
    if impl == "reference":
        q, y, *moments = _by_autograd(i, o, norms, more)
    else:
        q, y, *moments = _Gate.apply(impl, o, norms, *readable(i), *more)
    theta, phi = _by_branch(norms, moments)
    return q, as_given(y, given.x), (*theta, *phi)


def _by_autograd(i: Inputs, o: Options, norms: Norms, more: OverBatch) -> Any:
    """What `_Gate` returns, by the formulas of reference.py."""
    with _autocast.full_precision(i.x):
        for b in (more.theta_bias, more.phi_bias):
            if b is not None:  # a gradient of 0
                i = i._replace(bias=0.0 * b if i.bias is None else i.bias + 0.0 * b)
        if more.psi_bias is not None:
            i = i._replace(psi_bias=more.psi_bias.detach() + 0.0 * more.psi_bias)
        normed, statistics = _normed(i, more, norms, o, Kernels("reference"))
        q, y = reference.forward(normed, o)
    moments = [t for s in statistics if s is not None for t in s[:2]]
    return q, y if o.apply else target_of(i, o), *moments


def fold(
    impl: str,
    weight: Tensor,
    before: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """weight [F, C] and bias of a convolution with its norm in evaluation, as `reference.norm_forward` takes them."""
    tensors = weight, before, gamma, beta, mean, var
    if impl == "reference":
        return reference.norm_forward(*tensors, eps)[:2]
    dense = [None if t is None else t.contiguous() for t in tensors]
    if needs_grad(*tensors):
        return _Fold.apply(impl, eps, *dense)
    return gate_norm_fwd[impl](*dense, eps)[:2]


def apply(impl: str, x: Tensor, alpha: Tensor) -> Tensor:
    """alpha [B, 1, *spatial] times x [B, C, *spatial]."""
    map_, alpha = as_map(x), as_map(alpha).squeeze(1)
    if impl == "reference":
        with _autocast.full_precision(x):
            return as_given(reference.apply(map_, alpha), x)
    map_, alpha = _layout.as_readable(map_), alpha.contiguous()
    run = functools.partial(_Apply.apply, impl) if needs_grad(x, alpha) else gate_apply_fwd[impl]
    return as_given(run(map_, alpha), x)


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
