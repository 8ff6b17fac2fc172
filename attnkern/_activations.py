"""Which activation of the operators a module computes, read from the module itself.

Classes are compared exactly, by qualified name, so that no library is imported and a subclass with
another forward is never mistaken for its base.  timm's ``HardSigmoidMe`` and ``HardSwishMe`` are
absent: at the kinks their gradients are not torch's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn


class Activation(NamedTuple):
    name: str
    slope: float = 0.01
    weight: Tensor | None = None


_TORCH = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.GELU: "gelu",
    nn.Mish: "mish",
    nn.PReLU: "prelu",
    nn.Sigmoid: "sigmoid",
    nn.Hardsigmoid: "hard_sigmoid",
    nn.Tanh: "tanh",
}
_QUALIFIED = {
    "timm.layers.activations.Swish": "silu",
    "timm.layers.activations.Mish": "mish",
    "timm.layers.activations.HardSwish": "hardswish",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.PReLU": "prelu",
    "timm.layers.activations.Sigmoid": "sigmoid",
    "timm.layers.activations.HardSigmoid": "hard_sigmoid",
    "timm.layers.activations.Tanh": "tanh",
    "timm.layers.activations_me.SwishMe": "silu",
    "timm.layers.activations_me.MishMe": "mish",
}
_FIXED = {cls: Activation(name) for cls, name in _TORCH.items()}
for _cls in (nn.LeakyReLU, nn.PReLU, nn.GELU):  # which have options
    del _FIXED[_cls]


def qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def read(module: Any) -> Activation | None:
    """The activation that ``module`` computes; None when it is none of the operators'."""
    cls = type(module)
    if cls in _FIXED:
        return _FIXED[cls]
    name = _TORCH.get(cls) or _QUALIFIED.get(qualified_name(cls))
    if name is None or (name == "gelu" and getattr(module, "approximate", "none") != "none"):
        return None
    if name == "leaky_relu":
        slope = module.negative_slope
        return Activation(name, slope) if slope >= 0 else None
    if name == "prelu":
        return Activation(name, weight=module.weight)
    return Activation(name)
