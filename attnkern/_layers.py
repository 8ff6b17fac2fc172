"""Reads stock layers at a call, and says whether reading them is enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from attnkern import _activations
from attnkern._once import say_once


def weight_and_bias(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Past ``Module.__getattr__`` (0.5 us each) unless FSDP or a parametrization set them."""
    parameters = layer._parameters
    if "weight" in parameters and "bias" in parameters:
        return parameters["weight"], parameters["bias"]
    return layer.weight, layer.bias


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(module: Any) -> bool:
    """Hooks also stand for weight_norm, spectral_norm and pruning, where these are no parametrizations."""
    return any(module.__dict__[hooks] for hooks in HOOKS)


def plain(module: Any, classes: tuple[type, ...]) -> bool:
    """Whether a call of ``module`` computes what one of ``classes`` does from its parameters, and nothing else."""
    cls = type(module)
    if cls not in classes and (
        cls.__base__ not in classes or "parametrizations" not in module._modules
    ):
        return False
    return not hooked(module) and "forward" not in module.__dict__


def first_altered(layers: Sequence[Any], classes: Sequence[type]) -> Any:
    """The first of ``layers`` that is not `plain`, each of its own class."""
    for layer, stock in zip(layers, classes, strict=True):
        if not plain(layer, (stock,)):
            return layer
    return None


def say_altered(module: nn.Module, layer: Any) -> None:
    """That ``module`` calls its layers, and why: ``layer`` is more than its parameters."""

    def text() -> str:
        name = next(name for name, child in module.named_modules() if child is layer)
        return f"{type(module).__name__} is computed layer by layer: its {name} {_why(layer)}"

    say_once(text)


def _why(layer: Any) -> str:
    if hooked(layer):
        return "has hooks"
    if "forward" in layer.__dict__:
        return "has a forward of its own"
    if type(layer) is nn.Sequential:
        return "has other layers"
    stock = type(layer).__module__.startswith("torch.nn.modules.")
    return f"is {layer if stock else _activations.qualified_name(type(layer))}"


def whole_patches(conv: Any) -> bool:
    """A convolution whose stride is its kernel."""
    return (
        conv.kernel_size == conv.stride
        and conv.groups == 1
        and (conv.padding == "valid" or not any(conv.padding))
        and max(conv.dilation) == 1
    )


_ONE = ((1,), (1, 1), (1, 1, 1))
_NO_PADDING = ((0,), (0, 0), (0, 0, 0), "valid")


def pointwise(layer: Any) -> bool:
    """A linear layer, or a convolution of each position by itself (told in 0.2 us)."""
    a = layer.__dict__
    return "kernel_size" not in a or (
        a["kernel_size"] in _ONE
        and a["stride"] in _ONE
        and a["padding"] in _NO_PADDING
        and a["groups"] == 1
    )
