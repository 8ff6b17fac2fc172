"""The operators behind `attention_gate`: schemas and fakes, in the normal form of reference.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkern import _library
from attnkern.ops.attention_gate import reference
from attnkern.ops.attention_gate.normal_form import as_map, target_of
from attnkern.ops.attention_gate.reference import Inputs, Options


def _fwd_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    i, o = Inputs(*arguments[:9]), Options(*arguments[9:])
    q = i.theta.new_empty(i.x.shape[0], *reference.grid_of(i.x, o))
    if not o.apply:
        return q, i.x.new_empty(0)
    return q, torch.empty_like(target_of(i, o))


def _eval_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    given, o = Inputs(*arguments[:9]), Options(*arguments[27:])
    q, y = _fwd_fake(*given._replace(x=as_map(given.x), g=as_map(given.g)), *o)
    return q, torch.empty_like(target_of(given, o)) if o.apply else y


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


def _norm(of: str) -> str:
    tensors = ("before", "gamma", "beta", "mean", "var")
    return ", ".join(f"Tensor? {of}_{name}" for name in tensors) + f", float {of}_eps"


_OPTIONS = "str act, float act_slope, int k1, int k2, int k3, str target, bool apply"

attention_gate_fwd = _library.define(
    "attention_gate_fwd", f"({_TENSORS}, {_OPTIONS}) -> (Tensor q, Tensor y)", _fwd_fake
)
attention_gate_eval = _library.define(
    "attention_gate_eval",
    f"({_TENSORS}, {_norm('theta')}, {_norm('phi')}, {_norm('psi')}, {_OPTIONS})"
    " -> (Tensor q, Tensor y)",
    _eval_fake,
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
