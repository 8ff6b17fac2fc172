"""The handwritten digits that ship inside scikit-learn: 1797 of 8x8 pixels, split and warped."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 8


class Digits(NamedTuple):
    pixels: Tensor  # [n, 8, 8] in 0..1
    labels: Tensor  # [n]


def split(seed: int) -> tuple[Digits, Digits]:
    """Three quarters to train with, a quarter held out; no digit is in both."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.from_numpy(data.images).float() / 16
    labels = torch.from_numpy(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    pixels, labels, count = pixels[order], labels[order], len(order) * 3 // 4
    return Digits(pixels[:count], labels[:count]), Digits(pixels[count:], labels[count:])


def warped(digits: Digits, times: int, generator: torch.Generator) -> Digits:
    """The digits and ``times`` distorted copies of each: turned, sheared, scaled, moved, faded."""
    pixels, labels = digits.pixels.repeat(times, 1, 1), digits.labels.repeat(times)
    count = len(labels)

    def uniform(largest: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * largest

    angle, shear = uniform(0.25), uniform(0.2)
    first = torch.stack([(1 + uniform(0.15)) * angle.cos(), shear - angle.sin(), uniform(0.2)], 1)
    second = torch.stack([angle.sin(), (1 + uniform(0.15)) * angle.cos(), uniform(0.2)], 1)
    grid = F.affine_grid(
        torch.stack([first, second], 1), [count, 1, SIDE, SIDE], align_corners=False
    )
    copies = F.grid_sample(pixels[:, None], grid, align_corners=False)[:, 0]
    copies = (copies * (1 + uniform(0.15))[:, None, None]).clamp(0, 1)
    return Digits(torch.cat([digits.pixels, copies]), torch.cat([digits.labels, labels]))
