"""Chooses the implementation of a call from metadata alone: device, dtype, what is installed.

An explicit ``impl=`` never falls back: what it cannot serve raises with each implementation's
reason.  ``impl="auto"`` walks a fixed order per device and says once when it ends at the
reference.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import torch
from torch._C import _are_functorch_transforms_active as _functorch_active
from torch.autograd import forward_ad

from attnkern import _library, _native
from attnkern._once import say_once

IMPLS = ("auto", *_library.IMPLS, "reference")
ORDER = {"cuda": ("native", "triton", "reference"), "cpu": ("native", "reference")}


def _environment() -> str:
    impl = os.environ.get("ATTNKERN_IMPL", "auto")
    if impl not in IMPLS:
        raise ValueError(f"attnkern: ATTNKERN_IMPL must be one of {', '.join(IMPLS)}, got {impl!r}")
    return impl


auto = _environment()
"""What ``impl="auto"`` means now, by ATTNKERN_IMPL and `use_impl`."""

_interpreting = os.environ.get("TRITON_INTERPRET", "0") == "1"
_has_triton = importlib.util.find_spec("triton") is not None


@contextlib.contextmanager
def use_impl(impl: str) -> Iterator[None]:
    """Make ``impl`` what ``impl="auto"`` means inside the block, for every thread.

    >>> with attnkern.use_impl("reference"):
    ...     y = model(x)
    """
    global auto
    if impl not in IMPLS:
        raise ValueError(f"use_impl: impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    previous, auto = auto, impl
    try:
        yield
    finally:
        auto = previous


def requested(impl: str) -> str:
    """What ``impl`` means now: "auto" may have been narrowed."""
    return auto if impl == "auto" else impl


def transforming() -> bool:
    """Whether a torch.func transform (vmap, grad, jvp) or forward-mode differentiation is active."""
    return _functorch_active() or forward_ad._current_level >= 0


def refuse(
    impl: str, device: torch.device, dtype: torch.dtype, operator: str | None = None
) -> str | None:
    """Why ``impl`` cannot serve ``dtype`` tensors on ``device`` (with ``operator``); None when it can."""
    if impl == "reference":
        return None
    reason = _refuse_any(impl, device, dtype)
    if reason is None and operator and not _library.serves(operator, impl, device.type):
        return f"it has no kernel of this operator for device {device.type}"
    return reason


def _refuse_any(impl: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if not torch.compiler.is_compiling() and transforming():
        return (
            "torch.func transforms and forward-mode differentiation pass through PyTorch code only"
        )
    if impl == "native":
        if not _native.available:
            return _native.reason
        if device.type == "cpu":
            return None
        if device.type != "cuda":
            return f"it has no kernels for device {device.type}"
        if not _native.has_cuda:
            return "attnkern was built without CUDA (no nvcc was found); rebuild with one"
        if not torch.cuda.is_available():
            return "no CUDA device is available"
        if torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs compute capability 8.0 or newer"
        return "its CUDA kernels have no float64" if dtype == torch.float64 else None
    if not _has_triton:
        return "the package triton is not installed"
    if device.type != "cuda" and not (device.type == "cpu" and _interpreting):
        return f"Triton has no kernels for device {device.type} (set TRITON_INTERPRET=1 to interpret on CPU)"
    return "its kernels have no float64" if dtype == torch.float64 else None


def select(
    op: str, impl: str, device: torch.device, dtype: torch.dtype, operator: str | None = None
) -> str:
    """The implementation that runs ``op`` (by ``operator``); ValueError when ``impl`` cannot serve it."""
    impl = requested(impl)
    if impl != "auto":
        reason = refuse(impl, device, dtype, operator) if impl in IMPLS else "unknown"
        if reason is None:
            return impl
        if reason == "unknown":
            raise ValueError(f"{op}: impl must be one of {', '.join(IMPLS)}, got {impl!r}")
        others = "; ".join(
            f"{other}: {refuse(other, device, dtype, operator) or 'can serve it'}"
            for other in IMPLS[1:]
            if other != impl
        )
        raise ValueError(
            f"{op}: impl={impl!r} cannot serve {dtype} on {device.type}: {reason}. Others: {others}"
        )
    for impl in ORDER.get(device.type, ("reference",)):
        if refuse(impl, device, dtype, operator) is None:
            break
    if impl == "reference" and device.type != "meta":
        say_once(lambda: _why_reference(op, device, dtype, operator))
    return impl


def _why_reference(op: str, device: torch.device, dtype: torch.dtype, operator: str | None) -> str:
    reasons = "; ".join(
        f"{impl}: {refuse(impl, device, dtype, operator)}"
        for impl in ORDER.get(device.type, ("native", "triton"))
        if impl != "reference"
    )
    return f"{op} runs its reference implementation for {dtype} on {device.type}: {reasons}"
