"""What tests and benchmarks share: cases, inputs, the float64 oracle and the error budget.

Each operator's ``cases.py`` exports ``SPECS``, a list of `OpSpec`; `specs` finds them all, so that
no list is edited to add an operator.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One call: the shape of every tensor argument, and the options.

    ``maps`` are the large arguments, [B, C, *spatial] or [B, N, D] (layouts apply to them), ``weights``
    those that may stay float32 beside low-precision maps, ``per_sample`` those with a batch axis;
    ``scale`` multiplies standard-normal values.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    maps: tuple[str, ...] = ("x",)
    weights: tuple[str, ...] = ()
    scale: Mapping[str, float] = field(default_factory=dict)
    per_sample: tuple[str, ...] = ()

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
    ``operator`` is what an implementation must have a kernel of.  ``oracle`` takes eager's place as the
    oracle where that is not exact in float64.
    """

    name: str
    function: Callable[..., Any]
    eager: Callable[..., Any]
    cases: Sequence[Case]
    operator: str
    oracle: Callable[..., Any] | None = None


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

    def items(self) -> Iterator[tuple[str, Tensor]]:
        for index, output in enumerate(self.outputs):
            yield f"output {index}", output
        for name, grad in self.grads.items():
            yield f"grad of {name}", grad


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
        grad_outputs = noise_like(outputs, seed)
    matched = [g.to(o.dtype) for g, o in zip(grad_outputs, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), matched)
    return Result(outputs, dict(zip(leaves, grads, strict=True)))


def double(tensors: Tensors) -> Tensors:
    return {name: t.detach().double().cpu() for name, t in tensors.items()}


def largest_error(value: Tensor, oracle: Tensor) -> float:
    """max|value - oracle| where both are finite."""
    v, o = value.detach().double().cpu(), oracle.detach().double().cpu()
    finite = torch.isfinite(v) & torch.isfinite(o)
    return float((v - o)[finite].abs().max()) if finite.any() else 0.0


def error_ratio(
    got: Tensor, eager: Tensor, oracle: Tensor, eager_error: float | None = None
) -> float:
    """max|got - oracle| over (eager's own error + one rounding of the largest value); 2 is the limit.

    Eager's error is max|eager - oracle| unless given.  The ratio is infinite where ``got`` is not finite
    though the oracle is, or where the oracle is not and ``got`` is not exactly what eager is.
    """
    g, e, o = (t.detach().to(got.device).double() for t in (got, eager, oracle))
    finite = torch.isfinite(o.to(got.dtype).double())
    same = (g == e) | (g.isnan() & e.isnan())
    if not same[~finite].all() or not torch.isfinite(g[finite]).all():
        return float("inf")
    if eager_error is None:
        eager_error = largest_error(eager, oracle)
    g, o = g[finite], o[finite]
    if o.numel() == 0:
        return 0.0
    error = float((g - o).abs().max())
    band = torch.finfo(got.dtype).eps * float(o.abs().max())
    return (
        0.0 if error == 0 else error / (eager_error + band) if eager_error + band else float("inf")
    )


def check(
    got: Result,
    eager: Result,
    oracle: Result,
    limit: float = 2.0,
    eager_errors: Mapping[str, float] | None = None,
) -> None:
    """Every output and gradient within ``limit`` of the error budget; raises with the worst."""
    eager_values, oracle_values = dict(eager.items()), dict(oracle.items())
    worst = {}
    for name, g in got.items():
        e, o = eager_values[name], oracle_values[name]
        assert g.shape == o.shape, f"{name} has shape {list(g.shape)}, expected {list(o.shape)}"
        ratio = error_ratio(g, e, o, None if eager_errors is None else eager_errors[name])
        if not ratio <= limit:
            worst[name] = ratio
    assert not worst, f"error against float64 over eager's own (limit {limit}): {worst}"


@dataclass
class Expected:
    """What a call is held to: eager's result, the oracle's, and eager's error, by output and gradient."""

    eager: Result
    oracle: Result
    errors: dict[str, float]


