"""``SqueezeExcite``: the operator with its parameters, keyed as timm keys them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnkern.ops.squeeze_excite.op import squeeze_excite


def make_divisible(value: float, divisor: int) -> int:
    """value rounded to the nearest multiple of ``divisor``, at least ``divisor`` (timm's rule for SE)."""
    return max(divisor, int(value + divisor / 2) // divisor * divisor)


class SqueezeExcite(nn.Module):
    r"""Squeeze-and-excitation block: ``squeeze_excite`` with a two-layer 1x1-convolution MLP.

    Parameters ``fc1.weight`` [R, C, 1, 1], ``fc1.bias``, ``fc2.weight`` [C, R, 1, 1], ``fc2.bias``
    are those of ``timm.layers.SqueezeExcite``: state dicts load both ways.

    Args:
        channels: C.
        rd_ratio: R / C when ``rd_channels`` is not given.
        rd_channels: R.
        rd_divisor: R is rounded to a multiple of this.
        bias: whether both layers have one.
        act, act_slope, gate, gate_slope, gate_offset, apply, gain, out_act, impl: as in
            `attnkern.functional.squeeze_excite`; ``act="prelu"`` adds ``act_weight`` [R].
        spatial_dims: trailing ones of the weights' shape, 1 to 3 (the input may have any).

    >>> SqueezeExcite(64)(torch.randn(2, 64, 7, 7)).shape
    torch.Size([2, 64, 7, 7])
    """

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        rd_divisor: int = 8,
        *,
        bias: bool = True,
        act: str = "relu",
        act_slope: float = 0.01,
        gate: str = "sigmoid",
        gate_slope: float = 1 / 6,
        gate_offset: float = 0.5,
        apply: str = "scale",
        gain: float = 1.0,
        out_act: str = "identity",
        spatial_dims: int = 2,
        impl: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        hidden = rd_channels or make_divisible(channels * rd_ratio, rd_divisor)
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[spatial_dims]
        factory = {"device": device, "dtype": dtype}
        width = 2 * channels if apply == "scale_shift" else channels
        self.fc1 = conv(channels, hidden, 1, bias=bias, **factory)
        self.fc2 = conv(hidden, width, 1, bias=bias, **factory)
        self.act_weight = (
            nn.Parameter(torch.full((hidden,), 0.25, **factory)) if act == "prelu" else None
        )
        self.options = {
            "act": act,
            "act_slope": act_slope,
            "gate": gate,
            "gate_slope": gate_slope,
            "gate_offset": gate_offset,
            "apply": apply,
            "gain": gain,
            "out_act": out_act,
            "impl": impl,
        }

    def forward(
        self, x: Tensor, residual: Tensor | None = None, drop_path: Tensor | None = None
    ) -> Tensor:
        return squeeze_excite(
            x,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            act_weight=self.act_weight,
            residual=residual,
            drop_path=drop_path,
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
