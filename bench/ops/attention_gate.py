"""Attention gates: those of real networks, how users write them, and the targets."""

from __future__ import annotations

import math
from typing import Any

from attnkern.ops.attention_gate.cases import case
from bench.rows import FORWARD, TRAINING, OpBench, Subject, Target

GATE = "attention gate"


def _subject(c: Any, dtype: str, **extra: Any) -> Subject:
    """Forward reads x and g and writes y; backward reads x, g, dy and writes dx, dg.

    No row counts the second read that statistics over a batch need: it may come from a cache.
    """
    x, g = (math.prod(c.shapes[name]) for name in ("x", "g"))
    trips = {FORWARD: 2 + g / x, TRAINING: 2 + g / x + 3 + 2 * g / x}
    return Subject("attention_gate", c, dtype, trips, moved=("x",), group=GATE, **extra)


def _gate(batch: int, channels: int, *spatial: int) -> Any:
    """As in a U-Net whose decoder has x's size: F = C/2."""
    name = f"gate-{batch}x{channels}x" + "x".join(map(str, spatial))
    return case(name, batch, channels, spatial, channels // 2)


def _monai(batch: int, channels: int, *spatial: int, training: bool = False) -> Any:
    """MONAI's AttentionBlock: batch norms on theta, phi and psi."""
    kind = "training" if training else "eval"
    name = f"monai-{kind}-{batch}x{channels}x" + "x".join(map(str, spatial))
    norms = "track" if training else "eval"
    return case(name, batch, channels, spatial, channels // 2, norms=norms)


def _oktay(batch: int, channels: int, *spatial: int) -> Any:
    """The original authors': theta 2x2x2 with stride 2, g on the coarser grid with twice the channels."""
    name = f"oktay-{batch}x{channels}x" + "x".join(map(str, spatial))
    coarse = tuple(size // 2 for size in spatial)
    mode = ("linear", "bilinear", "trilinear")[len(spatial) - 1]
    return case(
        name, batch, channels, spatial, channels, kernel=2, gating=coarse,
        gating_channels=2 * channels, upsample=mode,
    )  # fmt: skip


def _cpu() -> list[Subject]:
    quick = [
        _subject(_gate(4, 64, 128, 128), "fp32"),
        _subject(_monai(4, 64, 64, 64, training=True), "fp32", compile=False),
        _subject(_gate(4, 64, 128, 128), "bf16", compile=False),
    ]
    rows = [
        _gate(4, 64, 128, 128),
        _gate(2, 32, 64, 64, 64),
        _gate(8, 128, 32, 32),
        _gate(4, 256, 16, 16),
        _monai(4, 64, 64, 64),
        _monai(1, 32, 48, 48, 48, training=True),
        _oktay(1, 32, 48, 48, 48),
        _oktay(4, 64, 64, 64),
    ]
    full = [_subject(c, "fp32", quick=False) for c in rows[1:]]
    full.append(_subject(rows[0], "fp32", channels_last=True, quick=False))
    full.append(_subject(rows[1], "bf16", quick=False))
    full += [
        _subject(c, "bf16", channels_last=True, quick=False)
        for c in (rows[0], _monai(4, 64, 64, 64, training=True))
    ]
    return quick + full


def _cuda() -> list[Subject]:
    """Maps of 200 MB and more in 16 bits, and what one small sample costs."""
    large = [
        _gate(32, 64, 256, 256),
        _gate(2, 64, 128, 128, 96),
        _gate(64, 128, 128, 128),
        _monai(32, 64, 256, 256),
        _monai(32, 64, 256, 256, training=True),
        _oktay(4, 32, 160, 160, 96),
    ]
    rows = [_subject(c, dtype, quick=dtype == "bf16") for dtype in ("bf16", "fp16") for c in large]
    rows.append(_subject(large[0], "bf16", channels_last=True, quick=False))
    rows += [_subject(_gate(1, 64, 32, 32), "bf16", quick=False)]
    rows += [_subject(large[0], "fp32", quick=False)]
    return rows


BENCH = OpBench(
    subjects={"cpu": _cpu(), "cuda": _cuda()},
    targets={
        "cpu": [
            Target(GATE, FORWARD, ("fp32", "bf16"), 2.0, 1.6),
            Target(GATE, TRAINING, ("fp32", "bf16"), 2.5, 1.6),
        ],
        "cuda": [
            Target(GATE, FORWARD, ("bf16", "fp16"), 3.0, 2.0, 85),
            Target(GATE, TRAINING, ("bf16", "fp16"), 3.5, 2.0, 80),
        ],
    },
)
