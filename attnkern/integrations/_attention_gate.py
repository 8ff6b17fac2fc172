"""Reads the arguments of ``attention_gate`` off the children of another library's block.

A call computes what the children say at its time, as in ``_squeeze_excite.py``.  A BatchNorm keeps its mode,
its momentum and its statistics: each is asked at the call, and moves its own buffers as its forward
would.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from attnkern import _activations, _autocast
from attnkern._activations import qualified_name
from attnkern._layers import weight_and_bias, whole_patches
from attnkern._reading import kept
from attnkern._verdicts import remember
from attnkern.integrations._children import altered, inlinable, refuse_child, say_refused
from attnkern.integrations._structure import SHARDED, by_name
from attnkern.ops.attention_gate.module import batch_norm, gated, synchronised
from attnkern.ops.attention_gate.reference import ACTS


class Layer(NamedTuple):
    """A convolution and its BatchNorm, if it has one."""

    conv: Any
    norm: Any = None


class Arguments(NamedTuple):
    """What `attention_gate` takes besides the maps, a weight first."""

    theta_weight: Tensor
    weights: dict[str, Any]
    norms: dict[str, Any]
    """Layers, which are asked, and count, at the call."""
    options: dict[str, Any]
    tensors: list[Tensor]
    """All of them."""
    verdicts: dict[Any, bool]
    """Whether maps were accepted, by all the metadata that decides."""


# ------------------------------------------------------------------ layers

_NORMS = {
    nn.Conv1d: (nn.BatchNorm1d, nn.SyncBatchNorm),
    nn.Conv2d: (nn.BatchNorm2d, nn.SyncBatchNorm),
    nn.Conv3d: (nn.BatchNorm3d, nn.SyncBatchNorm),
}
_MONAI = "monai.networks.blocks.convolutions.Convolution"


def layer(role: str, sequence: Any, *last: type) -> Layer | str:
    """Of an nn.Sequential of a convolution (which MONAI wraps), a norm or none, and ``last``."""
    if type(sequence) is not nn.Sequential:
        return f"its {role} is a {qualified_name(type(sequence))}"
    if reason := altered(sequence):
        return f"its {role} {reason}"
    layers: list[Any] = list(sequence._modules.values())
    for cls in reversed(last):
        if reason := refuse_child(f"{role}'s end", layers.pop() if layers else None, cls):
            return reason
    if len(layers) not in (1, 2):
        return f"its {role} has {len(sequence)} layers"
    conv, *norm = layers
    if qualified_name(type(conv)) == _MONAI:
        if list(conv._modules) != ["conv"]:
            return f"its {role}'s convolution has more than a convolution"
        if reason := altered(conv):
            return f"its {role}'s convolution {reason}"
        conv = conv._modules["conv"]
    return Layer(conv, *norm)


def _refuse_conv(role: str, conv: Any) -> str | None:
    """A convolution whose stride is its kernel, in whole patches."""
    if type(conv) not in _NORMS:
        return f"its {role} is a {qualified_name(type(conv))}"
    if reason := altered(conv):
        return f"its {role} {reason}"
    if whole_patches(conv):
        return None
    return f"its {role} is not a plain convolution of whole patches: {conv}"


def _refuse_norm(role: str, norm: Any, conv: Any) -> str | None:
    if type(norm) not in _NORMS[type(conv)]:
        return f"its {role} is followed by a {qualified_name(type(norm))}"
    if reason := altered(norm):
        return f"its {role}'s norm {reason}"
    if norm.eps <= 0 or norm.num_features != conv.out_channels or (norm.momentum or 0) < 0:
        return f"its {role}'s norm is {norm}"
    if (norm._buffers["running_mean"] is None) != (norm._buffers["running_var"] is None):
        return f"its {role}'s norm has one running statistic of two"
    return None


def read(
    theta: Layer | str,
    phi: Layer | str,
    psi: Layer | str,
    out: Layer | str | None = None,
    **options: Any,
) -> Arguments | str:
    """`Arguments` of a gate's layers, or why one of them cannot be inlined."""
    weights: dict[str, Any] = {}
    norms: dict[str, Any] = {}
    for role, found in (("theta", theta), ("phi", phi), ("psi", psi), ("out", out)):
        if found is None:
            continue
        if isinstance(found, str):
            return found
        conv, norm = found
        if reason := _refuse_conv(role, conv):
            return reason
        if norm is not None:
            if reason := _refuse_norm(role, norm, conv):
                return reason
            norms[f"{role}_norm"] = norm
        # a strided theta only where what comes of it is resampled
        if (role != "theta" or "upsample" not in options) and set(conv.kernel_size) != {1}:
            return f"its {role} is not a 1x1 convolution: {conv}"
        weight, bias = weight_and_bias(conv)
        if weight.dim() < 3:  # outside a forward, by FSDP with use_orig_params
            return SHARDED
        weights[f"{role}_weight"], weights[f"{role}_bias"] = weight, bias
    if len(set(map(id, norms.values()))) < len(norms):
        return "its branches share a norm"
    hidden, channels = weights["theta_weight"].shape[:2]
    if weights["phi_weight"].shape[0] != hidden or weights["psi_weight"].shape[:2] != (1, hidden):
        return "its theta, phi and psi do not meet in one map"
    if out is not None and weights["out_weight"].shape[1] != channels:
        return "its out is no convolution of the gated map"
    tables = (weights, *(t for n in norms.values() for t in (n._parameters, n._buffers)))
    tensors = [t for table in tables for t in table.values() if t is not None]
    return Arguments(weights["theta_weight"], weights, norms, options, tensors, {})


