"""What is measured: subjects (an op, its sizes, dtype and layout) in passes, and the targets."""

from __future__ import annotations

import functools
import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import bench.ops
from attnkern.testing import Case, OpSpec, specs

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
FORWARD, TRAINING = "forward", "forward+backward"
PASSES = (FORWARD, TRAINING)


@dataclass(frozen=True)
class Subject:
    """One op at one size, dtype and layout; its passes share tensors and the gate.

    ``trips``: the fewest reads and writes of ``moved`` each pass needs, on-chip minimum; a fraction
    where maps of another size move too.
    ``others``: ways users write the op in stock torch, beside the spec's ``eager``; the fastest of
    all is the baseline.
    ``group``: which targets it counts towards; empty for a row that is shown beside them.
    ``quick``: part of the default run.  ``compile``: the default run pays for its torch.compile.
    """

    op: str
    case: Case
    dtype: str
    trips: Mapping[str, float]
    channels_last: bool = False
    group: str = ""
    quick: bool = True
    compile: bool = True
    passes: tuple[str, ...] = PASSES
    moved: tuple[str, ...] = ("x",)
    others: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    @property
    def layout(self) -> str:
        if len(self.shape) < 4:
            return "items"
        return "channels_last" if self.channels_last else "channels_first"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.case.shapes[self.moved[0]]

    @property
    def map_bytes(self) -> int:
        size = sum(math.prod(self.case.shapes[name]) for name in self.moved)
        return size * DTYPES[self.dtype].itemsize

    @property
    def only_reads(self) -> bool:
        """Whether the forward pass writes no map, so that a plain read is its roof, not a copy."""
        return self.trips[FORWARD] == 1

    def minimum_bytes(self, which: str) -> int:
        """Bytes no implementation can avoid: maps, and weights once (training: twice, plus dw)."""
        weights = sum(math.prod(s) for n, s in self.case.shapes.items() if n not in self.case.maps)
        weights *= DTYPES[self.dtype].itemsize * (3 if which == TRAINING else 1)
        return round(self.trips[which] * self.map_bytes) + weights

    def key(self, which: str) -> str:
        return f"{self.op}/{self.case.name}/{self.dtype}/{self.layout}/{which}"

    def spec(self) -> OpSpec:
        return _specs()[self.op]


@dataclass(frozen=True)
class Target:
    """Least geometric means over the subjects of a group (none under 1), as DESIGN.md sets them."""

    group: str
    which: str
    dtypes: tuple[str, ...]
    eager: float
    compile: float
    roof: float | None = None

    @property
    def label(self) -> str:
        return f"{self.group}, {self.which}, {' '.join(self.dtypes)}"


@dataclass(frozen=True)
class OpBench:
    """What ``bench/ops/<op>.py`` exports as ``BENCH``."""

    subjects: Mapping[str, list[Subject]]  # by device type
    targets: Mapping[str, list[Target]]


@functools.cache
def _specs() -> dict[str, OpSpec]:
    return {spec.name: spec for spec in specs()}


@functools.cache
def benches() -> dict[str, OpBench]:
    return {
        module.name: importlib.import_module(f"bench.ops.{module.name}").BENCH
        for module in pkgutil.iter_modules(bench.ops.__path__)
    }
