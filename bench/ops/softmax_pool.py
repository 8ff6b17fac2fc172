"""Softmax-weighted pooling: the heads of real systems by scorer, how users write them, and the targets."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnkern.ops.softmax_pool.cases import case
from bench.rows import FORWARD, TRAINING, OpBench, Subject, Target

TRIPS = {FORWARD: 1, TRAINING: 3}  # read the items; then read them again and write their gradient
POOL, GATED, LATENT = "attention pool", "gated ABMIL", "latent query"


# ------------------------------------------------------------------ as users write it


def context_sdpa(x: Tensor, weight: Tensor) -> Tensor:
    """Attention with one constant query over items that are keys and values at once."""
    items = x.flatten(2).transpose(1, 2) if x.dim() > 3 else x
    query = weight.flatten(1).expand(len(x), -1, -1)
    return F.scaled_dot_product_attention(query, items, items, scale=1.0)


def latent_sdpa(
    x: Tensor, query: Tensor, k_weight: Tensor, v_weight: Tensor, v_bias: Tensor, *, heads: int
) -> Tensor:
    """Keys and values of every item by one product, then torch's own attention."""
    batch, items, _ = x.shape
    kv = F.linear(x, torch.cat([k_weight, v_weight]), F.pad(v_bias, (len(k_weight), 0)))
    k, v = kv.view(batch, items, 2, heads, -1).permute(2, 0, 3, 1, 4)
    q = query.unflatten(-1, (heads, -1)).transpose(1, 2).expand(batch, -1, -1, -1)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def latent_timm(
    x: Tensor, query: Tensor, k_weight: Tensor, v_weight: Tensor, v_bias: Tensor, *, heads: int
) -> Tensor:
    """timm's own module with these weights, its latent the query."""
    weights = {
        "latent": query,
        "kv.weight": torch.cat([k_weight, v_weight]),
        "kv.bias": F.pad(v_bias, (len(k_weight), 0)),
    }
    module = _timm_latent(x.shape[2], heads)
    return torch.func.functional_call(module, weights, (x,)).unsqueeze(1)


@functools.cache
def _timm_latent(features: int, heads: int) -> nn.Module:
    from timm.layers import AttentionPoolLatent

    with torch.device("meta"):  # every call brings its weights
        return AttentionPoolLatent(features, out_features=0, num_heads=heads, q_proj=False)


# ------------------------------------------------------------------ rows


def _given(batch: int, items: int, features: int) -> Any:
    shapes = {"values": (batch, items, features), "scores": (batch, items)}
    return case(f"given-{batch}x{items}x{features}", shapes)


def _context(*shape: int) -> Any:
    features = shape[1] if len(shape) > 3 else shape[2]
    shapes = {"x": shape, "weight": (1, features)}
    return case("context-" + "x".join(map(str, shape)), shapes)


def _additive(batch: int, items: int, hidden: int, features: int) -> Any:
    shapes = {
        **{"keys": (batch, items, hidden), "values": (batch, items, features)},
        **{"query": (batch, hidden), "v": (hidden,)},
    }
    return case(f"additive-{batch}x{items}x{features}-{hidden}", shapes)


def _roi(rois: int, classes: int) -> Any:
    """RoI features as roi_align leaves them, channels first, under one query a class."""
    shapes = {
        **{"keys": (rois, 128, 7, 7), "values": (rois, 256, 7, 7)},
        **{"query": (1, classes, 128), "v": (128,)},
    }
    return case(f"roi-{rois}x256x7x7-{classes}", shapes)


def _gated(items: int, features: int, hidden: int) -> Any:
    shapes = {
        **{"x": (1, items, features), "V": (hidden, features), "U": (hidden, features)},
        **{"w": (1, hidden), "b_V": (hidden,), "b_U": (hidden,)},
    }
    return case(f"gated-{items}x{features}-{hidden}", shapes)


