"""What ``python -m attnkern info`` shows: versions, devices and what serves which dtype."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from attnkern import _native, _select, testing
from attnkern._checks import DTYPES

IMPLS = _select.IMPLS[1:]


def environment() -> dict[str, str]:
    facts = {"attnkern": _version("attnkern"), "python": platform.python_version()}
    facts |= {name: _version(name) for name in ("torch", "triton")}
    facts["cpu"] = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            name = torch.cuda.get_device_name(index)
            facts[f"cuda:{index}"] = f"{name}, compute capability {major}.{minor}"
    else:
        built = torch.version.cuda
        facts["cuda"] = (
            f"no GPU (torch was built for CUDA {built})" if built else "not in this torch"
        )
    if _native.available:
        compiled: Any = _native._C
        facts["compiled part"] = ", ".join(
            f"{k} {v}" for k, v in compiled.build_info().items() if v != ""
        )
        facts["cpu kernels"] = f"{compiled.cpu_isa()} of {' '.join(compiled.cpu_isas())}"
    else:
        facts["compiled part"] = _native.reason
    return facts


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def devices() -> list[torch.device]:
    return [torch.device(name) for name in ("cpu", "cuda")][: 1 + torch.cuda.is_available()]


def served() -> list[tuple[str, ...]]:
    """(device, dtype, what "auto" runs, then per implementation "yes" or why not)."""
    rows = []
    for device in devices():
        for dtype in DTYPES:
            refusals = [_select.refuse(impl, device, dtype) for impl in IMPLS]
            auto = next(
                impl
                for impl in _select.ORDER[device.type]
                if _select.refuse(impl, device, dtype) is None
            )
            rows.append((device.type, _name(dtype), auto, *(r or "yes" for r in refusals)))
    return rows


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def probe() -> list[tuple[str, ...]]:
    """Runs a case of every operator, forward and backward, on every implementation that serves it.

    Rows: operator, device, dtype, implementation, and "ok" within the error budget against float64.
    """
    rows: list[tuple[str, ...]] = []
    for spec in testing.specs():
        case = spec.cases[0]
        for device in devices():
            for dtype in DTYPES:
                tensors = case.inputs(dtype, device)
                for impl in IMPLS:
                    if _select.refuse(impl, device, dtype, spec.operator) is not None:
                        continue
                    try:
                        testing.compare(spec, case, tensors, impl=impl)
                        verdict = "ok"
                    except Exception as error:
                        verdict = f"FAILED: {error}"
                    rows.append((spec.name, device.type, _name(dtype), impl, verdict))
    return rows
