"""The pooling functions with their parameters, keyed as the libraries key them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from attnkern import _checks
from attnkern._layers import first_altered, plain, say_altered, weight_and_bias
from attnkern._select import IMPLS
from attnkern.ops.softmax_pool import layered
from attnkern.ops.softmax_pool.functions import (
    additive_attention_pool,
    context_attention_pool,
    gated_attention_pool,
    softmax_pool,
)
from attnkern.ops.softmax_pool.keys import from_multihead_attention, from_other_scorers
from attnkern.ops.softmax_pool.query import halves, query_attention_pool
from attnkern.ops.softmax_pool.reference import ACTS

_ACTS = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}
_LINEAR = (nn.Linear,)
_BRANCH = (nn.Sequential, nn.Linear)


class _Pool(nn.Module):
    """Holds the options of its function, which checks them and the call's at every call."""

    def __init__(self, sizes: dict[str, Any], options: dict[str, Any]):
        super().__init__()
        name = type(self).__name__
        for argument, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                _checks.fail(name, argument, "be an int of at least 1", size)
        _checks.choice(name, "impl", options["impl"], IMPLS)
        if "act" in options:
            _checks.choice(name, "act", options["act"], ACTS)
        _checks.number(name, "temperature", options["temperature"])
        if options["temperature"] <= 0:
            _checks.fail(name, "temperature", "be greater than 0", options["temperature"])
        self.sizes, self.options = sizes, options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in (self.sizes | self.options).items())


class SoftmaxPool(_Pool):
    """`softmax_pool` as a module without parameters.

    Args:
        temperature, channels_first, impl: as for `softmax_pool`, whose other options (mask, bias,
            offsets, ``return_...``) go to the call.

    >>> SoftmaxPool()(torch.randn(2, 5), torch.randn(2, 5, 8)).shape
    torch.Size([2, 8])
    """

    def __init__(
        self, *, temperature: float = 1.0, channels_first: bool = False, impl: str = "auto"
    ):
        super().__init__({}, _common(temperature, channels_first, impl))

    def forward(self, scores: Tensor, values: Tensor, **call: Any) -> Any:
        return softmax_pool(scores, values, **self.options, **call)


