"""What every property test shares: the targets (implementation x device) this process can run, and poison.

A test that takes ``target`` runs once per target, one that takes ``call`` once per case of every
operator that the target has a kernel for, one that takes ``dtype`` once per dtype it serves.
``--impl triton`` narrows the targets, as does a process of its own with ``TRITON_INTERPRET=1``
(Triton on the CPU).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch._inductor.decomposition  # torch 2.11 cannot import it for the first time during an export

from attnkern import _native, _once, _select, testing
from attnkern._checks import DTYPES


@dataclass(frozen=True)
class Target:
    impl: str
    device: str

    def serves(self, dtype: torch.dtype | None = None, call: Call | None = None) -> bool:
        operator = call.spec.operator if call else None
        device = torch.device(self.device)
        return _select.refuse(self.impl, device, dtype or torch.float32, operator) is None

    def __str__(self) -> str:
        return f"{self.impl}-{self.device}"


@dataclass(frozen=True)
class Call:
    """One case of one operator."""

    spec: testing.OpSpec
    case: testing.Case

    def __str__(self) -> str:
        return f"{self.spec.name}-{self.case.name}"

    def inputs(
        self, target: Target, dtype: torch.dtype = torch.float32, **options: Any
    ) -> testing.Tensors:
        return self.case.inputs(dtype, target.device, **options)

    def run(self, target: Target, tensors: testing.Tensors, **options: Any) -> Any:
        return self.spec.function(**tensors, **{**self.case.options, **options}, impl=target.impl)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What modules say once, each time they say it."""
    texts: list[str] = []
    monkeypatch.setattr(_once, "_said", set())
    warn = _once.warnings.warn

    def record(text: Any, *rest: Any, **named: Any) -> None:
        if " is computed layer by layer: " in str(text):
            texts.append(text)
        else:
            warn(text, *rest, **named)

    monkeypatch.setattr(_once.warnings, "warn", record)
    return texts


DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
TARGETS = [
    target
    for device in DEVICES
    for impl in ("reference", "native", "triton")
    if (target := Target(impl, device)).serves(torch.float32)
]
CALLS = [Call(spec, case) for spec in testing.specs() for case in spec.cases]


def calls(*names: str) -> list[Call]:
    """The cases of these names, for tests that need a kind of case rather than all of them."""
    chosen = [call for call in CALLS if call.case.name in names]
    assert {call.case.name for call in chosen} == set(names)
    return chosen


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--impl", default="", help="only these implementations, comma-separated")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "minutes: takes minutes; parallel workers begin with it")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Spreads tests of minutes over the workers' first tests; last, they would leave workers idle.

    ``--dist worksteal`` gives each worker an equal run of the list, and lets the idle steal from the end.
    """
    if not hasattr(config, "workerinput"):
        return
    workers, total = config.workerinput["workercount"], len(items)
    long = [item for item in items if item.get_closest_marker("minutes")]
    items[:] = [item for item in items if item not in long]
    for index, item in enumerate(long):
        items.insert(index % workers * total // workers, item)


def pytest_report_header(config: pytest.Config) -> str:
    built = _native._C.build_info() if _native.available else _native.reason
    return f"attnkern: {', '.join(map(str, TARGETS))}; compiled part: {built}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = metafunc.fixturenames
    wanted = [name for name in metafunc.config.getoption("--impl").split(",") if name]
    explicit = {m.args[0] for m in metafunc.definition.iter_markers("parametrize")}
    choices = {
        "target": [t for t in TARGETS if not wanted or t.impl in wanted],
        "dtype": DTYPES if "target" in names else (),
        "call": CALLS,
    }
    chosen = [n for n in choices if n in names and n not in explicit and choices[n]]
    if not chosen:
        return
    rows = []
    for row in itertools.product(*(choices[n] for n in chosen)):
        named = dict(zip(chosen, row, strict=True))
        if "target" not in named or named["target"].serves(named.get("dtype"), named.get("call")):
            rows.append(row)
    ids = ["-".join(str(v).removeprefix("torch.") for v in row) for row in rows]
    metafunc.parametrize(chosen, rows, ids=ids)


@pytest.fixture(autouse=True)
def poison() -> Any:
    """Every fresh allocation, from Python or C++, holds NaN (or the largest integer) until written.

    ``warn_only``: some of torch's own backward passes have no deterministic form on CUDA, and what
    is wanted here is the filling alone.
    """
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if _native.available:  # its CPU kernels allocate past torch's filling
        _native._C.poison_fresh_memory(True)
    yield
    if _native.available:
        _native._C.poison_fresh_memory(False)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled
