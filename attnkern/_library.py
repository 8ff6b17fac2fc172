"""The ``attnkern`` operator namespace of torch: schemas, fakes and implementations.

Schemas live here in Python, so the package imports, traces and falls back with no
compiled part.  Every implementation of an operator is an *overload* of it
(``squeeze_excite_fwd.native``, ``.triton``) with the same schema and fake.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attnkern import _native  # noqa: F401  (its kernels register as it loads)

NAMESPACE = "attnkern"
IMPLS = ("native", "triton")

_library = torch.library.Library(NAMESPACE, "DEF")

_kernels: set[tuple[str, str, str]] = set()
"""(operator, implementation, device type) of every kernel there is."""


def define(name: str, signature: str, fake: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Define ``attnkern::name`` once per implementation; return implementation -> overload."""
    overloads = {}
    for impl in IMPLS:
        _library.define(f"{name}.{impl}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{NAMESPACE}::{name}.{impl}", fake, lib=_library)
        overloads[impl] = getattr(getattr(torch.ops.attnkern, name), impl)
        for key in ("CPU", "CUDA"):
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}.{impl}", key):
                _kernels.add((name, impl, key.lower()))
    return overloads


def serves(name: str, impl: str, device_type: str) -> bool:
    """Whether ``attnkern::name.impl`` has been given a kernel for tensors on this kind of device."""
    return (name, impl, device_type) in _kernels


def implement(name: str, impl: str, kernel: Callable[..., Any], *keys: str) -> None:
    """Register a Python ``kernel`` for ``attnkern::name.impl`` under dispatch ``keys``."""
    for key in keys:
        _library.impl(f"{name}.{impl}", kernel, key)
        _kernels.add((name, impl, key.lower()))
