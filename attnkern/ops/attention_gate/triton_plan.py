"""What the Triton launchers of attention_gate choose from a shape: blocks, groups, runs, splits."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from attnkern import _layout
from attnkern._triton import LAUNCH
from attnkern._triton.device import processors

Arguments = dict[str, Any]
Three = tuple[int, ...]


class Patches(NamedTuple):
    """Patches of x, one for each position of the logits' grid."""

    batch: int
    kernel: Three
    x: Three

    @property
    def grid(self) -> Three:
        """Of the logits."""
        return tuple(size // k for size, k in zip(self.x, self.kernel, strict=True))

    @property
    def length(self) -> int:
        return math.prod(self.grid)

    def tiles(self, block_p: int) -> int:
        """Of a sample."""
        return triton.cdiv(self.length, block_p)

    def arguments(self, block_p: int) -> Arguments:
        (_, q2, q3), (_, x2, x3) = self.grid, self.x
        kernel = dict(zip(("K1", "K2", "K3"), self.kernel, strict=True))
        sizes = {"tiles": self.tiles(block_p), "length": self.length}
        return {**sizes, "q2": q2, "q3": q3, "x2": x2, "x3": x3, **kernel}

    def uncovered(self) -> list[tuple[int, int, int]]:
        """(dim of a map, first position, how many) that no whole patch covers."""
        edges = zip(range(2, 5), self.x, self.grid, self.kernel, strict=True)
        return [(dim, q * k, x - q * k) for dim, x, q, k in edges if q * k < x]


def patches(x: Tensor, kernel: Three) -> Patches:
    return Patches(x.shape[0], tuple(kernel), tuple(x.shape[2:]))


def strided(name: str, t: Tensor | None) -> Arguments:
    """A readable map and its strides; those of one channel or position are never used."""
    if t is None:
        return {name: None, **{f"{name}_{axis}": 0 for axis in ("batch", "channel", "position")}}
    channel, position = t.stride(1), 1
    if _layout.is_channels_last(t):
        spatial = zip(t.shape[:1:-1], t.stride()[:1:-1], strict=True)
        position = next((stride for size, stride in spatial if size != 1), t.shape[1])
    elif t.shape[1] == 1:
        channel = math.prod(t.shape[2:])
    strides = {"batch": t.stride(0), "channel": channel, "position": position}
    return {name: t, **{f"{name}_{axis}": stride for axis, stride in strides.items()}}


def power(size: int, low: int, high: int) -> int:
    """The smallest power of two that covers ``size``, within [low, high]."""
    return max(low, min(high, triton.next_power_of_2(max(size, 1))))


def blocks(
    x: Tensor,
    hidden: int,
    channels: int,
    p: Patches,
    *,
    resampled: bool = False,
    backward: bool = False,
) -> Arguments:
    """Positions, hidden channels and channels of a tile of the products, and options.

    theta and phi come from L2 once a program, so positions are many, unless that leaves processors idle.
    Forward [32, 64] by 128 threads fits their registers.  Where positions are scattered (patches, taps), and
    in backward, 256 threads share it, or it spilled 8 to 480 bytes; backward takes 16 channels at a time, and
    16 hidden ones where positions are scattered.
    """
    scattered, exact = resampled or math.prod(p.kernel) > 1, x.dtype == torch.float32
    wanted = triton.cdiv(p.batch * p.length, processors(x.device))
    block_p = power(min(wanted, p.length), 16, 64)
    return {
        "BLOCK_P": block_p,
        "BLOCK_F": power(hidden, 16, 16 if scattered and backward else 32),
        "BLOCK_C": power(channels, 16, 16 if backward or exact or block_p < 64 else 32),
        **LAUNCH,
        "num_warps": 8 if block_p == 64 and (scattered or backward) else 4,
        "num_stages": 1,
    }


def groups(tiles: int, block: Arguments, hidden: int, device: torch.device) -> tuple[int, int]:
    """(groups, tiles in each) of a sum over positions: four programs a processor."""
    wanted = triton.cdiv(4 * processors(device), triton.cdiv(hidden, block["BLOCK_F"]))
    each = max(1, triton.cdiv(tiles, wanted))
    return triton.cdiv(tiles, each), each


def elementwise(x: Tensor, channels: int, length: int, size: int, warps: int = 4) -> Arguments:
    """A tile of ``size`` elements, at most: rows of adjacent elements are its longer side."""
    last = _layout.is_channels_last(x)
    row, rows = (channels, length) if last else (length, channels)
    long = power(row, 16, 128 if size < 4096 else 256)
    short = power(rows, 8, size // long)
    p, c = (short, long) if last else (long, short)
    return {"BLOCK_P": p, "BLOCK_C": c, **LAUNCH, "num_warps": warps}


def apply_tiles(x: Tensor, channels: int, length: int) -> list[Arguments]:
    """Of `gate_apply_kernel`, the heuristic first."""
    found = [elementwise(x, channels, length, *size) for size in ((2048, 4), (1024, 4), (4096, 8))]
    return [block for index, block in enumerate(found) if block not in found[:index]]


def runs(tiles: int, tile: int, maps: int) -> list[tuple[int, int]]:
    """(first tile, the one after the last): runs whose hidden gradients, ``tile`` bytes a tile, fit the workspace.

    It is an eighth of the ``maps``' bytes, or 128 KB: with half as many hidden channels as channels, two runs.
    """
    most = max(1, max(1 << 17, maps // 8) // tile)
    return [(first, min(first + most, tiles)) for first in range(0, tiles, most)]


def weight_blocks(x: Tensor, hidden: int, channels: int, block_p: int) -> Arguments:
    """Tiles of `gate_weight_grad_kernel`, smaller where products are in float32."""
    exact = x.dtype == torch.float32
    f, c = power(hidden, 16, 64), power(channels, 16, 32 if exact else 64)
    return {
        "BLOCK_P": min(block_p, 16 if exact else 32),
        "BLOCK_F": f,
        "BLOCK_C": c,
        **LAUNCH,
        "num_warps": 8 if f * c > 1024 else 4,
        "num_stages": 1 if exact else 2,
    }


def weight_splits(steps: int, blocks: int, x: Tensor, out: Tensor) -> int:
    """Splits of ``steps`` tiles for ``blocks`` blocks of a gradient: four programs a processor.

    Their partial sums take no more than an eighth of x, or 128 KB.
    """
    most = max(1 << 17, x.numel() * x.element_size() // 8) // (4 * out.numel())
    wanted = triton.cdiv(4 * processors(x.device), blocks)
    return max(1, min(wanted, most, steps))