def _latent(batch: int, items: int, features: int, heads: int) -> Any:
    """Without a bias of the keys: it moves no weight, and its gradient is the rounding noise of 0."""
    square = (features, features)
    shapes = {
        **{"x": (batch, items, features), "query": (1, 1, features)},
        **{"k_weight": square, "v_weight": square, "v_bias": (features,)},
    }
    return case(f"latent-{batch}x{items}x{features}-{heads}", shapes, heads=heads)


OPS = {
    "given": "softmax_pool",
    "context": "context_attention_pool",
    "additive": "additive_attention_pool",
    "roi": "additive_attention_pool",
    "gated": "gated_attention_pool",
    "latent": "query_attention_pool",
}
GROUPS = {"gated": GATED, "latent": LATENT}
OTHERS = {
    "context": {"sdpa": context_sdpa},
    "latent": {"sdpa": latent_sdpa, "timm AttentionPoolLatent": latent_timm},
}


def _subject(c: Any, dtype: str, **extra: Any) -> Subject:
    kind = c.name.split("-")[0]
    return Subject(
        OPS[kind],
        c,
        dtype,
        TRIPS,
        moved=c.maps,
        group=GROUPS.get(kind, POOL),
        others=OTHERS.get(kind, {}),
        **extra,
    )


def _cpu() -> list[Subject]:
    """The default run takes a row of each scorer, at a fraction of the size where that takes seconds."""
    quick = [
        _subject(_context(32, 256, 56, 56), "fp32"),
        _subject(_additive(80, 196, 512, 512), "fp32", compile=False),
        _subject(_gated(10_000, 512, 256), "fp32"),
        _subject(_gated(10_000, 512, 256), "bf16", compile=False),
        _subject(_latent(2, 729, 1152, 16), "fp32", compile=False),
    ]
    large = [
        _given(32, 3136, 256),
        _context(32, 3136, 256),
        _additive(80, 196, 512, 2048),
        _roi(1024, 11),
        _gated(60_000, 512, 256),
        _latent(32, 729, 1152, 16),
    ]
    rows = [*quick, *(_subject(c, "fp32", quick=False) for c in large)]
    rows.append(_subject(_context(32, 256, 56, 56), "fp32", channels_last=True, quick=False))
    rows += [_subject(_context(32, 256, 56, 56), "bf16", quick=False)]
    rows += [_subject(c, "bf16", quick=False) for c in large]
    return rows


def _cuda() -> list[Subject]:
    """Items of 200 MB and more in 16 bits, and what one sample costs."""
    large = [
        _given(128, 3136, 256),
        _context(128, 256, 56, 56),
        _context(128, 3136, 256),
        _additive(512, 196, 512, 2048),
        _gated(200_000, 512, 256),
        _latent(256, 729, 1152, 16),
    ]
    rows = [_subject(c, dtype, quick=dtype == "bf16") for dtype in ("bf16", "fp16") for c in large]
    rows += [
        _subject(c, "bf16", quick=False)
        for c in (
            _context(32, 256, 56, 56),
            _additive(80, 196, 512, 2048),
            _roi(1024, 11),
            _gated(60_000, 512, 256),
            _latent(32, 729, 1152, 16),
            _latent(1, 729, 1152, 16),
        )
    ]
    rows += [_subject(c, "fp32", quick=False) for c in (large[1], _gated(60_000, 512, 256))]
    return rows


BENCH = OpBench(
    subjects={"cpu": _cpu(), "cuda": _cuda()},
    targets={
        "cpu": [
            Target(group, which, ("fp32", "bf16"), eager, compiled)
            for group, eager, compiled in ((POOL, 1.8, 1.8), (GATED, 2.0, 1.8), (LATENT, 20, 20))
            for which in (FORWARD, TRAINING)
        ],
        "cuda": [
            Target(POOL, FORWARD, ("bf16", "fp16"), 2.0, 1.8, 95),
            Target(POOL, TRAINING, ("bf16", "fp16"), 3.0, 1.5, 90),
            Target(GATED, FORWARD, ("bf16", "fp16"), 3.0, 2.5),
            Target(GATED, TRAINING, ("bf16", "fp16"), 2.0, 2.0),
            Target(LATENT, FORWARD, ("bf16", "fp16"), 8.0, 7.0),
        ],
    },
)
