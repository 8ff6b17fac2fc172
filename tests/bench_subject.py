"""What the tests of the benchmark measure: a subject of a few elements, and faults to plant in it."""

from __future__ import annotations

import dataclasses
import functools

import torch

from attnkern.ops.squeeze_excite.cases import case
from bench import gate, rows, runner

CPU = torch.device("cpu")
TINY = rows.Subject(
    "squeeze_excite",
    case("2x8x6x6", 2, 8, (6, 6), 4),
    "fp32",
    {rows.FORWARD: 2, rows.TRAINING: 5},
    group="SE",
)
SETTINGS = runner.Settings(CPU, ("reference",), seconds=0.0, compile=False)


def measure(subject=TINY, settings=SETTINGS):
    return runner.measure(subject, settings, gate.Oracles(CPU))


def one_percent(function, **arguments):
    return function(**arguments) * 1.01


def crash(function, **arguments):
    raise RuntimeError("launch failed")


def plant(monkeypatch, fault):
    """Replaces the public function of squeeze_excite, for the benchmark, by a faulty one."""
    specs = dict(rows._specs())
    spec = specs["squeeze_excite"]
    function = functools.partial(fault, spec.function)
    specs["squeeze_excite"] = dataclasses.replace(spec, function=function)
    monkeypatch.setattr(rows, "_specs", lambda: specs)
