"""The attention gates of a network seen from outside: their alpha, its error, what training one costs.

A gate is MONAI's ``AttentionBlock`` or one with the same children: W_g and W_x, a convolution and its
norm, and psi, which ends in a sigmoid; forward(g, x).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnkern
from attnkern import testing
from attnkern.functional import BatchNorm, attention_gate
from bench.run import Claim, Outcome, Settings, compare

Maps = tuple[Tensor, Tensor]  # g, x


def gates(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if {"W_g", "W_x", "psi"} <= {*m._modules}}


def alpha(gate: nn.Module, g: Tensor, x: Tensor, impl: str) -> Tensor:
    """[B, 1, *spatial], by our function from the layers of a gate in evaluation."""
    weights = [p for layer in (gate.W_x, gate.W_g, gate.psi) for p in layer[0].parameters()]
    norms = {
        f"{name}_norm": BatchNorm(n.running_mean, n.running_var, n.weight, n.bias, eps=n.eps)
        for name, n in (("theta", gate.W_x[1]), ("phi", gate.W_g[1]), ("psi", gate.psi[1]))
    }
    _, found, _ = attention_gate(x, g, *weights, **norms, return_alpha=True, impl=impl)
    return found


def eager_alpha(gate: nn.Module, g: Tensor, x: Tensor) -> Tensor:
    return gate.psi(F.relu(gate.W_g(g) + gate.W_x(x)))


@torch.no_grad()
def seen(model: nn.Module, image: Tensor) -> tuple[Tensor, dict[str, Maps]]:
    """The model's output in evaluation, and what each of its gates was given on the way."""
    maps: dict[str, Maps] = {}

    def keep(name: str, gate: nn.Module, given: Any, named: Any) -> None:
        maps[name] = (*given, *(named[key] for key in ("g", "x")[len(given) :]))

    hooks = [
        gate.register_forward_pre_hook(functools.partial(keep, name), with_kwargs=True)
        for name, gate in gates(model).items()
    ]
    try:
        return model.eval()(image), maps
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def largest_error(model: nn.Module, maps: dict[str, Maps], impl: str) -> float:
    """Of the gates' alphas against float64, over that of the eager gate: the largest."""
    ratios = []
    for name, gate in gates(model.eval()).items():
        g, x = maps[name]
        oracle = eager_alpha(copy.deepcopy(gate).double(), g.double(), x.double())
        ratios.append(testing.error_ratio(alpha(gate, g, x, impl), eager_alpha(gate, g, x), oracle))
    return max(ratios)


def train_one(outcome: Outcome, settings: Settings, gate: nn.Module, size: tuple[int, ...]) -> None:
    """Forward and backward of one gate, batch 1, on maps of ``size`` [C, *spatial], in training.

    y and the gradients of x and g are three maps; the gradient that x has from the product alone is a
    fourth until the rest of it is known.  Eager holds 4.5 maps on one thread, 6 on two.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    g, x, dy = (torch.randn(1, *size, generator=generator) for _ in range(3))
    g, x = g.requires_grad_(), x.requires_grad_()

    def step(gate: nn.Module) -> None:
        torch.autograd.grad(gate(g, x), [g, x, *gate.parameters()], dy)

    costs = compare(settings, both(settings, gate.train(), step))
    what = f"one gate in training, {' x '.join(map(str, size))}"
    outcome.costs[what] = costs
    if held := costs["ours"].peak_bytes:
        maps = held / (x.numel() * x.element_size())
        outcome.claims.append(Claim(f"{what}: maps held at once", maps, 4.5, at_most=True))


def both(
    settings: Settings, model: nn.Module, step: Callable[[nn.Module], None]
) -> dict[str, Callable[[], None]]:
    """A step of the stock model and of a copy that `attnkern.optimize` has gone over."""
    ours = copy.deepcopy(model)
    attnkern.optimize(ours, impl=settings.impl)
    return {"eager": functools.partial(step, model), "ours": functools.partial(step, ours)}