def expected(
    spec: OpSpec, case: Case, tensors: Tensors, grad_outputs: Sequence[Tensor]
) -> Expected:
    """Eager in the tensors' own dtype, and in float64 on the CPU.

    Eager's error is the largest by which it misses the oracle at the inputs and at four more, moved by
    one rounding of their own types, since one draw of a small sum may be next to nothing by luck; plus
    what the oracle moves by when every input moves by one rounding of the accumulation type.  In float64
    eager is the oracle; its error is then float32's for the same values, scaled by the ratio of the two
    roundings.
    """
    eager, oracle = _eager_and_oracle(spec, case, tensors, grad_outputs)
    scale, measured = 1.0, (eager, oracle)
    if eager.outputs[0].dtype == torch.float64:
        tensors = {name: t.float() for name, t in tensors.items()}
        grad_outputs = [g.float() for g in grad_outputs]
        scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        measured = _eager_and_oracle(spec, case, tensors, grad_outputs)
    missed = _missed(*measured)
    moved = dict.fromkeys(missed, 0.0)
    single = all(t.dtype == torch.float32 for t in (*tensors.values(), *grad_outputs))
    for seed in range(4):
        near = {name: _nudge(t, seed) for name, t in tensors.items()}
        near_grads = [_nudge(g, seed) for g in grad_outputs]
        drawn, nudged = _eager_and_oracle(spec, case, near, near_grads)
        missed = _largest(missed, _missed(drawn, nudged))
        if not single:
            near = {name: _nudge(t, seed) for name, t in double(tensors).items()}
            near_grads = [_nudge(g.double().cpu(), seed) for g in grad_outputs]
            nudged = run(spec.oracle or spec.eager, near, case.options, near_grads)
        moved = _largest(moved, _missed(nudged, measured[1]))
    return Expected(eager, oracle, {name: scale * (missed[name] + moved[name]) for name in missed})


def _missed(got: Result, oracle: Result) -> dict[str, float]:
    pairs = zip(got.items(), oracle.items(), strict=True)
    return {name: largest_error(g, o) for (name, g), (_, o) in pairs}


def _largest(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    return {name: max(value, b[name]) for name, value in a.items()}


def _eager_and_oracle(
    spec: OpSpec, case: Case, tensors: Tensors, grad_outputs: Sequence[Tensor]
) -> tuple[Result, Result]:
    oracle_grads = [g.double().cpu() for g in grad_outputs]
    return (
        run(spec.eager, tensors, case.options, grad_outputs),
        run(spec.oracle or spec.eager, double(tensors), case.options, oracle_grads),
    )


def _nudge(t: Tensor, seed: int) -> Tensor:
    """Every element one rounding of its type, or of float32, up or down, seeded."""
    generator = torch.Generator().manual_seed(seed)
    signs = (torch.randint(0, 2, t.shape, generator=generator) * 2 - 1).to(t.device)
    step = max(torch.finfo(t.dtype).eps, torch.finfo(torch.float32).eps)
    return (t.double() * (1 + step * signs)).to(t.dtype)


def noise_like(outputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Seeded standard-normal gradients for these outputs."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]


def compare(
    spec: OpSpec,
    case: Case,
    tensors: Tensors,
    limit: float = 2.0,
    grad_outputs: Sequence[Tensor] | None = None,
    **extra: Any,
) -> Result:
    """Run ``spec.function`` on ``tensors`` and hold it, outputs and gradients, to the error budget.

    All three runs see the same values and the same gradients of the outputs.  ``extra`` goes to the
    function alone (``impl=...``).  Returns the function's result.
    """
    if grad_outputs is None:
        with torch.no_grad():
            grad_outputs = noise_like(as_tuple(spec.eager(**tensors, **case.options)))
    want = expected(spec, case, tensors, grad_outputs)
    got = run(spec.function, tensors, case.options, grad_outputs, **extra)
    check(got, want.eager, want.oracle, limit, want.errors)
    return got
