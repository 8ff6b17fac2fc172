"""torchvision: ``ops.misc.SqueezeExcitation`` (EfficientNet, MobileNetV3, RegNetY, MaxViT)."""

from __future__ import annotations

from typing import Any

from torch import nn

from attnkern.integrations import Rule, _squeeze_excite
from attnkern.integrations._squeeze_excite import Arguments


def _read(m: Any) -> Arguments | str:
    if type(m.avgpool) is not nn.AdaptiveAvgPool2d or m.avgpool.output_size not in (1, (1, 1)):
        return f"its pooling is {m.avgpool}"
    if reason := _squeeze_excite.altered(m.avgpool):
        return f"its pooling {reason}"
    return _squeeze_excite.read(m.fc1, m.activation, m.fc2, m.scale_activation)


def squeeze_excitation(module: Any, input: Any, *, impl: str) -> Any:
    return _squeeze_excite.forward(module, _read(module), input, impl)


RULES = (
    Rule(
        "torchvision.ops.misc.SqueezeExcitation",
        "squeeze_excite",
        _read,
        squeeze_excitation,
        {"forward": "_scale", "_scale": "avgpool fc1 activation fc2 scale_activation"},
    ),
)
