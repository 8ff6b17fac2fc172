"""Recognises code that is copied rather than installed: by its children, its names and one trial."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def by_name(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """A call's arguments in the order in which the module's class takes them; copies have names of their own."""
    if not named:
        return given
    code = type(module).forward.__code__
    names = code.co_varnames[1 : code.co_argcount][len(given) :][: len(named)]
    return (*given, *(named[name] for name in names)) if {*names} == {*named} else ()


def has(module: nn.Module, names: str) -> bool:
    """Whether ``module`` has exactly these children and parameters."""
    return {*module._modules, *module._parameters} == set(names.split())


def refers_to(method: Any, names: str, exactly: bool = True) -> bool:
    """Whether the code of ``method`` refers to these names, in this order, or to no other than these."""
    code = getattr(method, "__code__", None)
    if code is None:
        return False
    known = names.split()
    return list(code.co_names) == known if exactly else set(code.co_names) <= set(known)


SHARDED = "its weights are sharded; optimize before wrapping"
"""Between the forwards of FSDP1."""


def sharded(module: nn.Module) -> bool:
    """Whether FSDP1 has put views of its flat parameter, or shards of one dim, where the weights were."""
    layers = (m for m in module.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)))
    weights = (m._parameters.get("weight") for m in layers)
    return any(w is None or w.dim() < 2 for w in weights)


class _Trial(nn.Module):
    """Calls a method of a module without the module's hooks."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, method: Callable[..., Any], *inputs: Any) -> Any:
        return method(self.module, *inputs)


def agrees(
    module: nn.Module, method: str, ours: Callable[..., Any], inputs: tuple[Any, ...]
) -> bool:
    """Whether the method computes what ``ours`` does, in float64 with random parameters, in eval mode."""
    generator = torch.Generator().manual_seed(0)

    def noise(t: Tensor) -> Tensor:
        options: Any = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
        if isinstance(t, nn.Parameter):
            fan_in = max(1, math.prod(t.shape[1:] or t.shape))
            return torch.randn(t.shape, **options) / fan_in**0.5
        return torch.rand(t.shape, **options) + 0.5  # positive, as a running variance is

    trial = _Trial(module)
    drawn: dict[Tensor, Tensor] = {}  # tied tensors are one
    state: dict[str, Tensor] = {}
    for prefix, layer in trial.named_modules():  # a shared layer by one of its names
        for name, t in (*layer._parameters.items(), *layer._buffers.items()):
            if t is not None and t.is_floating_point():
                state[f"{prefix}.{name}"] = drawn.setdefault(t, noise(t))
    # untied: else it swaps the tensors of a shared layer twice, and leaves ours in it
    run = functools.partial(torch.func.functional_call, trial, state, tie_weights=False)
    modes = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in modes:
            m.training = False
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            want = run((getattr(type(module), method), *inputs))
            got = run((lambda m, *x: ours(m, *x, impl="reference"), *inputs))
    except Exception:  # whatever it computes, it is not what was looked for
        return False
    finally:
        for m, mode in modes:
            m.training = mode
    return _same(got, want)


def _same(got: Any, want: Any) -> bool:
    if type(got) is not type(want):
        return False
    if isinstance(want, tuple):
        return len(got) == len(want) and all(map(_same, got, want))
    if isinstance(want, dict):
        return got.keys() == want.keys() and all(_same(got[key], want[key]) for key in want)
    if not isinstance(want, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
        return False
    return torch.allclose(got, want, 1e-8, 1e-10)
