"""What launchers ask about a device."""

from __future__ import annotations

import functools

import torch


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; 8 for the interpreter, where small cases must split too."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count
