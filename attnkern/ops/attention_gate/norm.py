"""Batch normalisation inside the gate: folded into the weights beside it, or its statistics over the batch."""

from __future__ import annotations

from typing import Any, NamedTuple

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


def in_dtype(t: Tensor | None, dtype: torch.dtype) -> Any:
    """t.to(dtype), which takes 0.8 us even where there is nothing to do."""
    return t if t is None or t.dtype is dtype else t.to(dtype)


def of_no_samples(norm: BatchNorm | None, size: int, like: Tensor) -> BatchNorm | None:
    """What is left of a norm over a batch of 0: torch leaves the running statistics, and gradients are 0."""
    if norm is None or not norm.over_batch:
        return norm
    mean = like.new_zeros(size)
    return norm._replace(running_mean=mean, running_var=torch.ones_like(mean), training=False)


def coefficients(
    norm: BatchNorm, mean: Tensor, var: Tensor, bias: Tensor | None
) -> tuple[Any, Any]:
    """scale and shift of batch_norm(t + bias) = scale t + shift, in the dtype of mean and var."""
    scale = torch.rsqrt(var + norm.eps)
    if norm.weight is not None:
        scale = scale * in_dtype(norm.weight, scale.dtype)
    centre = -mean if bias is None else bias - mean
    if norm.bias is None:
        return scale, scale * centre
    return scale, torch.addcmul(in_dtype(norm.bias, scale.dtype), scale, centre)


def fold(
    norm: BatchNorm | None, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """weight [F, C] and bias [F] of a convolution with its ``norm`` in evaluation folded in."""
    if norm is None or norm.over_batch:
        return weight, bias
    mean, var = (in_dtype(t, weight.dtype) for t in (norm.running_mean, norm.running_var))
    scale, shift = coefficients(norm, mean, var, bias)
    return weight * scale.unsqueeze(1), shift


def track(norm: BatchNorm, mean: Tensor, var: Tensor, count: int, bias: Tensor | None) -> None:
    """Move the running statistics towards those of a batch of ``count`` values: var is unbiased there.

    ``mean`` is that of the convolution without its ``bias``.
    """
    if not norm.training or norm.running_mean is None or norm.running_var is None:
        return
    keep, move = 1 - norm.momentum, norm.momentum
    with torch.no_grad():
        mean = mean if bias is None else mean + bias
        unbiased = move * count / max(count - 1, 1)
        for running, of_batch, share in (
            (norm.running_mean, mean, move),
            (norm.running_var, var, unbiased),
        ):
            if running.dtype is of_batch.dtype:
                running.mul_(keep).add_(of_batch, alpha=share)
            else:  # rounded once, as torch's
                running.copy_(running.to(of_batch.dtype).mul_(keep).add_(of_batch, alpha=share))
