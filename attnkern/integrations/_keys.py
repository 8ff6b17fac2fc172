"""Keeps the projected keys of a decoder's items from step to step.

Captioning code hands its attention the same items at every step (their first rows, as captions
end), which projects them anew.  `project` returns what it computed for the last items of the module
while nothing that went into it has changed: the items' memory and version, the weights and theirs.
Only values are kept.  Every step differentiates the projection for itself, so that any part of a
graph may be freed, checkpointed or differentiated twice; backward also forgets the values, since an
optimizer that writes past the version counters comes after one.

Between two calls with the same items, without a backward, such writes are not seen: through ``.data``
(averaged weights copied in, say), by numpy, or by a CUDA graph that is replayed into the items.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from attnkern import _autocast, _select


class _Entry(NamedTuple):
    weights: tuple[TensorWeakRef | None, ...]
    state: tuple[Any, ...]
    keys: Tensor


_kept: weakref.WeakKeyDictionary[nn.Module, WeakTensorKeyDictionary] = weakref.WeakKeyDictionary()
"""For each module the entry of the last tensor its items were a view of, dropped with that tensor."""


def project(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear(x, weight, bias) for x [B, N, D], kept for ``module`` where every change can be seen."""
    if not _countable(x, weight, bias):
        return F.linear(x, weight, bias)
    keys = _keys(module, x, weight, bias)
    inputs = (x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _Project.apply(*inputs, [keys], weakref.ref(module))
    return keys


class _Project(torch.autograd.Function):
    """x W^T + b, whose value is known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Any, keys: Any, module: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.module = module
        return keys[0].detach()

    @staticmethod
    def backward(ctx: Any, dkeys: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        _kept.pop(ctx.module(), None)
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        return (
            dkeys @ weight if need_x else None,
            dkeys.flatten(0, 1).t() @ x.flatten(0, 1) if need_weight else None,
            dkeys.sum((0, 1)) if need_bias else None,
            *(None, None),
        )


def _countable(x: Tensor, *weights: Tensor | None) -> bool:
    """Eager code on plain tensors that count their versions, outside autocast and CUDA graphs."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
        or _select.transforming()
        or _autocast.enabled(x)
        or any(
            t is not None and (type(t) not in (Tensor, nn.Parameter) or t.is_inference())
            for t in (x, *weights)
        )
    )


def _keys(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    weights = (weight, bias)
    base = x if x._base is None else x._base  # the first rows are a new view at every step
    memory = [(t._version, t.data_ptr()) for t in (x, *weights) if t is not None]
    state = (*memory, x.stride(), x.shape[1:], x.dtype)
    entry = _kept[module].get(base) if module in _kept else None
    if (
        entry
        and entry.state == state
        and len(entry.keys) >= len(x)
        and all((r and r()) is t for r, t in zip(entry.weights, weights, strict=True))
    ):
        return entry.keys[: len(x)]
    with torch.no_grad():
        keys = F.linear(x, weight, bias)
    references = tuple(None if t is None else TensorWeakRef(t) for t in weights)
    _kept[module] = WeakTensorKeyDictionary({base: _Entry(references, state, keys)})
    return keys
