"""squeeze_excite in Triton, the portable GPU path: launchers of the kernels beside it.

Forward: pool (reads x), the MLP, rescale (reads x and the residual, writes y).
Backward: reduce (reads dy and x), the MLP's gradients, apply (reads dy, writes dx).
Small samples beside small weights do all of it in one launch, a program a sample.
Tiles are chosen from the shape, or by measurement (see tune) where they change no bit.
Nothing is summed by atomics, so results repeat bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from attnkern._triton import LAUNCH, tune
from attnkern._triton.linear import Layer, sum_rows
from attnkern.ops.squeeze_excite import triton_plan as plan
from attnkern.ops.squeeze_excite.reference import Options
from attnkern.ops.squeeze_excite.triton_backward import (
    apply_grad_kernel,
    logits_grad_kernel,
    reduce_kernel,
)
from attnkern.ops.squeeze_excite.triton_forward import pool_kernel, rescale_kernel
from attnkern.ops.squeeze_excite.triton_sample import sample_bwd_kernel, sample_fwd_kernel


def _elementwise(kernel: Any, shape: plan.Shape, elements: int, **arguments: Any) -> None:
    """Launch a kernel that sums nothing over tiles of a map."""

    def launch(blocks: plan.Arguments) -> None:
        kernel[plan.grid(shape, blocks)](**arguments, **blocks)

    candidates = plan.elementwise(shape, elements)
    blocks = candidates[0]
    if tune.enabled:
        kinds = (
            (value.dtype, value.device) if isinstance(value, Tensor) else value
            for value in arguments.values()
            if value is None or isinstance(value, (Tensor, str))
        )
        shape_class = shape._replace(batch=shape.batch.bit_length())
        blocks = tune.choose((kernel.fn.__name__, shape_class, *kinds), candidates, launch)
    launch(blocks)


# ------------------------------------------------------------------ forward


def squeeze_fwd(x: Tensor) -> Tensor:
    with torch.cuda.device_of(x):
        return _pool(x, plan.shape_of(x))


def _pool(x: Tensor, shape: plan.Shape) -> Tensor:
    mean = x.new_empty(shape.batch, shape.channels, dtype=torch.float32)
    if not shape.batch:
        return mean
    tile = plan.tile(shape, 4096)
    blocks, splits, chunk = plan.splits(shape, tile, x.device)
    partial = mean if splits == 1 else mean.new_empty(splits, *mean.shape)
    pool_kernel[shape.batch * blocks, splits](
        **plan.strided("x", x, shape.channels_last),
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


def _mlp(layers: list[Layer], biases: bool = True) -> plan.Arguments:
    """The arguments of a kernel that runs the whole MLP."""
    first, last = layers[0], layers[-1]
    second = last if len(layers) == 2 else None
    return {
        "w1": first.weight,
        "w2": None if second is None else second.weight,
        **({"b1": first.bias, "b2": None if second is None else second.bias} if biases else {}),
        "hidden_size": first.weight.shape[0],
        "logits_size": last.weight.shape[0],
        **last.activation(),
    }


def _branch(
    shape: plan.Shape, o: Options, logits: Tensor, drop_path: Tensor | None, **own: Any
) -> plan.Arguments:
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
    o, shape = Options(*options), plan.shape_of(x)
    y, none = torch.empty_like(x), x.new_empty(0, dtype=torch.float32)
    mask_shape = (shape.batch * shape.rows, triton.cdiv(shape.cols, 8)) if save_mask else (0,)
    mask = x.new_empty(mask_shape, dtype=torch.uint8)
    layers = _layers(w1, b1, w2, b2, act_weight, o)
    sample = plan.sample_blocks(shape, layers)
    with torch.cuda.device_of(x):
        rescale: plan.Arguments = {
            **plan.strided("x", x, shape.channels_last),
            **plan.strided("residual", residual, shape.channels_last),
            **plan.strided("y", y, shape.channels_last),
            "mask": mask if save_mask else None,
        }
        if sample:
            mean = none if src is not None else none.new_empty(shape.batch, shape.channels)
            values = [mean if src is None else src]
            values += [none.new_empty(shape.batch, layer.weight.shape[0]) for layer in layers]
            if shape.batch:
                sample_fwd_kernel[shape.batch,](
                    **rescale,
                    **_branch(shape, o, values[-1], drop_path, OUT_ACT=o.out_act),
                    **_mlp(layers),
                    src=src,
                    mean=mean,
                    hidden=values[1],
                    **sample,
                )
            return y, mean, values[1] if w2 is not None else none, values[-1], mask
        mean = _pool(x, shape) if src is None else none
        values = [mean if src is None else src]
        for layer in layers:
            values.append(layer.forward(values[-1]))
        # an operator may not return its own input
        logits = values[-1] if len(values) > 1 else values[0].clone()
        if shape.batch:
            branch = _branch(shape, o, logits, drop_path, OUT_ACT=o.out_act)
            _elementwise(rescale_kernel, shape, 4096, **rescale, **branch)
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
    o, shape = Options(*options), plan.shape_of(x)

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
            **plan.strided("dy", dy, shape.channels_last),
            **plan.strided("x", x, shape.channels_last),
            **plan.strided("residual", residual, shape.channels_last),
            "mask": mask if mask.numel() else None,
            **_branch(shape, o, logits, drop_path, OUT_ACT=o.out_act),
        }
        sample = plan.sample_blocks(shape, layers)
        if sample:
            dmean = torch.empty_like(mean) if src is None else dsrc
            terms = torch.empty_like(hidden) if need_dw and act_weight is not None else None
            dz, dhidden = torch.empty_like(logits), torch.empty_like(hidden)
            kinds = 2 if o.apply in ("scale_shift", "shift") else 1
            if shape.batch:
                sample_bwd_kernel[shape.batch,](
                    **v,
                    **_mlp(layers, biases=False),
                    **plan.strided("dx", dx if need_dx else None, shape.channels_last),
                    **plan.strided(
                        "dresidual", dresidual if need_dresidual else None, shape.channels_last
                    ),
                    hidden=hidden,
                    dlogits=None if dlogits is None else dlogits.contiguous(),
                    sums=logits.new_empty(kinds, shape.batch, shape.channels),
                    ddrop_path=None if drop_path is None else ddrop_path,
                    dz=dz,
                    dhidden=dhidden,
                    dmean=dmean if src is not None or need_dx else None,
                    slope_terms=terms,
                    batch=shape.batch,
                    POOLED=src is None,
                    BLOCK_Z=min(1024, triton.next_power_of_2(shape.channels)),
                    **sample,
                )
            if need_dw:
                backs = (dz,) if w2 is None else (dhidden, dz)
                for layer, g, value, own in zip(layers, backs, inputs, grads, strict=False):
                    layer.weight_grad(g, value, *own)
                if terms is not None:
                    _slope_grad(terms, dact_weight)
            return dx, dsrc, dw1, db1, dw2, db2, dact_weight, dresidual, ddrop_path
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
                    _slope_grad(terms, dact_weight)
            elif src is not None or need_dx:
                grad = layer.backward(grad, torch.empty_like(mean) if src is None else dsrc)
        if need_dx and shape.batch:
            if need_dresidual:  # v is written: read it instead of what it came from
                v |= {**plan.strided("dy", dresidual, shape.channels_last), "mask": None}
                v["OUT_ACT"] = "identity"
            _elementwise(
                apply_grad_kernel,
                shape,
                4096 if v["OUT_ACT"] == "identity" else 2048,
                **v,
                **plan.strided("dx", dx, shape.channels_last),
                dmean=grad if src is None else None,
            )
    return dx, dsrc, dw1, db1, dw2, db2, dact_weight, dresidual, ddrop_path


def _slope_grad(terms: Tensor, dslope: Tensor) -> None:
    sum_rows(terms.reshape(-1, 1) if dslope.numel() == 1 else terms, dslope)


def _reduce(
    v: plan.Arguments, dresidual: Tensor | None, shape: plan.Shape, device: torch.device
) -> Tensor:
    """sum v x [1, B, C], or with sum v [2, B, C] where the gate shifts; writes v to dresidual."""
    kinds = 2 if v["APPLY"] in ("scale_shift", "shift") else 1
    sums = torch.empty(kinds, shape.batch, shape.channels, dtype=torch.float32, device=device)
    if not shape.batch:
        return sums
    tile = plan.tile(shape, 2048)  # two maps and two running sums in registers
    blocks, splits, chunk = plan.splits(shape, tile, device)
    partial = sums if splits == 1 else sums.new_empty(splits, *sums.shape)
    reduce_kernel[shape.batch * blocks, splits](
        **v,
        **plan.strided("dresidual", dresidual, shape.channels_last),
        partial=partial,
        batch=shape.batch,
        chunk=chunk,
        **tile,
        **LAUNCH,
    )
    if splits > 1:
        sum_rows(partial, sums)
    return sums
