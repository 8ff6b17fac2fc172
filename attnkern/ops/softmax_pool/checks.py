"""What a pooling call must be, and its tensors in normal form; errors name operator and argument."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from attnkern import _autocast, _checks, _select
from attnkern.ops.softmax_pool.reference import ACTS, accumulation_dtype


def items_of(
    op: str, name: str, x: Any, offsets: Any, channels_first: bool, like: Tensor | None = None
) -> Tensor:
    """x [B, N, D], [B, D, *spatial] or, with offsets, [N, D] as [B, 1, N, D], in place.

    Under autocast float32 items are lowered, as they are before torch's own attention.
    """
    _checks.tensor(op, name, x)
    _checks.strided(op, name, x)
    if x.dtype == torch.float32 and (low := _autocast.lowers_to(x)):
        x = x.to(low)
    _checks.dtype(op, name, x, _checks.DTYPES if like is None else (like.dtype,))
    if like is not None:
        _checks.device(op, name, x, like, "values")
    if offsets is not None:
        if channels_first:
            _checks.fail(op, "channels_first", "be False with offsets", channels_first)
        if x.dim() != 2:
            _checks.fail(op, name, "have shape [N, D] with offsets", list(x.shape))
        items = x[None, None]
    elif x.dim() > 3 or (channels_first and x.dim() == 3):
        if x.dim() > 5:
            _checks.fail(op, name, "have at most 3 spatial dims", list(x.shape))
        items = x.flatten(2).transpose(1, 2).unsqueeze(1)
    elif x.dim() == 3:
        items = x.unsqueeze(1)
    else:
        _checks.fail(op, name, "have shape [B, N, D] or [B, D, *spatial]", list(x.shape))
    if items.shape[3] == 0:
        _checks.fail(op, name, "have at least one feature", list(x.shape))
    return items


def check_offsets(op: str, offsets: Any, values: Tensor) -> None:
    _checks.tensor(op, "offsets", offsets)
    _checks.dtype(op, "offsets", offsets, (torch.int64,))
    _checks.device(op, "offsets", offsets, values, "values")
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        _checks.fail(op, "offsets", "have shape [B + 1]", list(offsets.shape))
    without_values = offsets.device.type == "meta" or isinstance(offsets, FakeTensor)
    if torch.compiler.is_compiling() or _select.transforming() or without_values:
        return
    items, counted = values.shape[2], not offsets.is_inference()
    if counted and _in_order.get(offsets) == (offsets._version, items):
        return
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != items:
        given = f"{bounds[0]} and {bounds[-1]}"
        _checks.fail(op, "offsets", f"begin at 0 and end at N={items}", given)
    for bag, (start, end) in enumerate(pairwise(bounds)):
        if end < start:
            _checks.fail(op, "offsets", "not decrease", f"{start}, {end} at {bag}")
    if counted:
        _in_order[offsets] = (offsets._version, items)


_in_order = WeakTensorKeyDictionary()
"""Offsets found in order, by version and N: reading them stops a GPU, so each tensor is read once.

Those made in inference mode count no versions and are read at every call."""


def per_row(
    op: str,
    name: str,
    t: Any,
    values: Tensor,
    rows: tuple[int, int, int],
    ragged: bool,
    dtypes: tuple[torch.dtype, ...] | None = None,
    exact: bool = False,
) -> Tensor:
    """A mask, bias or scores tensor [B, N], [B, M, N] or [B, H, M, N] as [B, H, M, N].

    Sizes of 1 broadcast unless ``exact``; with offsets there is no B.
    """
    _checks.operand(op, name, t, values, like_name="values", dtypes=dtypes)
    batch, heads, queries = (1, *rows[1:]) if ragged else rows
    items = values.shape[2]
    full = t.unsqueeze(0) if ragged else t
    if 2 <= full.dim() <= (3 if exact else 4):
        full = full.reshape(full.shape[0], *(1,) * (4 - full.dim()), *full.shape[1:])
        fits = (
            size == wanted or (size == 1 and not exact)
            for size, wanted in zip(full.shape[:3], (batch, heads, queries), strict=True)
        )
        if all(fits) and full.shape[3] == items:
            return full
    b = "" if ragged else f"B={batch}, "
    shapes = [f"[{b}N={items}]", f"[{b}M={queries}, N={items}]"]
    if heads > 1:
        shapes.append(f"[{b}H={heads}, M={queries}, N={items}]")
    _checks.fail(op, name, f"have shape {' or '.join(shapes)}", list(t.shape))


def logit_bias(
    op: str,
    mask: Any,
    bias: Any,
    bias_name: str,
    values: Tensor,
    rows: tuple[int, int, int],
    ragged: bool,
) -> Tensor | None:
    """bias, with -inf where the mask is False; [B, H, M, N] with sizes of 1 that broadcast."""
    acc = accumulation_dtype(values.dtype)
    full = None
    if bias is not None:
        full = per_row(op, bias_name, bias, values, rows, ragged).to(acc)
    if mask is None:
        return full
    keep = per_row(op, "mask", mask, values, rows, ragged, (torch.bool,))
    zero = torch.zeros((), dtype=acc, device=values.device)
    return torch.where(keep, zero if full is None else full, float("-inf"))


def queries_of(op: str, query: Any, values: Tensor, bags: int, width: int) -> Tensor:
    """query [B or 1, K] or [B or 1, M, K] as [B or 1, M, K]."""
    small(op, "query", query, values)
    full = query.unsqueeze(1) if query.dim() == 2 else query
    if (
        full.dim() != 3
        or full.shape[0] not in (1, bags)
        or full.shape[2] != width
        or 0 in full.shape[1:]
    ):
        b = "1" if bags == 1 else f"1 or B={bags}"
        shapes = f"have shape [{b}, {width}] or [{b}, M, {width}]"
        _checks.fail(op, "query", shapes, list(query.shape))
    return full


def small(op: str, name: str, t: Any, values: Tensor, *shape: int | str) -> None:
    """A parameter: values' dtype or float32, on their device, of this shape where one is given."""
    _checks.operand(op, name, t, values, like_name="values")
    if shape:
        _checks.shape(op, name, t, *shape)


def check_options(op: str, act: str, temperature: float) -> None:
    _checks.choice(op, "act", act, ACTS)
    _checks.number(op, "temperature", temperature)
    if temperature <= 0:
        _checks.fail(op, "temperature", "be greater than 0", temperature)
