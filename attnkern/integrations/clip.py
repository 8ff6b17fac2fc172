"""CLIP's ``AttentionPool2d``: OpenAI's, open_clip's, mmpretrain's and copies of them.

Only the token in front, the mean of the map, is kept: OpenAI queries with it alone, open_clip with
all tokens; the results are the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnkern.integrations import Rule, _softmax_pool
from attnkern.integrations._softmax_pool import Projections
from attnkern.integrations._structure import by_name, has

_LAYERS = "k_proj q_proj v_proj c_proj"


def _is_pool(m: nn.Module) -> bool:
    if not hasattr(m, "num_heads"):
        return False
    # FSDP1 takes the embedding into its flat parameter: the code still refers to it
    code = getattr(type(m).forward, "__code__", None)
    taken = has(m, _LAYERS) and code is not None and "positional_embedding" in code.co_names
    return taken or has(m, f"positional_embedding {_LAYERS}")


def _read(m: Any) -> Projections | str:
    """The forward uses the layers' weights, not the layers: their hooks do not run."""
    for name in _LAYERS.split():
        if not isinstance(getattr(m, name), nn.Linear):
            return f"its {name} is a {type(getattr(m, name)).__name__}"
    q, k, v = m.q_proj, m.k_proj, m.v_proj
    return Projections(q.weight, q.bias, k.weight, k.bias, v.weight, v.bias)


def _trial(m: Any) -> tuple[Tensor, ...]:
    positions, width = m.positional_embedding.shape
    generator = torch.Generator().manual_seed(1)
    shape = (2, width, 1, positions - 1)
    return (torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu"),)


def attention_pool_2d(module: Any, *given: Any, impl: str, **named: Any) -> Any:
    """forward(x)"""
    p, inputs = _read(module), by_name(module, given, named)
    if (
        len(inputs) != 1
        or not _softmax_pool.ready(module, p, *inputs)
        or isinstance(p, str)
        or inputs[0].dim() != 4
    ):
        return type(module).forward(module, *given, **named)
    (x,) = inputs
    items = x.flatten(2).transpose(1, 2)
    tokens = torch.cat([items.mean(1, keepdim=True), items], 1)
    tokens = tokens + module.positional_embedding.to(tokens.dtype)
    z = _softmax_pool.token_pool(tokens, p, module.num_heads, None, impl).squeeze(1)
    return F.linear(z, module.c_proj.weight, module.c_proj.bias)


RULES = (
    Rule(
        "CLIP's AttentionPool2d",
        "query_attention_pool",
        "softmax_pool_fwd",
        _read,
        attention_pool_2d,
        {
            "forward": "flatten reshape view shape size permute transpose torch cat mean "
            "positional_embedding to dtype unsqueeze squeeze F nn functional "
            "multi_head_attention_forward num_heads q_proj k_proj v_proj c_proj weight bias training"
        },
        structure=_is_pool,
        trial=_trial,
    ),
)
