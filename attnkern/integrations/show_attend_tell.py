"""Show, Attend and Tell's ``Attention``, as copied into most captioning code: (context, alpha)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnkern import _activations, _autocast
from attnkern.integrations import Rule, _keys, _softmax_pool
from attnkern.integrations._children import altered, refuse_child, refuse_linear
from attnkern.integrations._structure import by_name, has
from attnkern.ops.softmax_pool import additive_attention_pool
from attnkern.ops.softmax_pool.reference import ACTS


class Arguments(NamedTuple):
    """The key projection and the scorer's last layer."""

    k_weight: Tensor
    k_bias: Tensor | None
    v: Tensor
    c: Tensor | None
    act: str


def _is_attention(m: nn.Module) -> bool:
    return has(m, "encoder_att decoder_att full_att relu softmax")


def _read(m: Any) -> Arguments | str:
    keys, full = m.encoder_att, m.full_att
    for name, outputs in (("encoder_att", None), ("decoder_att", None), ("full_att", 1)):
        if reason := refuse_linear(name, getattr(m, name), outputs):
            return reason
    act = _activations.read(m.relu)
    if act is None or act.name not in ACTS:
        return f"its activation {type(m.relu).__name__} is not supported"
    if reason := altered(m.relu):
        return f"its activation {reason}"
    if reason := refuse_child("softmax", m.softmax, nn.Softmax):
        return reason
    if m.softmax.dim != 1:
        return f"its softmax is over dim {m.softmax.dim}"
    return Arguments(keys.weight, keys.bias, full.weight, full.bias, act.name)


def _trial(m: Any) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = (2, 3, m.encoder_att.in_features), (2, m.decoder_att.in_features)
    x, h = (torch.randn(s, generator=generator, dtype=torch.float64, device="cpu") for s in shapes)
    return x, h


def attention(module: Any, *given: Any, impl: str, **named: Any) -> Any:
    """forward(encoder_out, decoder_hidden)"""
    a, inputs = _read(module), by_name(module, given, named)
    x: Any
    x, h = inputs if len(inputs) == 2 else (None, None)
    if (
        not _softmax_pool.ready(module, a, x)
        or isinstance(a, str)
        or x.dim() != 3
        or not isinstance(h, Tensor)
        or h.dim() != 2
        or len(h) not in (1, len(x))
    ):
        return type(module).forward(module, *given, **named)
    keys = _keys.project(module, x, a.k_weight, a.k_bias)
    context, alpha = additive_attention_pool(
        *(keys, x, module.decoder_att(h), a.v, a.c),
        act=a.act,
        return_weights=True,
        impl=impl,
    )
    if low := _autocast.lowers_to(x):  # what autocast gives a softmax, and then a product with x
        alpha = alpha.to(torch.float32 if x.is_cuda else low)
        context = context.to(torch.promote_types(x.dtype, alpha.dtype))
    # the decoder may gate it in place; backward keeps the pool's own
    return context.clone(), alpha


RULES = (
    Rule(
        "Show, Attend and Tell's Attention",
        "additive_attention_pool",
        "softmax_pool_fwd",
        _read,
        attention,
        {
            "forward": "encoder_att decoder_att full_att relu softmax unsqueeze squeeze sum torch "
            "bmm matmul mul transpose permute"
        },
        structure=_is_attention,
        trial=_trial,
    ),
)
