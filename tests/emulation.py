"""``impl="native"`` of an operator on the CPU is its CUDA kernels, compiled by g++, on the emulator of tests/simt."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attnkern import _select, testing

sys.path.insert(0, str(Path(__file__).parent / "simt"))
import run as simt

needs_compiler = pytest.mark.skipif(simt.compiler() is None, reason="no g++ in CXX or on PATH")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _built(folder: str) -> Any:
    return importlib.import_module(folder).Emulated.build()


def emulated(folder: str) -> Any:
    """A fixture: the launchers of a folder of csrc/ops, emulated, serve its operators."""

    @pytest.fixture
    def launchers(monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.setattr(_select, "refuse", lambda *_: None)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # eager on these sizes: 2 threads take 5 times as long as one
        found = _built(folder)
        for table, operator in found.operators():
            monkeypatch.setitem(table, "native", operator)
        found.force, found.plans = {}, []
        found.device.configure()
        yield found
        torch.set_num_threads(threads)

    return launchers


def results(call: Any, dtype: torch.dtype = torch.float32) -> Any:
    tensors = call.case.inputs(dtype)
    return testing.run(call.spec.function, tensors, call.case.options, impl="native")


def check_schedules(launchers: Any, call: Any, dtype: torch.dtype, **device: int) -> None:
    """The same bits under two schedules of each kind: depth first, breadth first, random."""
    found = []
    for seed in range(6):
        launchers.device.configure(seed=seed, **device)
        found.append(results(call, dtype))
    for other in found[1:]:
        for (name, value), (_, same) in zip(found[0].items(), other.items(), strict=True):
            assert torch.equal(value, same), name
