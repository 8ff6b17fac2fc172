"""CLAM's ``Attn_Net`` and ``Attn_Net_Gated``, copied into most MIL code: raw scores [N, K] and the input.

The pool itself is the caller's; what is fused is the scorer, whose hidden layers [N, D] are then
neither stored nor saved.  (The pool that comes with the scores costs 1 / (2 D) of them and is dropped.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnkern.integrations import Rule, _softmax_pool
from attnkern.integrations._children import altered
from attnkern.integrations._structure import has

_NOTE = "in training, with dropout active, its own forward runs"


def _is_plain(m: Any) -> bool:
    layers = list(m.module) if has(m, "module") and type(m.module) is nn.Sequential else []
    return len(layers) in (3, 4) and type(layers[0]) is type(layers[-1]) is nn.Linear


def _is_gated(m: Any) -> bool:
    return has(m, "attention_a attention_b attention_c")


def _layers(sequence: Any, count: int) -> list[nn.Module] | str:
    """The layers but a dropout, or why not."""
    if type(sequence) is not nn.Sequential:
        return f"its branch is a {type(sequence).__name__}"
    if reason := altered(sequence):
        return f"its branch {reason}"
    for layer in sequence:
        if type(layer) is nn.Dropout and (reason := altered(layer)):
            return f"its dropout {reason}"
    layers = [layer for layer in sequence if type(layer) is not nn.Dropout]
    return layers if len(layers) == count else f"its branch is {sequence}"


def _read_plain(m: Any) -> Any:
    layers = _layers(m._modules["module"], 3)  # an attribute is a proxy in torch.export
    if isinstance(layers, str):
        return layers
    V, act, w = layers
    return _softmax_pool.read_gated(V, act, w, note=_note(m))


def _read_gated(m: Any) -> Any:
    c = m._modules
    a, b = _layers(c["attention_a"], 2), _layers(c["attention_b"], 2)
    if isinstance(a, str) or isinstance(b, str):
        return a if isinstance(a, str) else b
    return _softmax_pool.read_gated(a[0], a[1], c["attention_c"], b[0], b[1], _note(m))


def _note(m: nn.Module) -> str:
    return _NOTE if any(type(layer) is nn.Dropout and layer.p > 0 for layer in m.modules()) else ""


def _scores(module: Any, arguments: Any, x: Any, impl: str) -> Any:
    if (
        not _softmax_pool.ready(module, arguments, x)
        or x.dim() not in (2, 3)
        or (arguments.note and _softmax_pool.dropping(module))
    ):
        return type(module).forward(module, x)
    items = x if x.dim() == 3 else x.unsqueeze(0)
    _, scores = _softmax_pool.gated_pool(items, arguments, impl, return_scores=True)
    scores = scores.transpose(1, 2).contiguous()  # [B, N, K]
    return (scores if x.dim() == 3 else scores.squeeze(0)), x


def plain(module: Any, x: Any, *, impl: str) -> Any:
    return _scores(module, _read_plain(module), x, impl)


def gated(module: Any, x: Any, *, impl: str) -> Any:
    return _scores(module, _read_gated(module), x, impl)


def _trial(m: nn.Module) -> tuple[Tensor, ...]:
    width = next(layer.in_features for layer in m.modules() if isinstance(layer, nn.Linear))
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(5, width, generator=generator, dtype=torch.float64, device="cpu"),)


RULES = (
    Rule(
        "CLAM's Attn_Net",
        "gated_attention_pool(scores)",
        "softmax_pool_fwd",
        _read_plain,
        plain,
        {"forward": "module"},
        structure=_is_plain,
        trial=_trial,
    ),
    Rule(
        "CLAM's Attn_Net_Gated",
        "gated_attention_pool(scores)",
        "softmax_pool_fwd",
        _read_gated,
        gated,
        {"forward": "attention_a attention_b attention_c mul torch"},
        structure=_is_gated,
        trial=_trial,
    ),
)
