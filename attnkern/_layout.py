"""The two memory layouts that kernels read: channels first and channels last.

A feature map x of shape [B, C, *spatial] has L = prod(spatial) positions a channel.  It can be
read in place when its spatial dims merge into one and either L (channels first) or C (channels
last) has unit stride; batch and row strides are free, so slices along batch or channels are read
in place too.  Anything else is copied once, to channels first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether kernels walk x channels last; x must be `readable`.  Ties go to channels first."""
    return not _unit_stride_positions(x)


def readable(x: Tensor) -> bool:
    """Whether kernels can read x in place."""
    return _unit_stride_positions(x) or _unit_stride_channels(x)


def as_readable(x: Tensor) -> Tensor:
    """x itself when kernels can read it in place, else a contiguous copy (one more read and write)."""
    return x if readable(x) else x.contiguous()


def like(x: Tensor, other: Tensor) -> Tensor:
    """x in the layout of ``other`` (readable, same shape): itself when it already is, else a copy."""
    channels_last = is_channels_last(other)
    if (_unit_stride_channels(x) if channels_last else _unit_stride_positions(x)):
        return x
    return torch.empty_like(other).copy_(x)


def _unit_stride_positions(x: Tensor) -> bool:
    """Channels first: spatial dims merge into one of stride 1."""
    expected = 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _unit_stride_channels(x: Tensor) -> bool:
    """Channels last: channels of stride 1, spatial dims merge into one of any stride >= C."""
    if x.shape[1] != 1 and x.stride(1) != 1:
        return False
    expected = None
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size == 1:
            continue
        if stride < x.shape[1] if expected is None else stride != expected:
            return False
        expected = stride * size
    return True