def read_activation(act: Any) -> dict[str, Any] | str:
    """The hidden activation as `attention_gate`'s options, or why not."""
    found = _activations.read(act)
    if found is None or found.name not in ACTS:
        return f"its activation {type(act).__name__} is not supported"
    if reason := altered(act):
        return f"its activation {reason}"
    return {"act": found.name, "act_slope": found.slope}


# ------------------------------------------------------------------ the call

_TENSORS = (Tensor, nn.Parameter)
_LOW = (torch.bfloat16, torch.float16)


def ready(module: nn.Module, arguments: Arguments | str, x: Any, g: Any) -> bool:
    """Whether to serve this call: else the module's own forward decides."""
    if isinstance(arguments, str):
        say_refused(module, arguments)
        return False
    if not inlinable() or not (isinstance(x, Tensor) and isinstance(g, Tensor)):
        return False
    key = verdict = None
    if not is_dynamo_compiling():
        try:
            maps = [(t.shape, t.dtype, t.device, t.layout) for t in (x, g)]
            state = (_autocast.lowers_to(x), *[n.training for n in arguments.norms.values()])
            key = (*maps, *state, *[(t.shape, t.dtype, t.device) for t in arguments.tensors])
            verdict = arguments.verdicts.get(key)
        except TypeError:  # symbols for sizes
            key = None
    if verdict is None:
        verdict = _accepts(x, g, arguments)
        if key is not None:
            remember(arguments.verdicts, key, verdict)
    return verdict and not any(synchronised(norm, x) for norm in arguments.norms.values())


def _accepts(x: Tensor, g: Tensor, a: Arguments) -> bool:
    """Whether the stock block would take these maps, and return x's dtype."""
    theta = a.theta_weight
    dims = theta.dim()
    for t, weight in ((x, theta), (g, a.weights["phi_weight"])):
        if (
            t.dim() != dims
            or t.shape[1] != weight.shape[1]
            or t.numel() == 0
            or t.layout != torch.strided
            or t.device != theta.device
        ):
            return False
    if not _dtypes_agree(x, g, a):
        return False
    if a.options.get("upsample") is None and g.shape[2:] != x.shape[2:]:
        return False
    grid = [size // k for size, k in zip(x.shape[2:], theta.shape[2:], strict=True)]
    if g.shape[0] != x.shape[0] or 0 in grid:
        return False
    if not a.norms:
        return True
    alone = x.shape[0] * min(math.prod(grid), math.prod(g.shape[2:])) == 1
    return not alone or not any(
        norm.training or norm._buffers["running_mean"] is None for norm in a.norms.values()
    )


def _dtypes_agree(x: Tensor, g: Tensor, a: Arguments) -> bool:
    dtype, low = a.theta_weight.dtype, _autocast.lowers_to(x)
    groups = [(dtype, [*a.weights.values()])]
    for norm in a.norms.values():
        tensors = [*norm._parameters.values(), *norm._buffers.values()]
        tensors = [t for t in tensors if t is not None and t.is_floating_point()]
        kind = tensors[0].dtype if tensors else dtype
        # float32 norms of low-precision maps are the one mixture that F.batch_norm takes
        if kind is not dtype and not (kind is torch.float32 and dtype in _LOW):
            return False
        groups.append((kind, tensors))
    for kind, tensors in groups:
        for t in tensors:
            # sharded and quantised parameters are wrapper subclasses; their layers know them
            if t is not None and (
                t.dtype is not kind
                or t.device != x.device
                or (type(t) not in _TENSORS and hasattr(type(t), "__tensor_flatten__"))
            ):
                return False
    if low is None:
        return x.dtype == g.dtype == dtype
    return {x.dtype, g.dtype} <= {torch.float32, low} and dtype in (torch.float32, x.dtype)


def call(a: Any, x: Tensor, g: Tensor, impl: str, **options: Any) -> Any:
    """The gate of `Arguments` that are `ready`."""
    norms = {name: batch_norm(norm) for name, norm in a.norms.items()}
    return gated(x, g, **a.weights, **norms, **a.options, impl=impl, **options)


# ------------------------------------------------------------------ MONAI's block, and the one it follows

ADDITIVE = "W_g W_x relu psi"
"""What the forward of either refers to."""


def read_additive(m: Any) -> Arguments | str:
    """Of a block with children W_g, W_x and psi, each ending in a norm, and relu."""
    c = m._modules
    act = read_activation(c["relu"])
    if isinstance(act, str):
        return act
    layers = layer("W_x", c["W_x"]), layer("W_g", c["W_g"]), layer("psi", c["psi"], nn.Sigmoid)
    return read(*layers, **act)


def additive(module: Any, *given: Any, impl: str, **named: Any) -> Any:
    """forward(g, x)"""
    maps = by_name(module, given, named)
    arguments = kept(module, read_additive, ("W_x", "W_g", "psi", "relu"))
    if len(maps) == 2 and ready(module, arguments, *maps[::-1]):
        return call(arguments, *maps[::-1], impl)
    return type(module).forward(module, *given, **named)
