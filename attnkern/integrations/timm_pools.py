"""timm's attention pools: ``AttentionPoolLatent``, ``AttentionPool2d``, its rotary kin, and ``GlobalContext``.

Keys that are normalised or rotated item by item are no linear maps of the items: they are projected, not
folded, for all items, and the report says so.  The query alone is not, where it is one token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnkern._activations import qualified_name
from attnkern.integrations import Rule, _softmax_pool
from attnkern.integrations._children import altered, refuse_child, refuse_conv, refuse_linear
from attnkern.integrations._softmax_pool import Projections
from attnkern.ops.softmax_pool import context_attention_pool, query_attention_pool

# ------------------------------------------------------------------ AttentionPoolLatent

_VECTOR_NORMS = (
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.normalization.LayerNorm",
    "torch.nn.modules.normalization.RMSNorm",
    "timm.layers.norm.LayerNorm",
    "timm.layers.norm.RmsNorm",
)
"""Norms of each vector by itself, which the queries then need once, not once a sample."""


class Latent(NamedTuple):
    """The fused key and value projection."""

    kv_weight: Tensor
    kv_bias: Tensor | None
    note: str = ""


def _read_latent(m: Any) -> Latent | str:
    if reason := refuse_linear("kv", m.kv):
        return reason
    if type(m.q) not in (nn.Linear, nn.Identity):
        return f"its q is a {type(m.q).__name__}"
    for name, norm in (("q_norm", m.q_norm), ("k_norm", m.k_norm)):
        if qualified_name(type(norm)) not in _VECTOR_NORMS:
            return f"its {name} is a {type(norm).__name__}"
    for name, child in (("q", m.q), ("q_norm", m.q_norm), ("k_norm", m.k_norm)):
        if reason := altered(child):
            return f"its {name} {reason}"
    note = "" if type(m.k_norm) is nn.Identity else "its keys are normalised: projected, not folded"
    return Latent(m.kv.weight, m.kv.bias, note)


def _sdpa_mask(mask: Any, x: Tensor, m: Any) -> dict[str, Any] | None:
    """The mask of F.scaled_dot_product_attention as ours; None for what it may take otherwise."""
    if mask is None:
        return {}
    full = (len(x), m.num_heads, m.latent_len, x.shape[1])
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3, 4):
        return None
    mask = mask[(None,) * (4 - mask.dim())]
    if any(size not in (1, wanted) for size, wanted in zip(mask.shape, full, strict=True)):
        return None
    mask = mask.expand(*mask.shape[:3], full[3])
    if mask.dtype == torch.bool:
        return {"mask": mask} if m.fused_attn else None  # which the other path adds as 0 and 1
    return {"bias": mask} if mask.dtype == x.dtype else None


def latent_pool(module: Any, x: Any, attn_mask: Any = None, *, impl: str) -> Any:
    a = _read_latent(module)
    masks = None
    if _softmax_pool.ready(module, a, x) and x.dim() == 3:
        masks = _sdpa_mask(attn_mask, x, module)
    if masks is None or isinstance(a, str):
        return type(module).forward(module, x, attn_mask)
    if module.pos_embed is not None:
        x = x + module.pos_embed.unsqueeze(0).to(x.dtype)
    heads, size = module.num_heads, module.head_dim
    k_weight, v_weight = a.kv_weight.chunk(2)
    k_bias, v_bias = (None, None) if a.kv_bias is None else a.kv_bias.chunk(2)
    query = module.q(module.latent)  # [1, L, E]: the same for every sample
    query = module.q_norm(query.unflatten(2, (heads, size)).transpose(1, 2))
    keys: dict[str, Any] = {"k_weight": k_weight, "k_bias": k_bias}
    if a.note:
        k = F.linear(x, k_weight, k_bias).unflatten(2, (heads, size)).transpose(1, 2)
        keys = {"keys": module.k_norm(k).transpose(1, 2).flatten(2)}
    z = query_attention_pool(
        x,
        query.transpose(1, 2).flatten(2),
        heads=heads,
        **keys,
        v_weight=v_weight,
        v_bias=v_bias,
        scale=None if module.fused_attn else module.scale,
        impl=impl,
        **masks,
    )
    z = module.proj_drop(module.proj(z))
    if module.mlp is not None:
        z = z + module.mlp(module.norm(z))
    if module.pool == "token":
        return z[:, 0]
    return z.mean(1) if module.pool == "avg" else z


# ------------------------------------------------------------------ AttentionPool2d, RotAttentionPool2d


class Joint(NamedTuple):
    """`Projections` side by side in one layer, to be split at the call: until then FSDP1 may hold their storage."""

    weight: Tensor
    bias: Tensor | None
    note: str = ""


def _split(p: Projections | Joint) -> Projections:
    if isinstance(p, Projections):
        return p
    q, k, v = p.weight.chunk(3)
    b_q, b_k, b_v = (None,) * 3 if p.bias is None else p.bias.chunk(3)
    return Projections(q, b_q, k, b_k, v, b_v)


def _read_token(m: Any) -> Projections | Joint | str:
    if m.pool_type != "token":
        return f"pool_type={m.pool_type!r} keeps every token: there is nothing to pool"
    names = ("q", "k", "v") if m.qkv is None else ("qkv",)
    for name in names:
        if reason := refuse_linear(name, getattr(m, name)):
            return reason
    for name, kinds in (("drop", (nn.Dropout,)), ("proj", (nn.Linear, nn.Identity))):
        if reason := refuse_child(name, getattr(m, name), *kinds):
            return reason  # it is given one token, not all
    if len(names) == 3:
        q, k, v = m.q, m.k, m.v
        return Projections(q.weight, q.bias, k.weight, k.bias, v.weight, v.bias)
    return Joint(m.qkv.weight, m.qkv.bias)


def _pools(module: Any, p: Any, x: Any) -> bool:
    """Whether to serve this call; another draw of dropout is one for one token than for all."""
    return _softmax_pool.ready(module, p, x) and x.dim() == 4 and not _softmax_pool.dropping(module)


def _tokens(module: Any, x: Tensor) -> Tensor:
    """The map's positions behind the token that queries them, [B, 1 + H W, C]."""
    items = x.flatten(2).transpose(1, 2)
    cls = module.cls_token
    token = items.mean(1, keepdim=True) if cls is None else cls.expand(len(x), -1, -1)
    return torch.cat([token, items], 1)


