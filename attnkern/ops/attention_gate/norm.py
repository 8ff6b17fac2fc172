"""Batch normalisation inside the gate: folded into the weights beside it, or its statistics over the batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class BatchNorm(NamedTuple):
    """The arguments of ``F.batch_norm``, for one of the gate's 1x1 convolutions.

    Normalises by the statistics of the batch where ``training`` or where there are no running ones;
    with ``training`` it updates the running ones as torch does.

    >>> x, weight = torch.randn(2, 8, 5), torch.randn(4, 8)
    >>> norm = BatchNorm(torch.zeros(4), torch.ones(4), training=True)
    >>> attention_gate(x, x, weight, None, weight, None, weight[:1, :4], theta_norm=norm).shape
    torch.Size([2, 8, 5])
    """

    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5

    @property
    def over_batch(self) -> bool:
        return self.training or self.running_mean is None


def coefficients(norm: BatchNorm, mean: Tensor, var: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """scale and shift of batch_norm(t) = scale t + shift, in the dtype of ``like``."""
    scale = (var.to(like.dtype) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.to(like.dtype)
    shift = -mean.to(like.dtype) * scale
    return scale, shift if norm.bias is None else shift + norm.bias.to(like.dtype)


def fold(
    norm: BatchNorm | None, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """weight [F, ...] and bias [F] of a convolution with its ``norm`` in evaluation folded in."""
    if norm is None or norm.over_batch:
        return weight, bias
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale, shift = coefficients(norm, norm.running_mean, norm.running_var, weight)
    return (
        weight * scale.view(-1, *(1,) * (weight.dim() - 1)),
        shift if bias is None else shift + scale * bias,
    )


def track(norm: BatchNorm, mean: Tensor, var: Tensor, count: int, bias: Tensor | None) -> None:
    """Move the running statistics towards those of a batch of ``count`` values: var is unbiased there.

    ``mean`` is that of the convolution without its ``bias``.
    """
    if not norm.training or norm.running_mean is None or norm.running_var is None:
        return
    with torch.no_grad():
        if bias is not None:
            mean = mean + bias.to(mean.dtype)
        for running, now in (
            (norm.running_mean, mean),
            (norm.running_var, var * (count / max(count - 1, 1))),
        ):
            running.mul_(1 - norm.momentum).add_(now.to(running.dtype), alpha=norm.momentum)
