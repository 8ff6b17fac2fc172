"""What a real run is given and what it hands back: claims, figures, eager beside ours, pictures."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import bench.runs
from bench import clock
from bench.runner import peak_bytes
from bench.screen import megabytes, milliseconds


@dataclass(frozen=True)
class Settings:
    out: Path  # where pictures go
    impl: str = "auto"
    quick: bool = False  # the size that the tests run
    seed: int = 0
    seconds: float = 1.0  # of timing per comparison
    say: Callable[[str], None] = lambda message: None


@dataclass(frozen=True)
class Claim:
    """What the run shows, as a figure that must reach ``limit``, or must not pass it."""

    what: str
    value: float
    limit: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.at_most else self.value >= self.limit


@dataclass(frozen=True)
class Cost:
    seconds: float  # median
    peak_bytes: int | None  # held at once beyond the inputs


@dataclass
class Outcome:
    claims: list[Claim]
    figures: dict[str, Any] = field(default_factory=dict)
    costs: dict[str, dict[str, Cost]] = field(default_factory=dict)  # of what: eager, ours
    pictures: list[Path] = field(default_factory=list)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1, default=str) + "\n")


@functools.cache
def runs() -> dict[str, ModuleType]:
    """Every run by name; a module has ``run(settings)`` and the packages it ``NEEDS``."""
    return {
        module.name: importlib.import_module(f"bench.runs.{module.name}")
        for module in pkgutil.iter_modules(bench.runs.__path__)
    }


def compare(settings: Settings, calls: Mapping[str, Callable[[], Any]]) -> dict[str, Cost]:
    """Time, interleaved, and peak memory of competitors that do the same; ours is named "ours"."""
    device = torch.device("cpu")
    bound = {name: functools.partial(_ignoring, call) for name, call in calls.items()}
    peaks = {name: peak_bytes(call, device) for name, call in bound.items()}
    samplers = {
        name: clock.sampler(call, clock.Rotation(1), device) for name, call in bound.items()
    }
    times = clock.interleave(samplers, settings.seconds, least=3)
    return {name: Cost(times[name].median, peaks[name]) for name in calls}


def _ignoring(call: Callable[[], Any], i: int) -> Any:
    return call()


def lines(outcome: Outcome) -> list[str]:
    """The outcome as it is printed."""
    found = [
        f"{'met' if c.met else 'MISSED':<6} {c.what}: {c.value:.4g} (at {'most' if c.at_most else 'least'} {c.limit:g})"
        for c in outcome.claims
    ]
    found += [
        f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}"
        for name, value in outcome.figures.items()
    ]
    for what, costs in outcome.costs.items():
        ours = costs["ours"]
        parts = []
        for name, cost in costs.items():
            part = f"{name} {milliseconds(cost.seconds)} ms, {megabytes(cost.peak_bytes)} MB"
            if name != "ours":
                part += f" ({cost.seconds / ours.seconds:.2f} x the time of ours"
                if cost.peak_bytes is not None and ours.peak_bytes is not None:
                    part += f", {megabytes(cost.peak_bytes - ours.peak_bytes)} MB more"
                part += ")"
            parts.append(part)
        found.append(f"{what}: {'; '.join(parts)}")
    return found + [f"picture: {path}" for path in outcome.pictures]