def token_pool(module: Any, x: Any, pre_logits: bool = False, *, impl: str) -> Any:
    p = _read_token(module)
    if isinstance(p, str) or not _pools(module, p, x):
        return type(module).forward(module, x, pre_logits)
    from timm.layers import resample_abs_pos_embed

    positions = resample_abs_pos_embed(
        module.pos_embed.unsqueeze(0), x.shape[2:], old_size=module.feat_size, num_prefix_tokens=1
    )
    scale = None if module.fused_attn else module.scale
    tokens = _tokens(module, x) + positions
    z = _softmax_pool.token_pool(tokens, _split(p), module.num_heads, scale, impl).squeeze(1)
    return z if pre_logits else module.proj(z)


def _read_rotary(m: Any) -> Projections | Joint | str:
    p = _read_token(m)
    note = "its keys are rotated: projected, not folded"
    return p if isinstance(p, str) else p._replace(note=note)


def rotary_pool(module: Any, x: Any, pre_logits: bool = False, *, impl: str) -> Any:
    p = _read_rotary(module)
    if isinstance(p, str) or not _pools(module, p, x):
        return type(module).forward(module, x, pre_logits)
    from timm.layers import apply_rot_embed_cat

    p, heads, tokens = _split(p), module.num_heads, _tokens(module, x)
    rope = module.pos_embed.get_embed(tuple(x.shape[2:]))
    rope = torch.cat(rope, -1) if isinstance(rope, tuple) else rope
    query = F.linear(tokens[:, :1], p.q_weight, p.q_bias)  # not rotated
    k = F.linear(tokens, p.k_weight, p.k_bias).unflatten(2, (heads, -1)).transpose(1, 2)
    rotated = apply_rot_embed_cat(k[:, :, 1:], rope, half=module.rotate_half)
    keys = torch.cat([k[:, :, :1], rotated], 2).type_as(k).transpose(1, 2).flatten(2)
    z = query_attention_pool(
        tokens,
        query,
        heads=heads,
        keys=keys,
        v_weight=p.v_weight,
        v_bias=p.v_bias,
        scale=None if module.fused_attn else module.scale,
        impl=impl,
    ).squeeze(1)
    return z if pre_logits else module.proj(z)


# ------------------------------------------------------------------ GlobalContext


class Context(NamedTuple):
    """The scorer."""

    weight: Tensor
    bias: Tensor | None


def _read_context(m: Any) -> Context | str:
    conv = m.conv_attn
    if conv is None:
        return "use_attn=False: its context is the mean"
    if reason := refuse_conv(conv):
        return reason
    return Context(conv.weight, conv.bias)


def global_context(module: Any, x: Any, *, impl: str) -> Any:
    a = _read_context(module)
    if not _softmax_pool.ready(module, a, x) or isinstance(a, str) or x.dim() != 4:
        return type(module).forward(module, x)
    context = context_attention_pool(x, a.weight, a.bias, impl=impl)
    context = context.reshape(*x.shape[:2], 1, 1)
    if module.mlp_scale is not None:
        x = x * module.gate(module.mlp_scale(context))
    if module.mlp_add is not None:
        x = x + module.mlp_add(context)
    return x


RULES = (
    Rule(
        "timm.layers.attention_pool.AttentionPoolLatent",
        "query_attention_pool",
        "softmax_pool_fwd",
        _read_latent,
        latent_pool,
        {
            "forward": "shape pos_embed unsqueeze to dtype latent expand q reshape latent_len "
            "num_heads head_dim transpose kv permute unbind q_norm k_norm fused_attn F "
            "scaled_dot_product_attention scale maybe_add_mask softmax proj proj_drop mlp norm "
            "pool mean"
        },
    ),
    Rule(
        "timm.layers.attention_pool2d.AttentionPool2d",
        "query_attention_pool",
        "softmax_pool_fwd",
        _read_token,
        token_pool,
        {
            "forward": "shape flatten transpose cls_token torch cat mean expand "
            "resample_abs_pos_embed pos_embed unsqueeze feat_size qkv q reshape num_heads head_dim "
            "k v permute unbind fused_attn nn functional scaled_dot_product_attention scale "
            "softmax drop _pool proj",
            "_pool": "pool_type reshape shape permute",
        },
    ),
    Rule(
        "timm.layers.attention_pool2d.RotAttentionPool2d",
        "query_attention_pool",
        "softmax_pool_fwd",
        _read_rotary,
        rotary_pool,
        {
            "forward": "shape flatten transpose cls_token torch cat mean expand qkv q reshape "
            "num_heads head_dim k v permute unbind pos_embed get_embed isinstance tuple "
            "apply_rot_embed_cat rotate_half type_as fused_attn nn functional "
            "scaled_dot_product_attention scale softmax drop _pool proj",
            "_pool": "pool_type reshape shape permute",
        },
    ),
    Rule(
        "timm.layers.global_context.GlobalContext",
        "context_attention_pool",
        "softmax_pool_fwd",
        _read_context,
        global_context,
        {"forward": "shape conv_attn reshape F softmax unsqueeze view mean mlp_scale gate mlp_add"},
    ),
)
