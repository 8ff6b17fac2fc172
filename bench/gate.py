"""The gate before every clock: error against float64 within eager's own, outputs and gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnkern import testing
from attnkern.testing import Result, Tensors
from bench.rows import DTYPES, Subject

LIMIT = 2.0  # the tests hold the same


class Red(Exception):
    """The gate's refusal, in one sentence."""


@dataclass
class Expected:
    """Two input sets of a subject with eager's results and the float64 ones."""

    tensors: Tensors
    grad_outputs: list[Tensor]
    eager: Result
    oracle: Result
    second: Tensors
    second_eager: Tensor
    second_oracle: Tensor
    errors: dict[str, float]  # eager's own, of each output and gradient
    budget: Callable[[], dict[str, float]]  # the tests' fuller measure of it, made when it decides


class Oracles:
    """Makes `Expected`; the float64 part, the costly one, is shared by the layouts of a case."""

    def __init__(self, device: torch.device):
        self.device = device
        self._key: tuple[str, str] | None = None
        self._oracle: tuple[Result, Tensor] | None = None
        self._expected: tuple[Subject, Expected] | None = None

    def of(self, subject: Subject) -> Expected:
        if self._expected is None or self._expected[0] is not subject:
            self._expected = None  # free it before the next one is made
            self._expected = (subject, self._make(subject))
        return self._expected[1]

    def _make(self, subject: Subject) -> Expected:
        eager = functools.partial(subject.spec().eager, **subject.case.options)
        tensors, second = (
            subject.case.inputs(
                DTYPES[subject.dtype], self.device, channels_last=subject.channels_last, seed=seed
            )
            for seed in (0, 1)
        )
        with torch.no_grad():
            second_eager = testing.as_tuple(eager(**second))[0]
        generator = torch.Generator().manual_seed(2)
        noise = torch.randn(second_eager.shape, generator=generator).to(second_eager)
        # the gradient arrives in the layout of the output, as the next layer's backward leaves it
        mapped = subject.channels_last and noise.dim() > 3
        grads = [testing.to_channels_last(noise) if mapped else noise]
        if self._key != (subject.case.name, subject.dtype):
            self._key = self._oracle = None
            oracle = testing.run(eager, _double(tensors), {}, [grads[0].double()])
            with torch.no_grad():
                again = testing.as_tuple(eager(**_double(second)))[0]
            self._key, self._oracle = (subject.case.name, subject.dtype), (oracle, again)
        assert self._oracle is not None
        oracle, again = self._oracle
        plain = testing.run(eager, tensors, {}, grads)
        second = {name: t.requires_grad_() for name, t in second.items()}
        wide = dict(oracle.items())
        errors = {name: testing.largest_error(t, wide[name]) for name, t in plain.items()}

        @functools.cache
        def budget() -> dict[str, float]:
            return testing.expected(subject.spec(), subject.case, tensors, grads).errors

        return Expected(tensors, grads, plain, oracle, second, second_eager, again, errors, budget)


def _double(tensors: Tensors) -> Tensors:
    return {name: t.double() for name, t in tensors.items()}


def check(
    function: Callable[..., Any], expected: Expected, passed: Result | None = None
) -> tuple[float, Result]:
    """The worst error ratio of outputs and gradients, and the results; raises `Red`.

    A second input set catches a remembered result.  ``passed`` has been through the gate: what is
    bitwise equal to it is not measured again.
    """
    try:
        got = testing.run(function, expected.tensors, {}, expected.grad_outputs)
        with torch.no_grad():
            again = testing.as_tuple(function(**expected.second))[0]
    except Exception as error:
        raise Red(sentence(error)) from error
    eager, oracle = expected.eager, expected.oracle
    for o, e in zip(got.outputs, eager.outputs, strict=True):
        if (o.dtype, o.shape, o.stride()) != (e.dtype, e.shape, e.stride()):
            raise Red(f"its output is {_form(o)}, eager's is {_form(e)}")
    eagers, oracles = dict(eager.items()), dict(oracle.items())
    known = dict(passed.items()) if passed is not None else {}
    rows = [
        (name, value, eagers[name], oracles[name])
        for name, value in got.items()
        if name not in known or not torch.equal(value, known[name])
    ]
    rows.append(("output of a second input", again, expected.second_eager, expected.second_oracle))
    worst, where = 0.0, ""
    for name, g, e, o in rows:
        ratio = testing.error_ratio(g, e, o, expected.errors.get(name))
        if not ratio <= LIMIT and name in expected.errors:
            ratio = testing.error_ratio(g, e, o, expected.budget()[name])
        if not ratio <= worst:  # NaN is the worst
            worst, where = ratio, name
    if not worst <= LIMIT:
        size = "not finite" if not math.isfinite(worst) else f"{worst:.3g} x eager's own"
        raise Red(f"error against float64 is {size} in the {where} (limit {LIMIT:g})")
    return worst, got


def sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _form(t: Tensor) -> str:
    return f"{t.dtype} {list(t.shape)} of strides {list(t.stride())}".replace("torch.", "")
