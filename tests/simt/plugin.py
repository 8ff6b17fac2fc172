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
from squeeze_excite import Emulated

from attnkern import _select
from attnkern.ops.squeeze_excite import op


def pytest_configure() -> None:
    emulated = Emulated.build()
    emulated.force = None
    torch.set_num_threads(1)

    def scheduled(operator: Callable[..., Any]) -> Callable[..., Any]:
        seeds = iter(range(1 << 30))

        def call(*arguments: Any) -> Any:
            emulated.device.configure(seed=next(seeds))
            return operator(*arguments)

        return call

    op.squeeze_excite_fwd["native"] = scheduled(emulated.forward)
    op.squeeze_excite_bwd["native"] = scheduled(emulated.backward)
    op.squeeze_fwd["native"] = scheduled(emulated.squeeze)

    def refuse(
        impl: str, device: torch.device, dtype: torch.dtype, operator: str | None = None
    ) -> str | None:
        if impl != "native":
            return refuses(impl, device, dtype, operator)
        return "its CUDA kernels have no float64" if dtype == torch.float64 else None

    refuses, _select.refuse = _select.refuse, refuse
