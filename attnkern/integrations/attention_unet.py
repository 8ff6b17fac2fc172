"""Image_Segmentation's ``Attention_block`` (LeeJunHyun), copied into most 2-D attention U-Nets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnkern.integrations import Rule, _attention_gate
from attnkern.integrations._structure import has


def _is_block(m: nn.Module) -> bool:
    return has(m, "W_g W_x psi relu")


def _trial(m: Any) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)

    def noise(branch: Any) -> Tensor:
        conv = next(layer for layer in branch.modules() if not list(layer.children()))
        shape = (2, conv.in_channels, *(3 for _ in conv.kernel_size))
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    return noise(m.W_g), noise(m.W_x)


RULES = (
    Rule(
        "Image_Segmentation's Attention_block",
        "attention_gate",
        "attention_gate_fwd",
        _attention_gate.read_additive,
        _attention_gate.additive,
        {"forward": f"{_attention_gate.ADDITIVE} mul multiply torch"},
        structure=_is_block,
        trial=_trial,
    ),
)
