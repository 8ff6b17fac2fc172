"""What the Triton launchers of squeeze_excite choose from a shape: tiles, splits, strategy."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from attnkern import _layout
from attnkern._triton import LAUNCH
from attnkern._triton.device import processors
from attnkern._triton.linear import Layer

Arguments = dict[str, Any]


class Shape(NamedTuple):
    batch: int
    channels: int
    length: int
    channels_last: bool

    @property
    def rows(self) -> int:
        return self.length if self.channels_last else self.channels

    @property
    def cols(self) -> int:
        return self.channels if self.channels_last else self.length


def shape_of(x: Tensor) -> Shape:
    return Shape(x.shape[0], x.shape[1], math.prod(x.shape[2:]), _layout.is_channels_last(x))


def strided(name: str, t: Tensor | None, channels_last: bool) -> Arguments:
    """A readable map and its strides; a row is a position channels last, else a channel."""
    if t is None:
        return {name: None, f"{name}_batch": 0, f"{name}_row": 0}
    row = t.stride(1)
    if channels_last:
        spatial = zip(t.shape[:1:-1], t.stride()[:1:-1], strict=True)
        row = next((stride for size, stride in spatial if size != 1), t.shape[1])
    return {name: t, f"{name}_batch": t.stride(0), f"{name}_row": row}


def _cover(size: int, low: int, high: int) -> int:
    """The largest power of two in [low, high] whose tiles cover ``size`` within 5/4 of the best."""
    powers = [1 << p for p in range(low.bit_length() - 1, high.bit_length())]
    padded = {n: triton.cdiv(size, n) * n for n in powers}
    return max(n for n in powers if 4 * padded[n] <= 5 * min(padded.values()))


def tile(shape: Shape, elements: int) -> dict[str, int]:
    """ROWS x COLS of at most ``elements``; 512 columns are contiguous enough for any dtype.

    Half of that where rows are not multiples of 16, the alignment Triton vectorises for: an address
    an element takes two registers (7x7, bf16: 218 registers a thread for 4096 elements).
    """
    if shape.cols % 16:
        elements //= 2
    cols = _cover(shape.cols, 8, 512)
    return {"ROWS": _cover(shape.rows, 1, elements // cols), "COLS": cols}


@functools.lru_cache(1024)
def elementwise(shape: Shape, elements: int) -> list[Arguments]:
    """Tiles and options among which kernels that sum nothing may be tuned, the heuristic first.

    No thread owns more elements than the heuristic gives it, so none needs more registers.
    """
    sizes = ((elements, 4), (elements // 2, 4), (elements // 4, 4), (2 * elements, 8))
    found = [{**tile(shape, size), **LAUNCH, "num_warps": warps} for size, warps in sizes]
    return [blocks for index, blocks in enumerate(found) if blocks not in found[:index]]


def grid(shape: Shape, tile: dict[str, int]) -> tuple[int]:
    tiles = triton.cdiv(shape.rows, tile["ROWS"]) * triton.cdiv(shape.cols, tile["COLS"])
    return (shape.batch * tiles,)


def splits(shape: Shape, tile: dict[str, int], device: torch.device) -> tuple[int, int, int]:
    """(channel blocks, splits, positions a split) of a reduction over positions.

    Four programs a processor hide each other's latency; splits beyond that only add partial sums.
    """
    channels, positions = tile["ROWS"], tile["COLS"]
    if shape.channels_last:
        channels, positions = positions, channels
    blocks, steps = triton.cdiv(shape.channels, channels), triton.cdiv(shape.length, positions)
    wanted = triton.cdiv(4 * processors(device), shape.batch * blocks)
    chunk = triton.cdiv(steps, min(wanted, steps))
    return blocks, triton.cdiv(steps, chunk), chunk * positions


SAMPLE_ELEMENTS = 1 << 16
SAMPLE_WEIGHTS = 1 << 17
"""The largest sample, and the most weights, for which one program does all.

A processor's L1 keeps 64 Ki 16-bit elements beside their output.  128 Ki weights of 16 bits take
4000 clocks from L2 at 64 bytes each, about what three launches cost: an estimate, not measured.
"""


def sample_blocks(shape: Shape, layers: list[Layer]) -> Arguments | None:
    """Tiles and options of a program that owns a sample, or None where it should not.

    16 elements a thread, 8 where rows are not aligned: with twice that ptxas spilled 128 bytes.
    """
    weights = sum(layer.weight.numel() for layer in layers)
    size = shape.channels * shape.length
    if not layers or size > SAMPLE_ELEMENTS or weights > SAMPLE_WEIGHTS:
        return None
    warps = 4 if size <= 4096 else 8
    hidden = layers[-1].weight.shape[1]
    return {
        **tile(shape, 512 * warps),
        "BLOCK": 512 * warps,
        "BLOCK_C": min(512, max(32, triton.next_power_of_2(shape.channels))),
        "BLOCK_R": min(512, max(32, triton.next_power_of_2(hidden))),
        **LAUNCH,
        "num_warps": warps,
    }
