"""Interleaved timing: every competitor gets one sample in each round, A B C A B C."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

Call = Callable[[int], Any]
"""Runs a competitor once on input set i."""

SAMPLE_SECONDS = (
    2e-3  # a sample repeats its call until it lasts this long: a clock read costs 0.1 us
)


@dataclass(frozen=True)
class Stats:
    """Seconds per call: median, quartiles, fastest, number of samples."""

    median: float
    q1: float
    q3: float
    fastest: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Stats:
        q1, median, q3 = (
            statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        )
        return cls(median, q1, q3, min(values), len(values))

    def dict(self) -> dict[str, float]:
        return asdict(self)


def spread(stats: Mapping[str, float]) -> float:
    """Interquartile range over the median."""
    return (stats["q3"] - stats["q1"]) / stats["median"] if stats["median"] else 0.0


def interleave(
    samplers: Mapping[str, Callable[[], float]], seconds: float, least: int = 5, most: int = 200
) -> dict[str, Stats]:
    """Rounds of one sample each until ``seconds`` have passed, between ``least`` and ``most``."""
    values: dict[str, list[float]] = {name: [] for name in samplers}
    end = time.perf_counter() + seconds
    for i in range(most):
        if i >= least and time.perf_counter() > end:
            break
        for name, sample in samplers.items():
            values[name].append(sample())
    return {name: Stats.of(v) for name, v in values.items()}


class Rotation:
    """The input sets of a row, which its competitors take in turn.

    One position for all: were each to walk the sets from its own, the second would find in cache what
    the first read from memory.
    """

    def __init__(self, sets: int):
        self.sets, self.position = sets, 0

    def take(self, count: int) -> list[int]:
        """The next ``count`` sets."""
        taken = [(self.position + i) % self.sets for i in range(count)]
        self.position = (self.position + count) % self.sets
        return taken


def sampler(
    call: Call, rotation: Rotation, device: torch.device, mode: str = "cold"
) -> Callable[[], float]:
    """A function that times ``call`` over rotating input sets and returns seconds per call.

    On a CPU it is the host clock; on a GPU the replay of a CUDA graph that holds one call per set
    (``mode="launched"``: plain launches between two events, launch gaps included).
    """
    for i in rotation.take(min(rotation.sets, 3)):  # caches, lazy initialisation, autotuning
        call(i)
    if device.type == "cuda":
        graph = None if mode == "launched" else _capture(call, rotation.sets)
        return _events(call, rotation.sets, graph)
    start = time.perf_counter()
    call(0)
    repeats = max(1, round(SAMPLE_SECONDS / (time.perf_counter() - start)))

    def sample() -> float:
        sets = rotation.take(repeats)
        start = time.perf_counter()
        for i in sets:
            call(i)
        return (time.perf_counter() - start) / repeats

    return sample


def _capture(call: Call, sets: int) -> tuple[Any, int]:
    """A CUDA graph of one call per set, at least 8 so that the replay itself does not show."""
    calls = max(sets, 8)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(2):
            call(i % sets)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i % sets)
    return graph, calls


def _events(call: Call, sets: int, captured: tuple[Any, int] | None) -> Callable[[], float]:
    graph, calls = captured or (None, 50)
    if graph is None:  # fewer of what takes long, at least one
        torch.cuda.synchronize()
        start = time.perf_counter()
        call(0)
        torch.cuda.synchronize()
        calls = min(calls, max(1, round(10 * SAMPLE_SECONDS / (time.perf_counter() - start))))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        torch.cuda.synchronize()
        begin.record()
        if graph is not None:
            graph.replay()
        else:
            for i in range(calls):
                call(i % sets)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / calls

    return sample