class ContextAttentionPool(_Pool):
    """`context_attention_pool` with its context vectors: GCNet's pooling.

    Parameters: ``weight`` [M, D] and ``bias`` [M], as ``nn.Linear(D, M)`` or, with ``spatial_dims``,
    as a 1x1 convolution (``conv_attn`` of timm's GlobalContext) keys and stores them.

    Args:
        features: D.
        queries: M.
        bias: whether there is one; it moves the scores, not the pool.
        spatial_dims: trailing ones of the weight's shape, 0 to 3.
        temperature, channels_first, impl: as for `context_attention_pool`, whose other options
            (mask, logit_bias, offsets, ``return_...``) go to the call.

    >>> ContextAttentionPool(64)(torch.randn(2, 64, 7, 7)).shape
    torch.Size([2, 1, 64])
    """

    def __init__(
        self,
        features: int,
        queries: int = 1,
        bias: bool = True,
        *,
        spatial_dims: int = 0,
        temperature: float = 1.0,
        channels_first: bool = False,
        impl: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        sizes = {"features": features, "queries": queries}
        super().__init__(sizes, _common(temperature, channels_first, impl))
        if spatial_dims not in (0, 1, 2, 3):
            name = type(self).__name__
            _checks.fail(name, "spatial_dims", "be 0, 1, 2 or 3", spatial_dims)
        scorer = nn.Linear(features, queries, bias, device, dtype)
        self.weight = nn.Parameter(scorer.weight.detach()[(...,) + (None,) * spatial_dims])
        self.bias = scorer.bias

    def forward(self, x: Tensor, **call: Any) -> Any:
        return context_attention_pool(x, self.weight, self.bias, **self.options, **call)


class QueryAttentionPool(_Pool):
    """`query_attention_pool` with learned (latent) queries and projections: a "map" head.

    Has the parameters of timm's ``AttentionPoolLatent`` (``latent``, ``q``, ``kv``, ``proj``, and
    ``norm`` and ``mlp`` with ``mlp_ratio``): state dicts load both ways.  Those of SigLIP's head
    around an ``nn.MultiheadAttention`` (``probe``, ``attention.in_proj_weight``,
    ``attention.out_proj``, ``layernorm``) load too.

    Args:
        features: D of the items.
        out_features: width of the result, D when None; 0 leaves the output projection out.
        embed_dim: E of queries, keys and values, D when None.
        heads: H, which divides E.
        queries: M learned queries.
        bias: whether q and kv have one.
        q_proj: project the latent queries; False takes them as they are.
        mlp_ratio: hidden width over ``out_features`` of the MLP after the pool, 0 for none.
        norm_layer: called with ``out_features``, before the MLP; None for none.
        act_layer: the MLP's activation, called without arguments.
        pool: "token" (query 0, the result is [B, out]), "avg" over the queries, or "" for all,
            [B, M, out].
        fold, temperature, channels_first, impl: as for `query_attention_pool`, whose other options
            (mask, bias, offsets, ``return_...``) go to the call.

    A ``kv`` that is more than its parameters (hooks, another class as LoRA's) is called on every item,
    which then is not folded.

    Source: Lee et al., Set Transformer, arXiv:1810.00825; Zhai et al., arXiv:2106.04560 (MAP head).

    >>> QueryAttentionPool(64, heads=4)(torch.randn(2, 50, 64)).shape
    torch.Size([2, 64])
    """

    def __init__(
        self,
        features: int,
        out_features: int | None = None,
        embed_dim: int | None = None,
        heads: int = 8,
        queries: int = 1,
        bias: bool = True,
        *,
        q_proj: bool = True,
        mlp_ratio: float = 0.0,
        norm_layer: Any = None,
        act_layer: Any = nn.GELU,
        pool: str = "token",
        fold: bool | None = None,
        temperature: float = 1.0,
        channels_first: bool = False,
        impl: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        embed_dim = features if embed_dim is None else embed_dim
        sizes = {"features": features, "embed_dim": embed_dim, "queries": queries}
        options = _common(temperature, channels_first, impl) | {"heads": heads, "fold": fold}
        super().__init__(sizes | {"heads": heads}, options)
        name = type(self).__name__
        if embed_dim % heads:
            _checks.fail(name, "heads", f"divide embed_dim={embed_dim}", heads)
        _checks.choice(name, "pool", pool, ("token", "avg", ""))
        self.pool = self.sizes["pool"] = pool
        out = features if out_features is None else out_features
        if mlp_ratio and not out:
            _checks.fail(name, "mlp_ratio", "be 0 without an output projection", mlp_ratio)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.latent = nn.Parameter(torch.empty(1, queries, embed_dim, **factory))
        nn.init.trunc_normal_(self.latent, std=embed_dim**-0.5)
        self.q = nn.Linear(embed_dim, embed_dim, bias, **factory) if q_proj else nn.Identity()
        self.kv = nn.Linear(features, 2 * embed_dim, bias, **factory)
        self.proj = nn.Linear(embed_dim, out, **factory) if out else nn.Identity()
        self.norm, self.mlp = nn.Identity(), None
        if mlp_ratio:
            self.norm = nn.Identity() if norm_layer is None else norm_layer(out, **factory)
            hidden = int(out * mlp_ratio)
            layers = {
                "fc1": nn.Linear(out, hidden, **factory),
                "act": act_layer(),
                "fc2": nn.Linear(hidden, out, **factory),
            }
            self.mlp = nn.Sequential(OrderedDict(layers))
        self.register_load_state_dict_pre_hook(from_multihead_attention)

    def forward(self, x: Tensor, **call: Any) -> Any:
        return self._head(self._pool(x, self.q(self.latent), **self.options, **call))

    def _pool(self, x: Tensor, q: Tensor, **options: Any) -> Any:
        kv: Any = self._modules["kv"]
        if plain(kv, _LINEAR):
            return query_attention_pool(x, q, **halves(kv), **options)
        say_altered(self, kv)
        return layered.query(kv, x, q, **options)

    def _head(self, pooled: Any) -> Any:
        """What follows the pool; weights, scores and lse pass."""
        z, *others = pooled if isinstance(pooled, tuple) else (pooled,)
        z = self.proj(z)
        if self.mlp is not None:
            z = z + self.mlp(self.norm(z))
        if self.pool:
            z = z[:, 0] if self.pool == "token" else z.mean(1)
        return (z, *others) if others else z


class AdditiveAttentionPool(_Pool):
    """`additive_attention_pool` with its projections: Bahdanau attention, keys projected once.

    Parameters are keyed as in Show, Attend and Tell's widely copied ``Attention``:
    ``encoder_att`` [K, D], ``decoder_att`` [K, Q] and ``full_att`` [1, K]; state dicts load both
    ways.  A decoder projects the keys once a picture and passes them at every step:

        keys = attention.project_keys(x)
        for ...:
            context, weights = attention(x, h, keys, return_weights=True)

    Args:
        features: D of the items.
        query_features: Q, the width of the decoder's state.
        hidden: K.
        act: tanh, relu or gelu.
        bias: whether the three layers have one.
        temperature, channels_first, impl: as for `additive_attention_pool`, whose other options
            (mask, bias, offsets, ``return_...``) go to the call.

    A ``full_att`` that is more than its parameters (hooks, another class as LoRA's) is called on every
    hidden unit, all of which are then stored.

    >>> attention = AdditiveAttentionPool(64, 32, hidden=16)
    >>> x = torch.randn(2, 49, 64)
    >>> attention(x, torch.randn(2, 32), attention.project_keys(x)).shape
    torch.Size([2, 64])
    """

    def __init__(
        self,
        features: int,
        query_features: int,
        hidden: int = 512,
        *,
        act: str = "tanh",
        bias: bool = True,
        temperature: float = 1.0,
        channels_first: bool = False,
        impl: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        sizes = {"features": features, "query_features": query_features, "hidden": hidden}
        super().__init__(sizes, _common(temperature, channels_first, impl) | {"act": act})
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.encoder_att = nn.Linear(features, hidden, bias, **factory)
        self.decoder_att = nn.Linear(query_features, hidden, bias, **factory)
        self.full_att = nn.Linear(hidden, 1, bias, **factory)

    def project_keys(self, x: Tensor) -> Tensor:
        """W x_n + b in x's layout: [B, N, K] or [B, K, *spatial]."""
        if x.dim() > 3 or self.options["channels_first"]:
            return self.encoder_att(x.movedim(1, -1)).movedim(-1, 1)
        return self.encoder_att(x)

    def forward(self, x: Tensor, h: Tensor, keys: Tensor | None = None, **call: Any) -> Any:
        return self._pool(
            self.project_keys(x) if keys is None else keys,
            x,
            self.decoder_att(h),
            **self.options,
            **call,
        )

    def _pool(self, keys: Tensor, x: Tensor, q: Tensor, **options: Any) -> Any:
        full_att: Any = self._modules["full_att"]
        if plain(full_att, _LINEAR):
            return additive_attention_pool(keys, x, q, *weight_and_bias(full_att), **options)
        say_altered(self, full_att)
        return layered.additive(full_att, keys, x, q, **options)


class GatedAttentionPool(_Pool):
    """`gated_attention_pool` with its parameters: the attention of ABMIL and CLAM.

    Parameters are keyed as CLAM's ``Attn_Net_Gated`` (``attention_a.0``, ``attention_b.0``,
    ``attention_c``) or, ungated, its ``Attn_Net`` (``module.0``, ``module.2``): state dicts load
    both ways.  Those of ABMIL, torchmil's ``AttentionPool``, MONAI's ``MILModel.attention`` and
    CLAM trained with dropout load too.

    A scorer whose layers are more than their parameters (hooks, another class, dropout) is called.

    Args:
        features: D of the instances.
        hidden: K.
        branches: M, one row of attention each (CLAM_MB: one a class).
        gated: multiply by the sigmoid branch.
        bias: whether the hidden layers have one.
        out_bias: whether the last layer has one; it moves the scores, not the pool.
        act: tanh, relu or gelu.
        temperature, channels_first, impl: as for `gated_attention_pool`, whose other options
            (mask, bias, offsets, ``return_...``) go to the call.

    Source: Ilse et al., arXiv:1802.04712; Lu et al., CLAM, arXiv:2004.09666.

    >>> GatedAttentionPool(64, hidden=16, branches=2)(torch.randn(1, 100, 64)).shape
    torch.Size([1, 2, 64])
    """

    def __init__(
        self,
        features: int,
        hidden: int = 128,
        branches: int = 1,
        *,
        gated: bool = True,
        bias: bool = True,
        out_bias: bool = True,
        act: str = "tanh",
        temperature: float = 1.0,
        channels_first: bool = False,
        impl: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        sizes = {"features": features, "hidden": hidden, "branches": branches}
        super().__init__(sizes, _common(temperature, channels_first, impl) | {"act": act})
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        V = nn.Linear(features, hidden, bias, **factory)
        w = nn.Linear(hidden, branches, out_bias, **factory)
        if gated:
            U = nn.Linear(features, hidden, bias, **factory)
            self.attention_a = nn.Sequential(V, _ACTS[act]())
            self.attention_b = nn.Sequential(U, nn.Sigmoid())
            self.attention_c = w
        else:
            self.module = nn.Sequential(V, _ACTS[act](), w)
        self.register_load_state_dict_pre_hook(from_other_scorers)

    def forward(self, x: Tensor, **call: Any) -> Any:
        return (
            gated_attention_pool(x, **self._weights(), **self.options, **call)
            if (altered := self._altered()) is None
            else self._by_layers(altered, x, **self.options, **call)
        )

    def _altered(self) -> nn.Module | None:
        """The layer whose parameters do not say what it computes."""
        m: Any = self._modules
        act, ungated = _ACTS[self.options["act"]], "module" in m
        a = m["module" if ungated else "attention_a"]
        layers, classes = (a, *a._modules.values()), (*_BRANCH, act)
        if len(layers) != (4 if ungated else 3):
            return a
        if ungated:
            altered = first_altered(layers, (*classes, nn.Linear))
        elif len((b := m["attention_b"])._modules) != 2:
            return b
        else:
            layers = (*layers, b, *b._modules.values(), m["attention_c"])
            altered = first_altered(layers, (*classes, *_BRANCH, nn.Sigmoid, nn.Linear))
        tanh = altered is None and act is nn.GELU and layers[2].approximate != "none"
        return layers[2] if tanh else altered

    def _by_layers(self, altered: nn.Module, x: Tensor, act: str, **options: Any) -> Any:
        say_altered(self, altered)
        return layered.gated(self._scores, x, **options)

    def _scores(self, x: Tensor) -> Tensor:
        if "module" in self._modules:
            return self.module(x)
        return self.attention_c(self.attention_a(x) * self.attention_b(x))

    def _weights(self) -> dict[str, Any]:
        """Past ``Module.__getattr__``, which takes 14 us of 47 on a small bag."""
        children: dict[str, Any] = self._modules
        if "module" in children:
            first, _, last = children["module"]._modules.values()
            gate: Any = (None, None)
        else:
            first, second = (children[f"attention_{branch}"]._modules["0"] for branch in "ab")
            gate, last = weight_and_bias(second), children["attention_c"]
        (V, b_V), (U, b_U), (w, b_w) = weight_and_bias(first), gate, weight_and_bias(last)
        return {"V": V, "b_V": b_V, "U": U, "b_U": b_U, "w": w, "b_w": b_w}


def _common(temperature: float, channels_first: bool, impl: str) -> dict[str, Any]:
    return {"temperature": temperature, "channels_first": channels_first, "impl": impl}
