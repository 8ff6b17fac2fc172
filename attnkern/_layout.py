"""The two memory layouts that kernels read: channels first and channels last.

A feature map x of shape [B, C, *spatial] has L = prod(spatial) positions a channel.  It can be
read in place when its spatial dims merge into one and either L (channels first) or C (channels
last) has unit stride; batch and row strides are free, so slices along batch or channels are read
in place too.  Anything else is copied once, to channels first.

Outputs are ``empty_like(x)``, which orders the dims of a map that is not dense by their strides:
rows and samples of x must therefore not overlap (but for a batch of stride 0), or the output
would come out in a layout of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether kernels walk x channels last; x must be `readable`.  Ties go to channels first."""
    return not x.is_contiguous() and not _unit_stride_positions(x)


def readable(x: Tensor) -> bool:
    """Whether kernels can read x in place and write an ``empty_like`` of it."""
    if x.is_contiguous():
        return True
    batch, channels, *spatial = x.shape
    batch_stride, channel_stride, *strides = x.stride()
    if _unit_stride_positions(x):
        row = _length(spatial)
        return (channels == 1 or channel_stride >= row) and _apart(batch, batch_stride, row)
    if not _unit_stride_channels(x):
        return False
    row = next(s for n, s in zip(reversed(spatial), reversed(strides), strict=True) if n != 1)
    between_rows = batch_stride >= channels and batch_stride * batch <= row
    return between_rows or _apart(batch, batch_stride, row * _length(spatial))


def as_readable(x: Tensor) -> Tensor:
    """x when kernels can read it in place, else a contiguous copy (one more read and write)."""
    return x if readable(x) else x.contiguous()


def like(x: Tensor, other: Tensor) -> Tensor:
    """x in the layout of ``other`` (readable, same shape): itself when it already is, else a copy."""
    matches = _unit_stride_channels if is_channels_last(other) else _unit_stride_positions
    return x if matches(x) else torch.empty_like(other).copy_(x)


def _length(spatial: list[int]) -> int:
    length = 1
    for size in spatial:
        length *= size
    return length


def _apart(batch: int, stride: int, extent: int) -> bool:
    """Samples do not overlap, or are all one."""
    return batch <= 1 or stride == 0 or stride >= extent


def _unit_stride_positions(x: Tensor) -> bool:
    """Channels first: spatial dims merge into one of stride 1."""
    expected = 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _unit_stride_channels(x: Tensor) -> bool:
    """Channels last: channels of stride 1, spatial dims merge into one of any stride >= C > 1."""
    if x.shape[1] == 1 or x.stride(1) != 1:
        return False
    expected = None
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size == 1:
            continue
        if stride < x.shape[1] if expected is None else stride != expected:
            return False
        expected = stride * size
    return True
