"""What tests and benchmarks share: cases, inputs, the float64 oracle and the error budget.

Each operator's ``cases.py`` exports ``SPECS``, a list of `OpSpec`; `specs` finds them all, so that
no list is edited to add an operator.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One call: the shape of every tensor argument, and the options.

    ``maps`` are the arguments that are feature maps [B, C, *spatial] (layouts apply to them),
    ``weights`` those that may stay float32 beside a low-precision x; ``scale`` multiplies
    standard-normal values.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    maps: tuple[str, ...] = ("x",)
    weights: tuple[str, ...] = ()
    scale: Mapping[str, float] = field(default_factory=dict)

    def inputs(
        self,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        *,
        weight_dtype: torch.dtype | None = None,
        channels_last: bool = False,
        requires_grad: bool = False,
        seed: int = 0,
    ) -> Tensors:
        """Fresh tensors: the same values, rounded to ``dtype``, on every device and layout."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, shape in self.shapes.items():
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            values *= self.scale.get(name, 1.0)
            kind = weight_dtype if weight_dtype and name in self.weights else dtype
            t = values.to(kind).to(device)
            if channels_last and name in self.maps:
                t = to_channels_last(t)
            tensors[name] = t.requires_grad_(requires_grad)
        return tensors


@dataclass(frozen=True)
class OpSpec:
    """A public function, what users write today in its place, and the cases that cover it.

    ``function(**tensors, **options, impl=...)`` and ``eager(**tensors, **options)`` return a Tensor or a
    tuple of them.  ``eager`` composes stock torch calls in the tensors' own dtype and shares no code
    with any implementation: in float64 it is the oracle, in the tested dtype the yardstick.
    """

    name: str
    function: Callable[..., Any]
    eager: Callable[..., Any]
    cases: Sequence[Case]


def specs() -> list[OpSpec]:
    import attnkern.ops

    found: list[OpSpec] = []
    for module in pkgutil.iter_modules(attnkern.ops.__path__):
        found += importlib.import_module(f"attnkern.ops.{module.name}.cases").SPECS
    return found


def to_channels_last(x: Tensor) -> Tensor:
    """x with channels innermost, for any number of spatial dims."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def as_tuple(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


@dataclass
class Result:
    """Outputs and the gradient of every tensor argument."""

    outputs: tuple[Tensor, ...]
    grads: Tensors


def run(
    function: Callable[..., Any],
    tensors: Tensors,
    options: Mapping[str, Any],
    grad_outputs: Sequence[Tensor] | None = None,
    *,
    seed: int = 1,
    **extra: Any,
) -> Result:
    """Call and differentiate; ``grad_outputs`` default to seeded noise like the outputs."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    outputs = as_tuple(function(**leaves, **options, **extra))
    if grad_outputs is None:
        generator = torch.Generator().manual_seed(seed)
        grad_outputs = [
            torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs
        ]
    grads = torch.autograd.grad(outputs, list(leaves.values()), list(grad_outputs))
    return Result(outputs, dict(zip(leaves, grads, strict=True)))


def double(tensors: Tensors) -> Tensors:
    return {name: t.detach().double().cpu() for name, t in tensors.items()}


def error_ratio(got: Tensor, eager: Tensor, oracle: Tensor) -> float:
    """max|got - oracle| over (max|eager - oracle| + one rounding of the largest value); 2 is the limit.

    All three must have NaN and infinity in the same places, or the ratio is infinite.
    """
    g, e, o = (t.detach().double().cpu() for t in (got, eager, oracle))
    finite = torch.isfinite(o.to(got.dtype).double())
    if not torch.equal(torch.nan_to_num(g[~finite]), torch.nan_to_num(e[~finite])):
        return float("inf")
    if not torch.isfinite(g[finite]).all():
        return float("inf")
    g, e, o = g[finite], e[finite], o[finite]
    if o.numel() == 0:
        return 0.0
    band = torch.finfo(got.dtype).eps * o.abs().max()
    error = (g - o).abs().max()
    return 0.0 if error == 0 else float(error / ((e - o).abs().max() + band))


def check(got: Result, eager: Result, oracle: Result, limit: float = 2.0) -> None:
    """Every output and gradient within ``limit`` of the error budget; raises with the worst."""
    rows = [
        (f"output {i}", *triple)
        for i, triple in enumerate(zip(got.outputs, eager.outputs, oracle.outputs, strict=True))
    ]
    rows += [(f"grad of {name}", g, eager.grads[name], oracle.grads[name]) for name, g in got.grads.items()]
    worst = {}
    for name, g, e, o in rows:
        assert g.shape == o.shape, f"{name} has shape {list(g.shape)}, expected {list(o.shape)}"
        ratio = error_ratio(g, e, o)
        if not ratio <= limit:
            worst[name] = ratio
    assert not worst, f"error against float64 over eager's own (limit {limit}): {worst}"


def compare(spec: OpSpec, case: Case, tensors: Tensors, limit: float = 2.0, **extra: Any) -> Result:
    """Run ``spec.function`` on ``tensors`` and hold it, outputs and gradients, to the error budget.

    All three runs see the same values and the same gradients of the outputs.  ``extra`` goes to the
    function alone (``impl=...``).  Returns the function's result.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        outputs = as_tuple(spec.eager(**tensors, **case.options))
        kinds = [o.dtype for o in as_tuple(spec.function(**tensors, **case.options, **extra))]
    grad_outputs = [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs
    ]
    eager = run(spec.eager, tensors, case.options, grad_outputs)
    oracle = run(spec.eager, double(tensors), case.options, [g.double().cpu() for g in grad_outputs])
    matched = [g.to(kind) for g, kind in zip(grad_outputs, kinds, strict=True)]
    got = run(spec.function, tensors, case.options, matched, **extra)
    check(got, eager, oracle, limit)
    return got
