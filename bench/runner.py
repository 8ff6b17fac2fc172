"""One subject at a time: gate it, then time it against its competitors."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnkern import _select, testing
from attnkern.testing import Tensors
from bench import clock, machine
from bench.gate import Oracles, Red, check, sentence
from bench.results import derive
from bench.rows import DTYPES, FORWARD, PASSES, Subject

PLAIN = "plain"  # the eager formulation that the tests hold the op to
Function = Callable[..., Any]
Sets = list[tuple[Tensors, list[Tensor]]]


@dataclass
class Settings:
    device: torch.device
    impls: tuple[str, ...]
    passes: tuple[str, ...] = PASSES
    seconds: float = 1.5  # of interleaved timing, per row and mode
    full: bool = False
    compile: bool = True
    copy_GBps: float = 0.0  # the machine's copy from memory
    say: Callable[[str], None] = lambda message: None


def measure(subject: Subject, settings: Settings, oracles: Oracles) -> list[dict[str, Any]]:
    """The rows of a subject, one per pass: gated, then timed.  A red gate leaves them untimed."""
    return _Measurement(subject, settings, oracles).rows()


class _Measurement:
    def __init__(self, subject: Subject, settings: Settings, oracles: Oracles):
        self.subject, self.settings, self.device = subject, settings, settings.device
        self.name = f"{subject.case.name} {subject.dtype} {subject.layout}"
        options, op = subject.case.options, subject.spec()
        settings.say(f"{self.name}: float64 oracle")
        self.expected = oracles.of(subject)
        forms = {PLAIN: op.eager, **subject.others}
        self.eager: dict[str, Function] = {
            name: functools.partial(form, **options) for name, form in forms.items()
        }
        settings.say(f"{self.name}: gate")
        self.gates: dict[str, dict[str, Any]] = {}
        self.ours: dict[str, Function] = {}
        self.passed: dict[str, testing.Result] = {}
        self.impls, self.notes = self._serving(op.operator)
        for impl in self.impls:
            self._gate(impl, functools.partial(op.function, **options, impl=impl))

    def _serving(self, operator: str) -> tuple[tuple[str, ...], list[str]]:
        """The implementations that have a kernel of this operator; the reference where none has."""
        dtype = DTYPES[self.subject.dtype]
        reasons = {
            impl: _select.refuse(impl, self.device, dtype, operator) for impl in self.settings.impls
        }
        serving = tuple(impl for impl, reason in reasons.items() if reason is None)
        notes = [f"{impl} is left out: {reason}" for impl, reason in reasons.items() if reason]
        if not serving:
            notes.append("no kernel can run here, these figures are of the reference")
        return serving or ("reference",), notes

    def _gate(self, name: str, function: Function, like: str | None = None) -> bool:
        try:
            ratio, result = check(function, self.expected, self.passed.get(like or ""))
        except Red as red:
            self.gates[name] = {"ok": False, "why": str(red)}
            return False
        self.gates[name] = {"ok": True, "ratio": ratio}
        if like is None:
            self.ours[name], self.passed[name] = function, result
        return True

    def rows(self) -> list[dict[str, Any]]:
        s, settings = self.subject, self.settings
        rows = [self._row(which) for which in s.passes if which in settings.passes]
        if not self.gates[self.impls[0]]["ok"]:
            return rows
        cache = machine.last_level_cache(self.device)
        self.sets = self._input_sets(3 * cache)
        compiled = self._compiled()
        for row in rows:
            which = row["pass"]
            calls = {name: self._bind(f, self.sets, which) for name, f in self.ours.items()}
            settings.say(f"{self.name}, {which}: choose the eager formulation")
            calls |= self._eager_calls(row)
            for name, function in compiled.items():
                settings.say(f"{self.name}, {which}: compile")
                if call := self._first_compiled(row, name, function):
                    calls[name] = call
            settings.say(f"{self.name}, {which}: time")
            measured = [n for n in calls if n != "eager, other layout"]
            row["peak_bytes"] = {n: peak_bytes(calls[n], self.device) for n in measured}
            self._time(row, calls | self._copies())
            derive(row, settings.copy_GBps, cache)
            roof = row["roof"]
            if roof and roof["in_memory"] and not s.only_reads:  # of the whole run's copies
                settings.copy_GBps = max(settings.copy_GBps, roof["copy_GBps"])
        return rows

    def _row(self, which: str) -> dict[str, Any]:
        s = self.subject
        return {
            "key": s.key(which),
            "op": s.op,
            "case": s.case.name,
            "shape": list(s.shape),
            "dtype": s.dtype,
            "layout": s.layout,
            "pass": which,
            "group": s.group,
            "map_bytes": s.map_bytes,
            "minimum_bytes": s.minimum_bytes(which),
            "impl": self.impls[0],
            "gate": self.gates,
            "formulation": None,
            "formulations": {},
            "times": {},
            "peak_bytes": {},
            "compile_seconds": {},
            "ratios": {},
            "roof": None,
            "refused": None,
            "notes": list(self.notes),
        }

    def _input_sets(self, total: int) -> Sets:
        """Copies of inputs and output gradients that together pass ``total`` bytes, to rotate."""
        e = self.expected
        size = sum(t.numel() * t.element_size() for t in (*e.tensors.values(), *e.grad_outputs))
        sets = []
        for i in range(min(max(2, -(-total // size)), 512)):
            factor = 1 + i / 1024  # other values in every set, the same distribution
            tensors = {n: (t.detach() * factor).requires_grad_() for n, t in e.tensors.items()}
            sets.append((tensors, [g.clone() for g in e.grad_outputs]))
        return sets

    def _bind(self, function: Function, sets: Sets, which: str) -> clock.Call:
        def forward(i: int) -> Any:
            with torch.no_grad():
                return function(**sets[i][0])

        def training(i: int) -> Any:
            tensors, grads = sets[i]
            outputs = testing.as_tuple(function(**tensors))
            return torch.autograd.grad(outputs, list(tensors.values()), grads)

        return forward if which == FORWARD else training

    def _eager_calls(self, row: dict[str, Any]) -> dict[str, clock.Call]:
        """The fastest formulation here, and the same in the other layout for grouped rows."""
        which = row["pass"]
        calls = {}
        for name, function in self.eager.items():
            call = self._bind(function, self.sets, which)
            try:
                call(0)
            except Exception as error:
                row["notes"].append(f"{name} left out: {sentence(error)}")
                continue
            calls[name] = call
        row["formulations"] = self._formulation_times(calls)
        best = row["formulation"] = min(row["formulations"], key=row["formulations"].__getitem__)
        found = {"eager": calls[best]}
        if self.subject.group and self.subject.shape[0] > 1 and self.subject.layout != "items":
            other = [self._other_layout(tensors, grads) for tensors, grads in self.sets]
            found["eager, other layout"] = self._bind(self.eager[best], other, which)
        return found

    def _other_layout(self, tensors: Tensors, grads: list[Tensor]) -> tuple[Tensors, list[Tensor]]:
        def turn(t: Tensor) -> Tensor:
            t = t.detach()
            return t.contiguous() if self.subject.channels_last else testing.to_channels_last(t)

        maps = self.subject.case.maps
        turned = {
            n: (turn(t) if n in maps else t.detach()).requires_grad_() for n, t in tensors.items()
        }
        return turned, [turn(g) if g.dim() > 3 else g for g in grads]

    def _formulation_times(self, calls: dict[str, clock.Call]) -> dict[str, float]:
        """Seconds of every formulation; nothing to measure where there is one."""
        if len(calls) == 1:
            return dict.fromkeys(calls, 0.0)
        rotation = clock.Rotation(len(self.sets))
        samplers = {n: clock.sampler(call, rotation, self.device) for n, call in calls.items()}
        times = clock.interleave(samplers, 0.2, least=3)
        return {name: stats.median for name, stats in times.items()}

    def _compiled(self) -> dict[str, Function]:
        """torch.compile of eager and of ours; nothing is compiled before the first call."""
        if not (self.settings.compile and (self.settings.full or self.subject.compile)):
            return {}
        torch.compiler.reset()
        build = functools.partial(torch.compile, dynamic=False, fullgraph=True)
        eager = self.eager[PLAIN]
        found = {"compile": build(eager)}
        if self.device.type == "cuda" and self.subject.quick:
            found["compile, max-autotune"] = build(eager, mode="max-autotune-no-cudagraphs")
        for name, function in self.ours.items():
            found[f"{name}, in compile"] = build(function)
        return found

    def _first_compiled(
        self, row: dict[str, Any], name: str, function: Function
    ) -> clock.Call | None:
        """Compiles, counts the seconds, gates ours; a failure leaves the column out, with why."""
        call = self._bind(function, self.sets, row["pass"])
        start = time.perf_counter()
        try:
            call(0)
        except Exception as error:
            row["notes"].append(f"{name} left out: {sentence(error)}")
            return None
        row["compile_seconds"][name] = time.perf_counter() - start
        impl = name.removesuffix(", in compile")
        if impl != name and name not in self.gates:
            self._gate(name, function, like=impl)
        return call if self.gates.get(name, {"ok": True})["ok"] else None

    def _copies(self) -> dict[str, clock.Call]:
        """One read and one write of what moves: into fresh results as an op does, and past the cache."""
        sets = [[tensors[n].detach() for n in self.subject.moved] for tensors, _ in self.sets]
        calls: dict[str, clock.Call] = {"copy": lambda i: [x.clone() for x in sets[i]]}
        if self.device.type == "cpu" and self.subject.map_bytes > 64 << 20:
            outs = [torch.empty_like(x) for x in sets[0]]
            calls["copy, streaming"] = lambda i: [
                machine.streaming_copy(out, x) for out, x in zip(outs, sets[i], strict=True)
            ]
        if self.subject.only_reads:
            calls["read"] = lambda i: [machine.read(x) for x in sets[i]]
        return calls

    def _time(self, row: dict[str, Any], calls: dict[str, clock.Call]) -> None:
        """cold: sets past three times the cache; hot: one set; launched: outside a CUDA graph."""
        modes = {"cold": list(calls)}
        if self.subject.map_bytes < machine.last_level_cache(self.device):
            modes["hot"] = list(calls)
        if self.device.type == "cuda" and self.subject.shape[0] == 1:
            modes["launched"] = ["eager", *self.ours]
        for mode, names in modes.items():
            sets = len(self.sets) if mode != "hot" else 1
            rotation = clock.Rotation(sets)
            samplers = {n: self._sampler(row, n, calls[n], rotation, mode) for n in names}
            share = self.settings.seconds * (1 if mode == "cold" else 0.5)
            for name, stats in clock.interleave(samplers, share).items():
                row["times"].setdefault(name, {})[mode] = stats.dict()

    def _sampler(
        self, row: dict[str, Any], name: str, call: clock.Call, sets: clock.Rotation, mode: str
    ) -> Callable[[], float]:
        try:
            return clock.sampler(call, sets, self.device, mode)
        except RuntimeError as error:
            if self.device.type != "cuda":
                raise
            row["notes"].append(
                f"{name} is timed launched, it cannot be captured: {sentence(error)}"
            )
            return clock.sampler(call, sets, self.device, "launched")


def peak_bytes(call: clock.Call, device: torch.device) -> int | None:
    """The most memory one call holds at once beyond its inputs, its results included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(0)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call(0)
    kineto = recorded.profiler.kineto_results if recorded.profiler else None
    if kineto is None:
        return None
    held = most = 0
    events = [e for e in kineto.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
