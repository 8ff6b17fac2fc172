"""What the Triton launchers of softmax_pool choose from a shape: blocks, pieces, segments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from attnkern._triton.device import processors
from attnkern.ops.softmax_pool.op import rows_of
from attnkern.ops.softmax_pool.reference import Inputs

Arguments = dict[str, Any]
Segment = tuple[int, int, int, int]


class Shape(NamedTuple):
    batch: int  # samples or bags
    heads: int
    items: int  # of a sample; of all bags
    queries: int
    features: int
    units: int  # features of keys, hidden units of the gated scorer; 0 for given
    ragged: bool
    device: torch.device

    @property
    def sizes(self) -> Arguments:
        """Those that every kernel takes."""
        names = ("heads", "items", "queries", "features")
        return {name: getattr(self, name) for name in names}


def shape_of(i: Inputs) -> Shape:
    batch, heads, queries = rows_of(i)
    keys = i.values if i.keys is None else i.keys
    units = 0
    if i.V is not None:
        units = i.V.shape[0]
    elif i.scores is None:
        units = keys.shape[3]
    items, features = i.values.shape[2:]
    return Shape(
        batch, heads, items, queries, features, units, i.offsets is not None, i.values.device
    )


def power(size: int, low: int, high: int) -> int:
    """The smallest power of two that covers ``size``, within [low, high]."""
    return max(low, min(high, triton.next_power_of_2(max(size, 1))))


def aligned(x: Tensor) -> bool:
    """Whether rows of the items begin at multiples of 16 elements, which Triton vectorises for."""
    return all(n == 1 or s == 1 or s % 16 == 0 for n, s in zip(x.shape, x.stride(), strict=True))


def blocks(i: Inputs, shape: Shape, backward: bool = False) -> dict[str, int]:
    """Queries, items, features and key features of a tile; the backward has half the tile to spare.

    Loops are not pipelined: their addresses in flight made ptxas spill 50 to 300 bytes.  The gated
    scorer's tiles are those of its products.
    """
    if i.V is not None:
        block = _matrix_blocks(i.values, shape, "BLOCK_D")
        if backward and shape.queries > 1:
            block["BLOCK_D"] = 16  # dp, too, is a product: 32 spilled 8 to 80 bytes
        return block
    keys = i.values if i.keys is None else i.keys
    wide = aligned(i.values) and aligned(keys)
    additive = i.w is not None
    if shape.queries == 1:
        dot = shape.units and not additive
        exact = i.values.dtype == torch.float32
        elements = 2048 if wide else 1024
        if backward and (dot or (additive and exact)):
            elements = 512 if exact else 1024  # float32 spilled 8 to 16 bytes of 1024 on sm_90
        d = power(shape.features, 16, elements // 16)
        n = elements // d
        # half for the weights of dot, which with the peaks' places spilled 8 bytes on sm_90
        k = power(shape.units, 16, elements // n // (2 if additive or (dot and backward) else 1))
        warps = 8 if backward and (additive or dot) else 4
        block = {"BLOCK_M": 1, "BLOCK_N": n, "BLOCK_D": d, "BLOCK_K": k}
    else:
        most = (64 if wide else 32) // (2 if backward else 1)
        # scores and dp of 16-bit items are two products, which at full width spilled 8 to 96 bytes on sm_80
        twice = i.values.dtype != torch.float32
        most //= 2 if twice and most > 16 else 1
        d, k = power(shape.features, 16, most), power(shape.units, 16, most)
        warps = 8 if backward and (additive or not wide) else 4
        block = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_D": d, "BLOCK_K": k}
    return {**block, "num_warps": warps, "num_stages": 1}


def _matrix_blocks(x: Tensor, shape: Shape, step: str) -> dict[str, int]:
    """Tiles of the hidden layer's products, ``step`` features at a time, by eight warps.

    float32 products keep their operands in registers: half the step.  With 64 items a tile
    `hidden_grad_kernel` spilled 24 to 32 bytes on sm_90.
    """
    small = x.dtype == torch.float32
    return {
        "BLOCK_M": 1 if shape.queries == 1 else 16,
        "BLOCK_N": 32,
        "BLOCK_K": 32,
        step: 16 if small else 32,
        "num_warps": 8,
        "num_stages": 1,
    }


SPAN_BYTES = 64 << 10
"""Items of a piece whose program reads them twice: four programs a processor on 132 of them then
hold 35 MB, within an H100's L2 of 50 MB (an estimate, not measured)."""


def piece_tiles(i: Inputs, shape: Shape, block: dict[str, int]) -> int:
    """Tiles of the pieces that samples, or all bags alike, are cut into.

    Four programs a processor have work, and what is read again is still in cache; a piece has 16
    items a query at least, so that its partial sums take an eighth of 16-bit items at most.
    """
    rows = _rows(shape, block) * (1 if shape.ragged else shape.batch)
    wanted = triton.cdiv(4 * processors(shape.device), max(1, rows))
    if shape.units:
        width = shape.features + (shape.units if i.keys is not None else 0)
        cached = SPAN_BYTES // (width * i.values.element_size())
        least = max(block["BLOCK_N"], cached, 16 * shape.queries)
        wanted = max(wanted, triton.cdiv(shape.items, least))
    return max(1, triton.cdiv(triton.cdiv(shape.items, block["BLOCK_N"]), wanted))


