"""torchvision: ``ops.misc.SqueezeExcitation`` (EfficientNet, MobileNetV3, RegNetY, MaxViT)."""

from __future__ import annotations

from typing import Any

from torch import nn

from attnkern.integrations import Rule, _squeeze_excite
from attnkern.integrations._children import altered
from attnkern.integrations._squeeze_excite import Arguments


def _read(m: Any) -> Arguments | str:
    c = m._modules
    pool = c["avgpool"]
    if type(pool) is not nn.AdaptiveAvgPool2d or pool.output_size not in (1, (1, 1)):
        return f"its pooling is {pool}"
    if reason := altered(pool):
        return f"its pooling {reason}"
    return _squeeze_excite.read(c["fc1"], c["activation"], c["fc2"], c["scale_activation"])


def squeeze_excitation(module: Any, input: Any, *, impl: str) -> Any:
    names = ("avgpool", "fc1", "activation", "fc2", "scale_activation")
    return _squeeze_excite.forward(module, _read, names, input, impl)


RULES = (
    Rule(
        "torchvision.ops.misc.SqueezeExcitation",
        "squeeze_excite",
        "squeeze_excite_fwd",
        _read,
        squeeze_excitation,
        {"forward": "_scale", "_scale": "avgpool fc1 activation fc2 scale_activation"},
    ),
)
