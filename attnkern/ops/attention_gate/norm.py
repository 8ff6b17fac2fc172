"""Batch normalisation inside the gate: folded into the weights beside it, or its statistics over the batch."""

from __future__ import annotations

from collections.abc import Sequence
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


def track(
    norms: Sequence[BatchNorm | None],
    moments: Sequence[Sequence[Tensor | None]],
    biases: Sequence[Tensor | None],
    count: int,
) -> None:
    """Move running statistics towards the ``moments`` of a batch of ``count`` values: var is unbiased there.

    Means are those of convolutions without their ``biases``.
    """
    tracked: list[Any] = [
        (norm, *pair, bias)
        for norm, pair, bias in zip(norms, moments, biases, strict=True)
        if norm is not None and norm.training and not any(t is None for t in (*norm[:2], *pair))
    ]
    if not tracked:
        return
    with torch.no_grad():
        for norm, mean, var, bias in tracked:
            mean = mean if bias is None else mean + bias
            for running, of_batch in (
                (norm.running_mean, mean),
                (norm.running_var, var * (count / max(count - 1, 1))),
            ):
                if running.dtype is of_batch.dtype:
                    running.lerp_(of_batch, norm.momentum)
                else:  # rounded once, as torch's
                    running.copy_(running.to(of_batch.dtype).lerp(of_batch, norm.momentum))
