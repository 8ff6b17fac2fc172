"""A user's maps, weights and norms in evaluation to the normal form of reference.py, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from attnkern import _layout
from attnkern.ops.attention_gate.reference import Inputs, Options

# ------------------------------------------------------------------ dims and layouts


def as_map(t: Tensor) -> Tensor:
    """[B, C, *spatial] with three spatial dims, leading ones before those there are."""
    for _ in range(5 - t.dim()):
        t = t.unsqueeze(2)
    return t


def as_given(y: Tensor, x: Tensor) -> Tensor:
    """y with as many dims as x."""
    for _ in range(5 - x.dim()):
        y = y.squeeze(2)  # keeps y's strides; reshape chooses them anew for a batch of 1
    return y


def as_matrix(weight: Tensor) -> Tensor:
    """[O, C, *kernel] as [O, C k1 k2 k3].

    A 1x1 weight in channels_last gets its gradient in its own strides, which DDP compares exactly.
    """
    if weight.requires_grad and weight.dim() > 2 and weight.stride(-1) != 1:
        last = weight.movedim(1, -1)
        if last.shape[1:-1].numel() == 1:
            return last.flatten(0, -2)
    return weight.flatten(1)


def normal(i: Inputs) -> Inputs:
    phi = None if i.phi is None else as_matrix(i.phi)
    psi = i.psi if i.psi.dim() == 1 else as_matrix(i.psi).flatten()
    return i._replace(x=as_map(i.x), g=as_map(i.g), theta=as_matrix(i.theta), phi=phi, psi=psi)


def target_of(i: Inputs, o: Options) -> Tensor:
    return i.x if o.target == "x" else i.g


def readable(i: Inputs) -> Inputs:
    """Maps that kernels read in place, both channels first or both channels last as x is; the rest dense."""
    x = _layout.as_readable(i.x)
    g = _layout.as_readable(i.g)
    if _layout.is_channels_last(g) != _layout.is_channels_last(x):
        g = _in_layout_of(g, x)
    small = (None if t is None else t.contiguous() for t in i[2:])
    return Inputs(x, g, *small)  # type: ignore[arg-type]


def gradient_like(d: Tensor, target: Tensor, x: Tensor) -> Tensor:
    """d in the layout of its target as kernels walk it, which is x's: a g of one channel or position has both."""
    if _layout.is_channels_last(x) and not _layout.is_channels_last(target):
        return _in_layout_of(d, x)
    return _layout.like(d, target)


def _in_layout_of(g: Tensor, x: Tensor) -> Tensor:
    """g, of other sizes than x, channels first or last as x is: one copy."""
    if not _layout.is_channels_last(x):
        return g.contiguous()
    return g.movedim(1, -1).contiguous().movedim(-1, 1)


# ------------------------------------------------------------------ norms in evaluation


class Evaluated(NamedTuple):
    """A norm in evaluation, of a product to which ``before`` is added; none without a mean."""

    before: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    eps: float = 0.0


class Evaluation(NamedTuple):
    """Which of the gate's norms are in evaluation."""

    theta: Evaluated = Evaluated()
    phi: Evaluated = Evaluated()
    psi: Evaluated = Evaluated()


def evaluate(forward: Any, norm: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
    """``attention_gate_eval`` by an implementation's ``attention_gate_fwd`` and ``gate_norm_fwd``."""
    given, norms, o = Inputs(*arguments[:9]), arguments[9:27], Options(*arguments[27:])
    evaluation = Evaluation(*(Evaluated(*norms[n : n + 6]) for n in (0, 6, 12)))
    q, y = forward(*folded(normal(given), evaluation, lambda *of: norm(*of)[:2]), *o)
    return q, as_given(y, given.x) if o.apply else y


def folded(i: Inputs, norms: Evaluation, fold: Any) -> Inputs:
    """The inputs with the norms in evaluation folded in: ``fold(weight [F, C], *Evaluated)`` tells weight and bias."""
    biases = ("bias", "bias", "psi_bias")
    for name, norm, bias in zip(norms._fields, norms, biases, strict=True):
        if norm.mean is not None:
            weight, onto = getattr(i, name), getattr(i, bias)
            product, shift = fold(weight.reshape(norm.mean.shape[0], -1), *norm)
            shift = shift if onto is None else onto + shift
            i = i._replace(**{name: product.view_as(weight), bias: shift})
    return i
