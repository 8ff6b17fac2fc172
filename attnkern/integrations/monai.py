"""MONAI: the attention of ``MILModel``, between its backbone and its classifier, and ``AttentionUnet``'s gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from attnkern.integrations import Rule, _attention_gate, _softmax_pool
from attnkern.integrations._children import altered


def _read(m: Any) -> Any:
    if m.mil_mode not in ("att", "att_trans", "att_trans_pyramid"):
        return f"mil_mode={m.mil_mode!r} pools without attention"
    layers = m._modules["attention"]
    if type(layers) is not nn.Sequential or len(layers) != 3:
        return f"its attention is {layers}"
    if reason := altered(layers):
        return f"its attention {reason}"
    return _softmax_pool.read_gated(*layers)


def _pyramid(module: Any, bags: int, instances: int) -> Any:
    """Instances [B, N, D] from the means of the backbone's four levels, each level's tokens joined to the next's."""
    x: Any = None
    for level, encoder in enumerate(module.transformer, 1):
        maps = module.extra_outputs[f"layer{level}"]
        mean = maps.mean((2, 3)).reshape(bags, instances, -1).permute(1, 0, 2)
        x = encoder(mean if x is None else torch.cat((x, mean), 2))
    return x.permute(1, 0, 2)


def calc_head(module: Any, x: Any, *, impl: str) -> Any:
    arguments = _read(module)
    if not _softmax_pool.ready(module, arguments, x) or x.dim() != 3:
        return type(module).calc_head(module, x)
    if module.mil_mode == "att_trans":
        x = module.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
    elif module.mil_mode == "att_trans_pyramid":
        x = _pyramid(module, *x.shape[:2])
    return module.myfc(_softmax_pool.gated_pool(x, arguments, impl).squeeze(1))


RULES = (
    Rule(
        "monai.networks.nets.milmodel.MILModel",
        "gated_attention_pool",
        "softmax_pool_fwd",
        _read,
        calc_head,
        {
            "calc_head": "shape mil_mode myfc torch mean max attention softmax sum transformer "
            "permute extra_outputs reshape cast nn ModuleList cat ValueError str"
        },
        method="calc_head",
    ),
    Rule(
        "monai.networks.nets.attentionunet.AttentionBlock",
        "attention_gate",
        "attention_gate_fwd",
        _attention_gate.read_additive,
        _attention_gate.additive,
        {"forward": _attention_gate.ADDITIVE},
    ),
)
