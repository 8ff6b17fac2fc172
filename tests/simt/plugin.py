"""pytest -p plugin: ``impl="native"`` on the CPU means the CUDA kernels on the emulator.

The property tests of tests/ then hold for the kernels that a GPU runs; a call takes the next seed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import run as simt

from attnkern import _select


def pytest_configure() -> None:
    torch.set_num_threads(1)

    def scheduled(device: simt.Device, operator: Callable[..., Any]) -> Callable[..., Any]:
        seeds = iter(range(1 << 30))

        def call(*arguments: Any) -> Any:
            device.configure(seed=next(seeds))
            return operator(*arguments)

        return call

    for module in simt.operators():
        emulated = module.Emulated.build()
        emulated.force = None
        for table, operator in emulated.operators():
            table["native"] = scheduled(emulated.device, operator)

    def refuse(
        impl: str, device: torch.device, dtype: torch.dtype, operator: str | None = None
    ) -> str | None:
        if impl != "native":
            return refuses(impl, device, dtype, operator)
        return "its CUDA kernels have no float64" if dtype == torch.float64 else None

    refuses, _select.refuse = _select.refuse, refuse
