"""Reads stock layers at a call."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def weight_and_bias(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Past ``Module.__getattr__`` (0.5 us each) unless FSDP or a parametrization set them."""
    parameters = layer._parameters
    if "weight" in parameters and "bias" in parameters:
        return parameters["weight"], parameters["bias"]
    return layer.weight, layer.bias
