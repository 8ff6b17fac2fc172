"""Pools whose softmax is nearly saturated: one item of every row has a weight of 1 - ``excess``.

That item's dp and the sum of p dp are then nearly the same, and its score's gradient is their difference.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from conftest import calls
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attnkern import testing

EXCESSES = (0.5, 0.4, 0.36, 0.2, 0.05, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 2e-7, 6e-8, 1e-9, 1e-12)
# heads, queries, masks, bags, maps, keys of their own, projections folded and not; every scorer
CALLS = calls(
    *("pool", "pool_queries", "pool_mask", "pool_map", "pool_bags"),
    *("context", "context_queries", "context_wide"),
    *("query_heads", "query_keys", "query_bags"),
    *("latent_queries", "latent_projected", "latent_mask"),
    *("additive", "additive_classes", "additive_mask", "additive_bags"),
    *("gated", "gated_branches", "gated_mask", "gated_map", "gated_bags", "ungated"),
)
# move nothing but scores and lse: z alone has noise for them
BIASES = ("bias", "k_bias", "c", "b_w")
ALL = ("weights", "scores", "lse")


class _Softmax(torch.autograd.Function):
    """softmax(-1), of whose gradient every term is a difference from the likeliest item's."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        p = logits.softmax(-1)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        if p.shape[-1]:
            grad = grad - grad.gather(-1, p.argmax(-1, keepdim=True))
        return p * (grad - (p * grad).sum(-1, keepdim=True))


class _LogSumExp(torch.autograd.Function):
    """logsumexp(-1), whose own derivative, exp(l - lse), has the rounding of lse."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits.softmax(-1))
        return torch.logsumexp(logits, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        return p * grad.unsqueeze(-1)


class _Exact(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        ours = {torch.Tensor.softmax: _Softmax, torch.logsumexp: _LogSumExp}.get(function)
        if ours is not None and args[0].dtype == torch.float64:
            return ours.apply(args[0])
        return function(*args, **(kwargs or {}))


def exact(spec: testing.OpSpec) -> testing.OpSpec:
    """The spec with an oracle: float64's own softmax leaves a weight of 1 - 1e-12 four digits, of 1 - 1e-16 none."""

    def oracle(**arguments: Any) -> Any:
        with _Exact():
            return spec.eager(**arguments)

    return dataclasses.replace(spec, oracle=oracle)


def compare_all(call, dtype, *, first=0, step=1, **options):
    """Every ``step``-th weight, others for each call, and lse near 0 or 100, where it rounds by 4e-6."""
    for index in range((CALLS.index(call) + first) % step, len(EXCESSES), step):
        shift = (0.0, 100.0)[(index + index // step) % 2]
        try:
            compare(call, EXCESSES[index], dtype, shift=shift, **options)
        except AssertionError as error:
            raise AssertionError(f"a weight of 1 - {EXCESSES[index]}, logits + {shift}") from error


def compare(call, excess, dtype, *, returns=(), shift=0.0, device="cpu", **extra):
    """Hold a case whose rows are saturated to the error budget; ``shift`` moves every logit."""
    case = call.case
    dropped = () if returns else BIASES
    case = dataclasses.replace(
        case,
        shapes={k: s for k, s in case.shapes.items() if k not in dropped},
        options={**case.options, "returns": returns},
    )
    tensors = case.inputs(torch.float64)
    tensors["logit_bias"] = shift + _bias(call.spec, case, tensors, excess)
    tensors = {name: t.to(device, dtype) for name, t in tensors.items()}
    spec = exact(call.spec)
    with torch.no_grad():
        outputs = testing.as_tuple(spec.eager(**tensors, **case.options))
    grads = testing.noise_like(outputs)
    want = testing.expected(spec, case, tensors, grads)
    if dtype == torch.float64:  # float32 saturates elsewhere; and the oracle rounds, too
        eager = dict(want.eager.items())
        for name, o in want.oracle.items():
            rounding = torch.finfo(dtype).eps * float(o.detach().abs().nan_to_num(0, 0, 0).max())
            want.errors[name] += testing.largest_error(eager[name], o) + rounding
    got = testing.run(spec.function, tensors, case.options, grads, **extra)
    testing.check(got, want.eager, want.oracle, 2.0, want.errors)


def _bias(
    spec: testing.OpSpec, case: testing.Case, tensors: testing.Tensors, excess: float
) -> Tensor:
    """What each row's likeliest item needs for a weight of 1 - excess, and 0 of the others."""
    p = spec.eager(**tensors, **{**case.options, "returns": ("weights",)})[1]
    lengths = case.options.get("lengths", (p.shape[-1],))
    bias = torch.zeros_like(p)
    for part, out in zip(p.split(lengths, -1), bias.split(lengths, -1), strict=True):
        if part.shape[-1] < 2:
            continue
        weight, item = part.max(-1, keepdim=True)
        needed = math.log(1 / excess - 1) - torch.logit(weight)
        out.scatter_(-1, item, torch.where(weight > 0, needed, 0.0))  # 0: a row that is masked
    rows = tensors.get("scores", tensors.get("query"))
    single = rows is not None and rows.dim() == 2 and "lengths" not in case.options
    return bias.unsqueeze(-2) if single else bias
