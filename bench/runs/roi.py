"""RoI pooling with one query a class: attention over the 7x7 cells of torchvision's roi_align.

1024 regions of a photograph, 256 features a cell; every class of a detector embeds as a query and
pools the cells that speak for it, z[r, class] = sum_n softmax_n(v . tanh(k[r, n] + q[class])) x[r, n].
Written out, tanh(k + q) is one value for every region, class, cell and hidden unit: 2.3 GB for 91
classes and 128 units, and as much again for its input, kept for backward.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkern import testing
from attnkern.functional import additive_attention_pool
from bench.models import photographs
from bench.run import Claim, Outcome, Settings, compare

NEEDS = ("torchvision", "skimage")
FEATURES, HIDDEN, CELLS = 256, 128, 7


def regions(count: int, seed: int) -> Tensor:
    """[count, 256, 7, 7]: roi_align of a stem's features at random boxes of a photograph."""
    from torchvision.ops import roi_align

    generator = torch.Generator().manual_seed(seed)
    image = photographs()[0][None] - 0.5
    stem = torch.randn(FEATURES, 3, 7, 7, generator=generator) / 6
    features = F.conv2d(image, stem, stride=8, padding=3).relu()  # [1, 256, 64, 64]
    height, width = image.shape[2:]
    corners = torch.rand(count, 2, 2, generator=generator) * torch.tensor([width - 32, height - 32])
    boxes = torch.cat([corners.amin(1), corners.amax(1) + 32], 1)
    return roi_align(features, [boxes], CELLS, spatial_scale=1 / 8, aligned=True)


def eager(keys: Tensor, values: Tensor, query: Tensor, v: Tensor) -> Tensor:
    """z [R, M, 256]; keys [R, 128, 7, 7] and values channels first, query [1, M, 128]."""
    k, x = keys.flatten(2).transpose(1, 2), values.flatten(2).transpose(1, 2)
    e = torch.tanh(k[:, None] + query[:, :, None]) @ v  # [R, M, 49]
    return torch.softmax(e, 2) @ x


def run(settings: Settings) -> Outcome:
    count = 64 if settings.quick else 1024
    generator = torch.Generator().manual_seed(settings.seed)
    values = regions(count, settings.seed)
    project = torch.randn(HIDDEN, FEATURES, 1, 1, generator=generator) * FEATURES**-0.5
    keys = F.conv2d(values, project)
    v = torch.randn(HIDDEN, generator=generator) * HIDDEN**-0.5
    outcome = Outcome([])
    for classes in (11, 91):
        settings.say(f"roi: {classes} classes")
        query = torch.randn(1, classes, HIDDEN, generator=generator)
        tensors = dict(zip(("keys", "values", "query", "v"), (keys, values, query, v), strict=True))
        outcome.claims.append(
            Claim(
                f"{classes} classes: error of outputs and gradients over eager's, 32 regions",
                error({n: t[:32] if t.dim() == 4 else t for n, t in tensors.items()}, settings),
                2,
                at_most=True,
            )
        )
        leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
        for which, call in (("forward", forward), ("forward and backward", training)):
            outcome.costs[f"{count} regions, {classes} classes, {which}"] = compare(
                settings,
                {
                    "eager": functools.partial(call, eager, leaves),
                    "ours": functools.partial(
                        call, additive_attention_pool, leaves, impl=settings.impl
                    ),
                },
            )
    return outcome


def error(tensors: testing.Tensors, settings: Settings) -> float:
    """The worst, over outputs and gradients, of the error against float64 over eager's own."""
    ours = testing.run(additive_attention_pool, tensors, {"impl": settings.impl})
    plain = testing.run(eager, tensors, {})
    oracle = dict(testing.run(eager, testing.double(tensors), {}).items())
    others = dict(plain.items())
    return max(testing.error_ratio(t, others[name], oracle[name]) for name, t in ours.items())


def forward(function: Any, tensors: testing.Tensors, **options: Any) -> Any:
    with torch.no_grad():
        return function(**tensors, **options)


def training(function: Any, tensors: testing.Tensors, **options: Any) -> Any:
    z = function(**tensors, **options)
    return torch.autograd.grad(z, list(tensors.values()), torch.ones_like(z))
