"""Where a position of one grid lies between the positions of another, as ``F.interpolate`` places it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def taps(
    given: Sequence[int],
    wanted: Sequence[int],
    mode: str,
    align_corners: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """For each of three dims in turn and each wanted position: two given positions and how much of each.

    Grids of fewer dims have ones before them.  Returns [sum(wanted), 2] int64, and [sum(wanted), 2] of ``dtype``.
    ``mode`` is "nearest" or any of the linear ones.
    """
    missing, others = (1,) * (3 - len(given)), (1,) * (len(given) - 1)
    index, weight = [], []
    for size, out in zip((*missing, *given), (*missing, *wanted), strict=True):
        if mode == "nearest":
            # torch's own, whose kernels differ in what they round: position 23 of 14 to 46 is 7 in float64 in 1-D and
            # 3-D, and 6 in 2-D and in float32, where 14 / 46 is rounded first
            line = torch.arange(size, device=device, dtype=dtype).view(1, 1, *others, size)
            below = F.interpolate(line, (*others, out), mode=mode).flatten()
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
