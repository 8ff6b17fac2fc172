"""``SqueezeExcite``: the operator with its parameters, keyed as timm keys them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnkern import _activations, _checks
from attnkern._layers import plain, pointwise, say_altered, weight_and_bias
from attnkern._reading import kept
from attnkern._select import IMPLS
from attnkern.ops.squeeze_excite.op import Call, excite, run, squeeze
from attnkern.ops.squeeze_excite.reference import (
    ACTS,
    APPLIES,
    GATES,
    OUT_ACTS,
    Options,
    activation,
)


def make_divisible(value: float, divisor: int) -> int:
    """value rounded to the nearest multiple of ``divisor``, at least ``divisor``: timm's for SE."""
    return max(divisor, int(value + divisor / 2) // divisor * divisor)


_ALIASES = {"swish": "silu", "hard_swish": "hardswish", "hardsigmoid": "hard_sigmoid"}
"""timm's names of activations that have another one here."""

_LAYERS = (nn.Conv2d, nn.Conv1d, nn.Conv3d, nn.Linear)
_PRELU = (nn.PReLU,)
_READ = ("fc1", "act", "fc2", "options")


class SqueezeExcite(nn.Module):
    r"""Squeeze-and-excitation block: `squeeze_excite` with a two-layer 1x1-convolution MLP.

    Takes the arguments of ``timm.layers.SqueezeExcite`` and has its parameters: ``fc1.weight``
    [R, C, 1, 1], ``fc1.bias``, ``fc2.weight`` [C, R, 1, 1], ``fc2.bias``, and ``act.weight`` for
    PReLU.  State dicts load both ways.

    Args:
        channels: C.
        rd_ratio: R / C when ``rd_channels`` is not given.
        rd_channels: R.
        rd_divisor: R is rounded to a multiple of this.
        add_maxpool, norm_layer: accepted for timm's sake; only False and None are served.
        bias: whether both layers have one.
        act, act_slope, gate, gate_slope, gate_offset, apply, gain, out_act, impl: as for
            `squeeze_excite`; ``act="prelu"`` has one slope.
        act_layer, gate_layer: timm's way to give act and gate: a name or a module class.
        spatial_dims: trailing ones of the weights' shape, 1 to 3 (the input may have any).

    A layer that is more than its parameters, with hooks (those of ``weight_norm`` and pruning too) or
    of another class (LoRA, another ``act``), or a convolution with padding, stride or groups, is called:
    only squeeze and rescale are fused then.

    Source: Hu et al., Squeeze-and-Excitation Networks, arXiv:1709.01507.

    >>> SqueezeExcite(64)(torch.randn(2, 64, 7, 7)).shape
    torch.Size([2, 64, 7, 7])
    """

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        rd_divisor: int = 8,
        add_maxpool: bool = False,
        bias: bool = True,
        act_layer: Any = None,
        norm_layer: Any = None,
        gate_layer: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        act: str = "relu",
        act_slope: float = 0.01,
        gate: str = "sigmoid",
        gate_slope: float = 1 / 6,
        gate_offset: float = 0.5,
        apply: str = "scale",
        gain: float = 1.0,
        out_act: str = "identity",
        spatial_dims: int = 2,
        impl: str = "auto",
    ):
        super().__init__()
        name = type(self).__name__
        if add_maxpool:
            _checks.fail(name, "add_maxpool", "be False (the squeeze is the mean)", add_maxpool)
        if norm_layer is not None:
            _checks.fail(name, "norm_layer", "be None (no norm between the layers)", norm_layer)
        _checks.choice(name, "apply", apply, APPLIES)
        _checks.choice(name, "out_act", out_act, OUT_ACTS)
        _checks.choice(name, "impl", impl, IMPLS)
        if spatial_dims not in (1, 2, 3):
            _checks.fail(name, "spatial_dims", "be 1, 2 or 3", spatial_dims)
        hidden = rd_channels or make_divisible(channels * rd_ratio, rd_divisor)
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial_dims - 1]
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = conv(channels, hidden, 1, bias=bias, **factory)
        act, layer = _resolve(name, "act", act, act_layer, ACTS)
        act_slope = getattr(layer, "negative_slope", act_slope)
        self.act: Any = None
        if act == "prelu":
            self.act = (nn.PReLU() if layer is None else layer).to(device, dtype)
        gate, _ = _resolve(name, "gate", gate, gate_layer, GATES)
        width = 2 * channels if apply == "scale_shift" else channels
        self.fc2 = conv(hidden, width, 1, bias=bias, **factory)
        self.options: dict[str, Any] = {
            "act": act,
            "act_slope": act_slope,
            "gate": gate,
            "gate_slope": gate_slope,
            "gate_offset": gate_offset,
            "apply": apply,
            "gain": gain,
            "out_act": out_act,
            "impl": impl,
        }

    def forward(
        self, x: Tensor, residual: Tensor | None = None, drop_path: Tensor | None = None
    ) -> Tensor:
        return (
            run(read[5], read[6], (x, None, *read[:5], residual, drop_path))[0]
            if isinstance(read := kept(self, _read, _READ), tuple)
            else self._by_layers(read, x, residual, drop_path)
        )

    def _altered(self) -> nn.Module | None:
        """The layer whose parameters do not say what it computes."""
        layers: Any = self._modules
        for layer in (layers["fc1"], layers["fc2"]):
            if not plain(layer, _LAYERS) or not pointwise(layer):
                return layer
        if (act := layers.get("act")) is None:
            return None
        return None if self.options["act"] == "prelu" and plain(act, _PRELU) else act

    def _by_layers(
        self,
        altered: nn.Module,
        x: Tensor,
        residual: Tensor | None,
        drop_path: Tensor | None,
    ) -> Tensor:
        """Squeeze and rescale around the layers themselves."""
        say_altered(self, altered)
        o = dict(self.options)
        act, slope = o.pop("act"), o.pop("act_slope")
        m = squeeze(x, impl=o["impl"])
        h = self._called("fc1", m.to(x.dtype))
        h = activation(h, act, slope) if self.act is None else self.act(h)
        z = self._one_position("fc2", self._called("fc2", h)).to(m.dtype)
        return excite(x, z, residual=residual, drop_path=drop_path, **o)

    def _called(self, name: str, v: Tensor) -> Tensor:
        """The layer of v; one with convolutions takes vectors as maps of one position."""
        layer: Any = self._modules[name]
        # torch.compile of torch 2.11 knows no max with a default
        dims = max([p.dim() for p in layer.parameters()] or [v.dim()])
        if v.dim() != dims:
            v = self._one_position("fc1", v)[(...,) + (None,) * (dims - 2)]
        return layer(v)

    def _one_position(self, name: str, v: Tensor) -> Tensor:
        """What a layer has given as vectors: one with padding may give more."""
        if v.shape[2:].numel() != 1:
            _checks.fail(type(self).__name__, name, "give one position", list(v.shape))
        return v.reshape(v.shape[:2])

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _read(module: SqueezeExcite) -> Any:
    """The operator's weights, options and implementation, or the layer that keeps them from serving."""
    if (altered := module._altered()) is not None:
        return altered
    layers: Any = module._modules
    options = dict(module.options)
    impl = options.pop("impl")
    act_weight = None if layers.get("act") is None else layers["act"].weight
    weights = (*weight_and_bias(layers["fc1"]), *weight_and_bias(layers["fc2"]), act_weight)
    return *weights, Call("squeeze_excite", Options(**options), {}), impl


def _resolve(
    op: str, argument: str, name: str, layer: Any, names: tuple[str, ...]
) -> tuple[str, nn.Module | None]:
    """The activation's name, and the module where timm's ``layer`` argument is a class."""
    module = None
    if isinstance(layer, str):
        argument, name = f"{argument}_layer", _ALIASES.get(layer, layer)
    elif layer is not None:
        argument, module = f"{argument}_layer", layer()
        found = _activations.read(module)
        name = type(module).__name__ if found is None else found.name
    _checks.choice(op, argument, name, names)
    return name, module
