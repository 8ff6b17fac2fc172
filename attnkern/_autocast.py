"""What ``torch.autocast`` means here, in one place, for operators and for the rules of libraries.

The kernels know nothing of autocast and sum in float32.  So it is kept out of the formulas that
stand for them, whose products it would lower; and where a stock layer's first product would have
lowered a map, the map is lowered before the call.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

# asked once: torch.compile of torch 2.11 cannot trace the question
_DEVICES = frozenset(d for d in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(d))


def enabled(x: Tensor) -> bool:
    """Whether autocast is on for x's device; torch refuses to be asked of one without it (meta)."""
    device = x.device.type
    return device in _DEVICES and torch.is_autocast_enabled(device)


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Keeps autocast out of formulas on x's device: their sums are in float32 as in the kernels."""
    if enabled(x):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def lowers_to(x: Tensor) -> torch.dtype | None:
    """What autocast lowers x to before a product; None where it does not."""
    if x.dtype == torch.float64 or not enabled(x):
        return None
    return torch.get_autocast_dtype(x.device.type)
