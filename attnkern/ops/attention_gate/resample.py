"""Where a position of one grid lies between the positions of another, as ``F.interpolate`` places it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def taps(
    given: Sequence[int],
    wanted: Sequence[int],
    mode: str,
    align_corners: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """For each dim in turn and each wanted position: two given positions and how much of each.

    Returns [sum(wanted), 2] int64, and [sum(wanted), 2] of ``dtype``.
    ``mode`` is "nearest" or any of the linear ones.
    """
    index, weight = [], []
    for size, out in zip(given, wanted, strict=True):
        if mode == "nearest":
            # float32 throughout, as torch: 7 * (3 / 21) is below 1 there
            position = torch.arange(out, device=device, dtype=torch.float32)
            below = (position * (size / out)).floor()
            above, part = below, torch.zeros_like(below)
        else:
            position = torch.arange(out, device=device, dtype=torch.float64)
            if align_corners:
                position = position * ((size - 1) / max(out - 1, 1))
            else:
                position = ((position + 0.5) * (size / out) - 0.5).clamp(min=0)
            below = position.floor().clamp(max=size - 1)
            above, part = below + 1, position - below
        index.append(torch.stack([below, above], 1).long().clamp(max=size - 1))
        weight.append(torch.stack([1 - part, part], 1).to(dtype))
    return torch.cat(index), torch.cat(weight)