def pieces(shape: Shape, length: int) -> int:
    """Pieces of all samples, or as many as bags of any lengths have (`row_of_pieces`)."""
    if shape.ragged:
        return shape.batch + shape.items // length if shape.batch else 0
    return shape.batch * max(1, triton.cdiv(shape.items, length))


def groups(shape: Shape, block: dict[str, int], pieces: int) -> int:
    """Programs that take the pieces in turn where all share a query, so that partial sums stay few."""
    return min(pieces, max(1, 4 * processors(shape.device) // _rows(shape, block)))


def merge_blocks(shape: Shape, length: int, features: int) -> dict[str, int]:
    """Tiles of the partial sums of a row: where one may have many pieces, more of them, as each step waits."""
    s = power(triton.cdiv(shape.items, length), 16, 64)
    return {"BLOCK_S": s, "BLOCK_D": power(features, 16, 1024 // s)}


def _rows(shape: Shape, block: dict[str, int]) -> int:
    """Programs that share a piece."""
    return shape.heads * triton.cdiv(shape.queries, block["BLOCK_M"])


def segments(shape: Shape, x: Tensor) -> list[Segment]:
    """(first sample, last, first item, last): parts whose hidden gradients fit the workspace.

    Three numbers an item and hidden unit take at most an eighth of x and at most 16 MB.
    """
    samples, items = x.shape[0], shape.items
    budget = min(1 << 24, max(1 << 17, x.numel() * x.element_size() // 8))
    most = max(64, budget // (12 * shape.units) // 64 * 64)
    if items <= most:
        step = max(1, most // max(items, 1))
        return [(b, min(b + step, samples), 0, items) for b in range(0, samples, step)]
    return [
        (b, b + 1, n, min(n + most, items)) for b in range(samples) for n in range(0, items, most)
    ]


def strided(name: str, t: Tensor | None) -> Arguments:
    """Items [B, H, N, D] and their strides.

    Those of sizes 1 are never read, and Triton knows 0 for a multiple of 16: by any other number it
    forgets that rows are aligned, and loads element by element.
    """
    axes = ("batch", "head", "item", "feature")
    if t is None:
        return {name: None, **{f"{name}_{axis}": 0 for axis in axes}}
    strides = [0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)]
    return {name: t, **{f"{name}_{axis}": s for axis, s in zip(axes, strides, strict=True)}}


def spread(x: Tensor, shape: Shape, scorer: str) -> list[dict[str, int]]:
    """Tiles of `items_kernel`, the heuristic first; where it multiplies matrices there is one."""
    if scorer == "gated":
        block = _matrix_blocks(x, shape, "BLOCK_F")
        return [{**block, "BLOCK_F": block["BLOCK_K"], "BLOCK_K": block["BLOCK_F"]}]
    fixed = {"BLOCK_K": 16, "num_stages": 1}
    if shape.queries > 1:
        return [{"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_F": 32, "num_warps": 4, **fixed}]
    f = power(x.shape[3], 16, 128)
    sizes = ((2048, 4), (1024, 4), (512, 4), (4096, 8))
    return [
        {"BLOCK_M": 1, "BLOCK_N": size // f, "BLOCK_F": f, "num_warps": warps, **fixed}
        for size, warps in sizes
    ]


def item_tiles(shape: Shape) -> int:
    """A tile a program, or two of a bag's, for which it has to search."""
    return 2 if shape.ragged else 1


def hidden_blocks(i: Inputs, shape: Shape) -> dict[str, int]:
    return _matrix_blocks(i.values, shape, "BLOCK_F")


def outer_blocks(rows: int, exact: bool) -> dict[str, int]:
    """Tiles of `outer_kernel`, smaller where products are in float32."""
    small = {"BLOCK_J": 32, "BLOCK_N": 16, "num_stages": 1}
    large = {"BLOCK_J": 64, "BLOCK_N": 32, "num_stages": 2}
    return {"BLOCK_I": power(rows, 16, 64), "num_warps": 8, **(small if exact else large)}


def outer_splits(shape: Shape, count: int, exact: bool) -> list[int]:
    """Splits of a segment of ``count`` items for dV, db_V, dU, db_U and dw."""

    def of(rows: int, cols: int, exact: bool) -> int:
        block = outer_blocks(rows, exact)
        tiles = triton.cdiv(rows, block["BLOCK_I"]) * triton.cdiv(cols, block["BLOCK_J"])
        wanted = triton.cdiv(4 * processors(shape.device), tiles)
        return max(1, min(wanted, triton.cdiv(count, block["BLOCK_N"])))

    projection = of(shape.units, shape.features, exact)
    return [*[projection] * 4, of(shape.queries, shape.units, True)]
