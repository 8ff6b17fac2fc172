"""Squeeze-and-excitation: the layers of real networks, how users write it, and the targets."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from attnkern.ops.squeeze_excite.cases import case
from bench.rows import FORWARD, TRAINING, OpBench, Subject, Target

PLAIN = {FORWARD: 2, TRAINING: 5}  # read x, write y; then read dy, x, write dx
RESIDUAL = {FORWARD: 3, TRAINING: 8}  # and the shortcut, its gradient, and y or its sign bits


def convolutions(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    act: str = "relu",
    gate: str = "sigmoid",
    residual: Tensor | None = None,
    out_act: str = "identity",
) -> Any:
    """As the modules of timm and torchvision write it: 1x1 convolutions on the pooled map."""
    s = x.mean((2, 3), keepdim=True)
    s = getattr(F, act)(F.conv2d(s, w1[..., None, None], b1))
    s = F.conv2d(s, w2[..., None, None], b2)
    y = x * (s.sigmoid() if gate == "sigmoid" else F.hardsigmoid(s))
    y = y if residual is None else y + residual
    return F.relu(y) if out_act == "relu" else y


def _case(batch: int, channels: int, side: int, hidden: int, **options: Any) -> Any:
    name = f"{batch}x{channels}x{side}x{side}"
    name += "+residual+relu" if options.get("residual") else ""
    return case(name, batch, channels, (side, side), hidden, **options)


def _subject(c: Any, dtype: str, **extra: Any) -> Subject:
    trips = RESIDUAL if "residual" in c.shapes else PLAIN
    others = {"convolutions": convolutions}
    return Subject("squeeze_excite", c, dtype, trips, others=others, **extra)


def _cpu() -> list[Subject]:
    group = "SE"
    resnet2, resnet3 = _case(32, 256, 56, 16), _case(32, 512, 28, 32)
    resnet5, effnet1 = _case(32, 2048, 7, 128), _case(32, 96, 112, 6)
    rows = [
        _subject(resnet2, "fp32", group=group),
        _subject(resnet2, "fp32", group=group, channels_last=True),
        _subject(resnet3, "fp32", group=group),
        _subject(resnet5, "fp32", group=group),
        _subject(effnet1, "fp32", group=group),
        _subject(effnet1, "fp32", group=group, channels_last=True),
    ]
    for dtype in ("bf16", "fp16"):
        for c in (resnet2, resnet3, resnet5, effnet1):
            quick = dtype == "bf16" and c in (resnet3, resnet5)
            rows.append(_subject(c, dtype, group=group, quick=quick))
            if c in (resnet2, effnet1):
                rows.append(_subject(c, dtype, group=group, channels_last=True, quick=False))
    effnet4 = _case(32, 480, 14, 20, act="silu")
    mobilenet = _case(32, 960, 7, 240, gate="hard_sigmoid")
    shortcut = [
        _case(32, 256, 56, 16, residual=True, out_act="relu"),
        _case(32, 2048, 7, 128, residual=True, out_act="relu"),
    ]
    single = [
        _case(1, 256, 56, 16),
        _case(1, 480, 14, 20, act="silu"),
        _case(1, 960, 7, 240, gate="hard_sigmoid"),
    ]
    rows += [
        _subject(effnet4, "fp32"),
        _subject(effnet4, "fp32", channels_last=True, quick=False),
        _subject(mobilenet, "fp32"),
        _subject(mobilenet, "fp32", channels_last=True, quick=False),
        _subject(shortcut[0], "fp32", quick=False),
        _subject(shortcut[1], "fp32"),
        *(_subject(c, "fp32", quick=c is not single[1]) for c in single),
        *(_subject(c, "fp32", channels_last=True, quick=False) for c in single),
    ]
    return rows


def _cuda() -> list[Subject]:
    """Maps of 200 MB and more in 16 bits, and single samples, where launches are everything."""
    large, small = "SE, 16-bit, 200 MB and more", "SE, batch 1"
    shortcut = "SE + residual + relu, 16-bit, 200 MB and more"
    plain = [
        _case(256, 256, 56, 16),
        _case(256, 512, 28, 32),
        _case(512, 1024, 14, 64),
        _case(1024, 2048, 7, 128),
        _case(256, 96, 112, 4, act="silu"),
        _case(1024, 480, 14, 20, act="silu"),
    ]
    residual = [
        _case(256, 256, 56, 16, residual=True, out_act="relu"),
        _case(256, 512, 28, 32, residual=True, out_act="relu"),
        _case(1024, 2048, 7, 128, residual=True, out_act="relu"),
    ]
    single = [
        _case(1, 256, 56, 16),
        _case(1, 2048, 7, 128),
        _case(1, 480, 14, 20, act="silu"),
        _case(1, 960, 7, 240, gate="hard_sigmoid"),
    ]
    rows = []
    for dtype in ("bf16", "fp16"):
        for channels_last in (False, True):
            quick = dtype == "bf16" and not channels_last
            layout = {"dtype": dtype, "channels_last": channels_last, "quick": quick}
            rows += [_subject(c, group=large, **layout) for c in plain]
            rows += [_subject(c, group=shortcut, **layout) for c in residual]
            rows += [_subject(c, group=small, **layout) for c in single]
    rows += [_subject(c, "fp32", quick=c is plain[0]) for c in plain[:4]]
    rows += [
        _subject(_case(32, c, s, c // 16), "bf16", quick=False) for c, s in ((256, 56), (2048, 7))
    ]
    return rows


BENCH = OpBench(
    subjects={"cpu": _cpu(), "cuda": _cuda()},
    targets={
        "cpu": [
            Target("SE", FORWARD, ("fp32",), 1.6, 1.7),
            Target("SE", TRAINING, ("fp32",), 3.5, 2.5),
            Target("SE", FORWARD, ("bf16", "fp16"), 3.0, 1.5),
            Target("SE", TRAINING, ("bf16", "fp16"), 3.0, 1.5),
        ],
        "cuda": [
            Target("SE, 16-bit, 200 MB and more", FORWARD, ("bf16", "fp16"), 2.0, 1.4, 90),
            Target(
                "SE + residual + relu, 16-bit, 200 MB and more",
                TRAINING,
                ("bf16", "fp16"),
                2.6,
                1.25,
                88,
            ),
            Target("SE, batch 1", FORWARD, ("bf16", "fp16"), 5.0, 1.5),
        ],
    },
)
