"""squeeze_excite in Triton, the portable GPU path: launchers of the kernels beside it.

Forward: pool (reads x), the MLP, rescale (reads x and the residual, writes y).
Backward: reduce (reads dy and x), the MLP's gradients, apply (reads dy, writes dx).
Tiles are chosen from the shape.  Nothing is summed by atomics, so results repeat bit for bit.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from attnkern import _layout
from attnkern._triton import LAUNCH
from attnkern._triton.linear import Layer, sum_rows
from attnkern.ops.squeeze_excite.reference import Options
from attnkern.ops.squeeze_excite.triton_backward import (
    apply_grad_kernel,
    logits_grad_kernel,
    reduce_kernel,
)
from attnkern.ops.squeeze_excite.triton_forward import pool_kernel, rescale_kernel

Arguments = dict[str, Any]

# ------------------------------------------------------------------ shapes and tiles


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


def _shape(x: Tensor) -> Shape:
    return Shape(x.shape[0], x.shape[1], math.prod(x.shape[2:]), _layout.is_channels_last(x))


def _map(name: str, t: Tensor | None, channels_last: bool) -> Arguments:
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


def _tile(shape: Shape, elements: int) -> dict[str, int]:
    """ROWS x COLS of at most ``elements``; 512 columns are contiguous enough for any dtype.

    Half of that where rows are not multiples of 16, the alignment Triton vectorises for: an address
    an element takes two registers (7x7, bf16: 218 registers a thread for 4096 elements).
    """
    if shape.cols % 16:
        elements //= 2
    cols = _cover(shape.cols, 8, 512)
    return {"ROWS": _cover(shape.rows, 1, elements // cols), "COLS": cols}


def _grid(shape: Shape, tile: dict[str, int]) -> tuple[int]:
    tiles = triton.cdiv(shape.rows, tile["ROWS"]) * triton.cdiv(shape.cols, tile["COLS"])
    return (shape.batch * tiles,)


@functools.cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors; 8 for the interpreter, where small cases must split too."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


def _splits(shape: Shape, tile: dict[str, int], device: torch.device) -> tuple[int, int, int]:
    """(channel blocks, splits, positions a split) of a reduction over positions.

    Four programs a processor hide each other's latency; splits beyond that only add partial sums.
    """
    channels, positions = tile["ROWS"], tile["COLS"]
    if shape.channels_last:
        channels, positions = positions, channels
    blocks, steps = triton.cdiv(shape.channels, channels), triton.cdiv(shape.length, positions)
    wanted = triton.cdiv(4 * _processors(device), shape.batch * blocks)
    chunk = triton.cdiv(steps, min(wanted, steps))
    return blocks, triton.cdiv(steps, chunk), chunk * positions


# ------------------------------------------------------------------ forward


def squeeze_fwd(x: Tensor) -> Tensor:
    with torch.cuda.device_of(x):
        return _pool(x, _shape(x))


def _pool(x: Tensor, shape: Shape) -> Tensor:
    mean = x.new_empty(shape.batch, shape.channels, dtype=torch.float32)
    if not shape.batch:
        return mean
    tile = _tile(shape, 4096)
    blocks, splits, chunk = _splits(shape, tile, x.device)
    partial = mean if splits == 1 else mean.new_empty(splits, *mean.shape)
    pool_kernel[shape.batch * blocks, splits](
        **_map("x", x, shape.channels_last),
        partial=partial,
        batch=shape.batch,
        channels=shape.channels,
        length=shape.length,
        chunk=chunk,
        divisor=shape.length if splits == 1 else 1,
        CHANNELS_LAST=shape.channels_last,
        **tile,
        **LAUNCH,
    )
    if splits > 1:
        sum_rows(partial, mean, shape.length)
    return mean


def _layers(
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    act_weight: Tensor | None,
    o: Options,
) -> list[Layer]:
    layers = [] if w1 is None else [Layer(w1, b1)]
    return layers if w2 is None else [*layers, Layer(w2, b2, o.act, o.act_slope, act_weight)]


def _branch(
    shape: Shape, o: Options, logits: Tensor, drop_path: Tensor | None, **own: Any
) -> Arguments:
    """The arguments that every kernel over u = residual + d gain (s x + t) takes."""
    return {
        "logits": logits,
        "drop_path": drop_path,
        "channels": shape.channels,
        "length": shape.length,
        "gain": o.gain,
        "gate_slope": o.gate_slope,
        "gate_offset": o.gate_offset,
        "CHANNELS_LAST": shape.channels_last,
        "GATE": o.gate,
        "APPLY": o.apply,
        **own,
    }


def squeeze_excite_fwd(
    x: Tensor,
    src: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    act_weight: Tensor | None,
    residual: Tensor | None,
    drop_path: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *options, save_mask = arguments
    o, shape = Options(*options), _shape(x)
    y, none = torch.empty_like(x), x.new_empty(0, dtype=torch.float32)
    mask_shape = (shape.batch * shape.rows, triton.cdiv(shape.cols, 8)) if save_mask else (0,)
    mask = x.new_empty(mask_shape, dtype=torch.uint8)
    with torch.cuda.device_of(x):
        mean = _pool(x, shape) if src is None else none
        values = [mean if src is None else src]
        for layer in _layers(w1, b1, w2, b2, act_weight, o):
            values.append(layer.forward(values[-1]))
        # an operator may not return its own input
        logits = values[-1] if len(values) > 1 else values[0].clone()
        tile = _tile(shape, 4096)
        if shape.batch:
            rescale_kernel[_grid(shape, tile)](
                **_map("x", x, shape.channels_last),
                **_map("residual", residual, shape.channels_last),
                **_map("y", y, shape.channels_last),
                mask=mask if save_mask else None,
                **_branch(shape, o, logits, drop_path, OUT_ACT=o.out_act),
                **tile,
                **LAUNCH,
            )
    return y, mean, values[1] if w2 is not None else none, logits, mask


# ------------------------------------------------------------------ backward


def squeeze_excite_bwd(
    dy: Tensor,
    dlogits: Tensor | None,
    x: Tensor,
    src: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    act_weight: Tensor | None,
    residual: Tensor | None,
    drop_path: Tensor | None,
    mean: Tensor,
    hidden: Tensor,
    logits: Tensor,
    mask: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    *options, need_dx, need_dw, need_dresidual = arguments
    o, shape = Options(*options), _shape(x)

    def like(t: Tensor | None, needed: bool = True) -> Tensor:
        return torch.empty_like(t) if t is not None and needed else x.new_empty(0)

    dx, dresidual, dsrc, ddrop_path = (
        like(x, need_dx),
        like(x, need_dresidual),
        like(src),
        like(drop_path),
    )
    dw1, db1, dw2, db2, dact_weight = (like(t, need_dw) for t in (w1, b1, w2, b2, act_weight))
    layers = _layers(w1, b1, w2, b2, act_weight, o)
    inputs = (mean if src is None else src, hidden)
    grads = ((dw1, db1), (dw2, db2))

    with torch.cuda.device_of(x):
        v = {
            **_map("dy", dy, shape.channels_last),
            **_map("x", x, shape.channels_last),
            **_map("residual", residual, shape.channels_last),
            "mask": mask if mask.numel() else None,
            **_branch(shape, o, logits, drop_path, OUT_ACT=o.out_act),
        }
        sums = _reduce(v, dresidual if need_dresidual else None, shape, x.device)
        dz = torch.empty_like(logits) if layers else dsrc
        if shape.batch:
            logits_grad_kernel[shape.batch,](
                sums=sums,
                logits=logits,
                dlogits=None if dlogits is None else dlogits.contiguous(),
                drop_path=drop_path,
                dz=dz,
                ddrop_path=None if drop_path is None else ddrop_path,
                batch=shape.batch,
                channels=shape.channels,
                gain=o.gain,
                gate_slope=o.gate_slope,
                gate_offset=o.gate_offset,
                GATE=o.gate,
                APPLY=o.apply,
                BLOCK_C=min(1024, triton.next_power_of_2(shape.channels)),
                **LAUNCH,
            )
        grad = dz
        for index in reversed(range(len(layers))):
            layer, value = layers[index], inputs[index]
            if need_dw:
                layer.weight_grad(grad, value, *grads[index])
            if index == 1:
                terms = torch.empty_like(hidden) if need_dw and act_weight is not None else None
                grad = layer.backward(grad, torch.empty_like(hidden), hidden, terms)
                if terms is not None:
                    shared = dact_weight.numel() == 1
                    sum_rows(terms.reshape(-1, 1) if shared else terms, dact_weight)
            elif src is not None or need_dx:
                grad = layer.backward(grad, torch.empty_like(mean) if src is None else dsrc)
        if need_dx and shape.batch:
            if need_dresidual:  # v is written: read it instead of what it came from
                v |= {**_map("dy", dresidual, shape.channels_last), "mask": None}
                v["OUT_ACT"] = "identity"
            tile = _tile(shape, 4096 if v["OUT_ACT"] == "identity" else 2048)
            apply_grad_kernel[_grid(shape, tile)](
                **v,
                **_map("dx", dx, shape.channels_last),
                dmean=grad if src is None else None,
                **tile,
                **LAUNCH,
            )
    return dx, dsrc, dw1, db1, dw2, db2, dact_weight, dresidual, ddrop_path


def _reduce(v: Arguments, dresidual: Tensor | None, shape: Shape, device: torch.device) -> Tensor:
    """sum v x [1, B, C], or with sum v [2, B, C] where the gate shifts; writes v to dresidual."""
    kinds = 2 if v["APPLY"] in ("scale_shift", "shift") else 1
    sums = torch.empty(kinds, shape.batch, shape.channels, dtype=torch.float32, device=device)
    if not shape.batch:
        return sums
    tile = _tile(shape, 2048)  # two maps and two running sums in registers
    blocks, splits, chunk = _splits(shape, tile, device)
    partial = sums if splits == 1 else sums.new_empty(splits, *sums.shape)
    reduce_kernel[shape.batch * blocks, splits](
        **v,
        **_map("dresidual", dresidual, shape.channels_last),
        partial=partial,
        batch=shape.batch,
        chunk=chunk,
        **tile,
        **LAUNCH,
    )
    if splits > 1:
        sum_rows(partial, sums)
    return sums
