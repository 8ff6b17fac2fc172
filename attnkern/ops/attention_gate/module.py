"""The gate with its parameters, keyed as the original authors key them, and two of them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function

from attnkern import _checks
from attnkern._layers import plain, pointwise, say_altered, weight_and_bias, whole_patches
from attnkern._select import IMPLS
from attnkern.ops.attention_gate.checks import GATES, UPSAMPLINGS
from attnkern.ops.attention_gate.functions import attention_gate
from attnkern.ops.attention_gate.norm import BatchNorm
from attnkern.ops.attention_gate.reference import ACTS, TARGETS

# ------------------------------------------------------------------ batch norms


def batch_norm(norm: Any) -> BatchNorm | None:
    """What an ``nn.BatchNorm`` does at this call, which it counts as its own forward would."""
    if norm is None:
        return None
    buffers, training, momentum = norm._buffers, norm.training, norm.momentum
    mean, var, count = (buffers[n] for n in ("running_mean", "running_var", "num_batches_tracked"))
    factor = 0.0 if momentum is None else momentum
    if training and not norm.track_running_stats:
        mean = var = None
    elif training and count is not None:
        count.add_(1)
        if momentum is None:  # a cumulative mean
            factor = 1.0 / float(count)
    return BatchNorm(mean, var, *weight_and_bias(norm), training, factor, norm.eps)


def synchronised(norm: Any, x: Tensor) -> bool:
    """Whether the layer shares its statistics over ranks now (or refuses to, off the GPU)."""
    return (
        type(norm) is nn.SyncBatchNorm
        and norm.training
        and dist.is_available()
        and dist.is_initialized()
        and (not x.is_cuda or dist.get_world_size(norm.process_group) > 1)
    )


def gated(x: Tensor, g: Tensor, **arguments: Any) -> Any:
    """`attention_gate` of plain maps; a subclass, as MONAI's MetaTensor, wraps what comes out."""
    if _wraps(x) or _wraps(g):
        return handle_torch_function(_gated_plain, (x, g), x, g, arguments)
    return attention_gate(x, g, **arguments)


def _wraps(t: Any) -> bool:
    return type(t) is not Tensor and getattr(type(t), "__torch_function__", _SILENT) is not _SILENT


_SILENT = torch._C._disabled_torch_function_impl  # of parameters, and of tensors that only trace


def _gated_plain(x: Tensor, g: Tensor, arguments: dict[str, Any]) -> Any:
    return attention_gate(x.as_subclass(Tensor), g.as_subclass(Tensor), **arguments)


# ------------------------------------------------------------------ modules

_LAYERS: dict[int, Any] = {
    1: (nn.Conv1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.BatchNorm3d),
}
_CONVOLUTIONS = tuple(conv for conv, _ in _LAYERS.values())
_NORMS = (*(norm for _, norm in _LAYERS.values()), nn.SyncBatchNorm)
_NORM_NAMES = ("theta_norm", "phi_norm", "psi_norm")


class AttentionGate(nn.Module):
    r"""`attention_gate` with its convolutions and batch norms: the gate of Attention U-Net.

    Parameters are keyed as in the authors' ``_GridAttentionBlockND``: ``theta.weight``
    [F, C, *kernel], ``phi.weight`` [F, G, 1, ...], ``phi.bias``, ``psi.weight`` [1, F, 1, ...],
    ``psi.bias``, and with ``out`` ``W.0`` (the 1x1 convolution) and ``W.1`` (its BatchNorm): state
    dicts load both ways.  Batch norms of the branches are ``theta_norm``, ``phi_norm`` and
    ``psi_norm``.  State dicts of MONAI's ``AttentionBlock`` and of its 2-D model (``W_g``, ``W_x``,
    ``psi.0``, ``psi.1``; Image_Segmentation's ``Attention_block``) load with ``norm`` and
    ``theta_bias``; those blocks take (g, x).

    The options by which the blocks in use are gates of this class:

    ======================================  =================================================
    Attention-Gated-Networks                ``kernel=2, upsample="trilinear", out=True``
    its ``concatenation_debug``             ``act="softplus"``
    its ``concatenation_residual``          ``gate="softmax"``
    MONAI, Image_Segmentation               ``norm=True, theta_bias=True``
    ======================================  =================================================

    Args:
        channels: C of x.
        gating_channels: G of g, C when None.
        hidden: F, C // 2 when None.
        kernel: of theta, which is also its stride: an int, or one for each spatial dim.
        norm: a BatchNorm after theta, phi and psi.
        act, act_slope, gate, upsample, align_corners, target, return_alpha, impl: as for
            `attention_gate`.
        out: a 1x1 convolution and a BatchNorm of the gated map.
        theta_bias, phi_bias: whether theta and phi have one.
        spatial_dims: 1 to 3.

    The gate is computed by its layers, one by one, where a layer is more than its parameters: with
    hooks (those of ``weight_norm`` and pruning too), of another class (LoRA, ``nn.GroupNorm``), a
    convolution of other patches, or a ``nn.SyncBatchNorm`` that shares its statistics over ranks.

    Source: Oktay et al., Attention U-Net, arXiv:1804.03999.

    >>> gate = AttentionGate(16, 32, kernel=2, upsample="bilinear")
    >>> gate(torch.randn(2, 16, 32, 32), torch.randn(2, 32, 16, 16)).shape
    torch.Size([2, 16, 32, 32])
    """

    def __init__(
        self,
        channels: int,
        gating_channels: int | None = None,
        hidden: int | None = None,
        *,
        kernel: int | Sequence[int] = 1,
        norm: bool = False,
        act: str = "relu",
        act_slope: float = 0.01,
        gate: str = "sigmoid",
        upsample: str | None = None,
        align_corners: bool = False,
        target: str = "x",
        out: bool = False,
        theta_bias: bool = False,
        phi_bias: bool = True,
        spatial_dims: int = 2,
        return_alpha: bool = False,
        impl: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        name = type(self).__name__
        if not isinstance(spatial_dims, int) or spatial_dims not in (1, 2, 3):
            _checks.fail(name, "spatial_dims", "be 1, 2 or 3", spatial_dims)
        kernel = tuple(kernel) if isinstance(kernel, Sequence) else (kernel,) * spatial_dims
        if len(kernel) != spatial_dims:
            _checks.fail(name, "kernel", f"be an int or {spatial_dims} of them", kernel)
        gating_channels = channels if gating_channels is None else gating_channels
        hidden = max(channels // 2, 1) if hidden is None else hidden
        self.sizes = {"channels": channels, "gating_channels": gating_channels, "hidden": hidden}
        for argument, size in (*self.sizes.items(), *(("kernel", k) for k in kernel)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                _checks.fail(name, argument, "be an int of at least 1", size)
        for argument, value, choices in (
            ("act", act, ACTS),
            ("gate", gate, GATES),
            ("upsample", upsample, (None, *UPSAMPLINGS[spatial_dims])),
            ("target", target, TARGETS),
            ("impl", impl, IMPLS),
        ):
            if value not in choices:
                _checks.fail(
                    name, argument, f"be one of {', '.join(map(str, choices))}", repr(value)
                )
        _checks.number(name, "act_slope", act_slope, minimum=0)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        conv, bn = _LAYERS[spatial_dims]
        self.theta = conv(channels, hidden, kernel, kernel, bias=theta_bias, **factory)
        self.phi = conv(gating_channels, hidden, 1, bias=phi_bias, **factory)
        self.psi = conv(hidden, 1, 1, **factory)
        self.theta_norm = bn(hidden, **factory) if norm else None
        self.phi_norm = bn(hidden, **factory) if norm else None
        self.psi_norm = bn(1, **factory) if norm else None
        width = channels if target == "x" else gating_channels
        self.W = (
            nn.Sequential(conv(width, width, 1, **factory), bn(width, **factory)) if out else None
        )
        self.options: dict[str, Any] = {
            "act": act,
            "act_slope": act_slope,
            "gate": gate,
            "upsample": upsample,
            "align_corners": align_corners,
            "target": target,
            "return_alpha": return_alpha,
            "impl": impl,
        }
        self.register_load_state_dict_pre_hook(_from_other_blocks)

    def forward(self, x: Tensor, g: Tensor) -> Any:
        return gated(x, g, **self._arguments()) if self._inlinable(x) else self._by_layers(x, g)

    def _inlinable(self, x: Tensor) -> bool:
        if (altered := self._altered()) is not None:
            say_altered(self, altered)
            return False
        return not any(synchronised(norm, x) for norm in self._norms())

    def _altered(self) -> nn.Module | None:
        """The layer whose parameters and statistics do not say what it computes."""
        m: Any = self._modules
        convs = [m["phi"], m["psi"]]
        if (out := m.get("W")) is not None:
            if not plain(out, (nn.Sequential,)) or [*out._modules] != ["0", "1"]:
                return out
            convs.append(out._modules["0"])
        if not plain(theta := m["theta"], _CONVOLUTIONS) or not whole_patches(theta):
            return theta
        for conv in convs:
            if not plain(conv, _CONVOLUTIONS) or not pointwise(conv):
                return conv
        for norm in self._norms():
            if norm is not None and not plain(norm, _NORMS):
                return norm
        return None

    def _norms(self) -> list[Any]:
        m: Any = self._modules
        norms = [m.get(name) for name in _NORM_NAMES]
        return norms if m.get("W") is None else [*norms, m["W"][1]]

    def _arguments(self) -> dict[str, Any]:
        """What `attention_gate` takes besides the maps."""
        m: Any = self._modules
        given = dict(self.options)
        layers = {"theta": m["theta"], "phi": m["phi"], "psi": m["psi"]}
        if m.get("W") is not None:
            layers["out"] = m["W"][0]
        for (branch, layer), norm in zip(layers.items(), self._norms(), strict=True):
            given[f"{branch}_weight"], given[f"{branch}_bias"] = weight_and_bias(layer)
            if norm is not None:
                given[f"{branch}_norm"] = batch_norm(norm)
        return given

    def _by_layers(self, x: Tensor, g: Tensor) -> Any:
        """The same by the layers themselves."""
        o = self.options
        acts: dict[str, Any] = {"relu": F.relu, "softplus": F.softplus}
        corners = None if o["upsample"] in (None, "nearest") else o["align_corners"]

        def normed(t: Tensor, norm: nn.Module | None) -> Tensor:
            return t if norm is None else norm(t)

        def to_grid(t: Tensor, grid: torch.Size) -> Tensor:
            if t.shape[2:] == grid:
                return t
            if o["upsample"] is None:
                given = f"maps on {list(t.shape[2:])} and {list(grid)}"
                _checks.fail(type(self).__name__, "upsample", "be given", given)
            return F.interpolate(t, grid, mode=o["upsample"], align_corners=corners)

        t = normed(self.theta(x), self.theta_norm)
        h = t + to_grid(normed(self.phi(g), self.phi_norm), t.shape[2:])
        h = acts[o["act"]](h) if o["act"] in acts else F.leaky_relu(h, o["act_slope"])
        q = normed(self.psi(h), self.psi_norm)
        alpha = q.sigmoid() if o["gate"] == "sigmoid" else q.flatten(1).softmax(1).view_as(q)
        target = x if o["target"] == "x" else g
        alpha_full = to_grid(alpha, target.shape[2:])
        y = normed(alpha_full * target, self.W)
        return (y, alpha, alpha_full) if o["return_alpha"] else y

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in (self.sizes | self.options).items())


class MultiAttentionGate(nn.Module):
    """Attention gates of the same maps side by side, joined by a 1x1 convolution, BatchNorm and ReLU.

    Parameters are keyed as in Attention-Gated-Networks' ``MultiAttentionBlock``, whose state dicts
    load both ways: ``gate_block_1``, ``gate_block_2`` (`AttentionGate`), ``combine_gates.0``, ``.1``.

    Args:
        channels, gating_channels, hidden: as for `AttentionGate`.
        gates: how many.
        options: every other one of `AttentionGate`; ``out`` is True unless given.

    With ``return_alpha`` the gates' maps come side by side along dim 1.

    Source: Schlemper et al., Attention Gated Networks, arXiv:1808.08114.

    >>> block = MultiAttentionGate(16, 32, kernel=2, upsample="trilinear", spatial_dims=3)
    >>> block(torch.randn(2, 16, 8, 8, 8), torch.randn(2, 32, 4, 4, 4)).shape
    torch.Size([2, 16, 8, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        gating_channels: int | None = None,
        hidden: int | None = None,
        *,
        gates: int = 2,
        **options: Any,
    ):
        super().__init__()
        if not isinstance(gates, int) or gates < 1:
            _checks.fail(type(self).__name__, "gates", "be an int of at least 1", gates)
        options = {"out": True, **options}
        for n in range(1, gates + 1):
            gate = AttentionGate(channels, gating_channels, hidden, **options)
            self.add_module(f"gate_block_{n}", gate)
        factory = {name: options.get(name) for name in ("device", "dtype")}
        width = gate.sizes["channels" if gate.options["target"] == "x" else "gating_channels"]
        conv, bn = _LAYERS[options.get("spatial_dims", 2)]
        joint = conv(gates * width, width, 1, **factory)
        self.combine_gates = nn.Sequential(joint, bn(width, **factory), nn.ReLU(inplace=True))

    def forward(self, x: Tensor, g: Tensor) -> Any:
        # not children(), which has a shared gate once
        return _side_by_side(*self._modules.values(), maps=(x, g))


def _side_by_side(*parts: Any, maps: tuple[Tensor, Tensor]) -> Any:
    *gates, combine = parts
    results = [gate(*maps) for gate in gates]
    if isinstance(results[0], Tensor):
        return combine(torch.cat(results, 1))
    y, *alphas = (torch.cat(result, 1) for result in zip(*results, strict=True))
    return combine(y), *alphas


_THEIRS = {
    **{"W_x.0.conv.": "theta.", "W_x.0.": "theta.", "W_x.1.": "theta_norm."},
    **{"W_g.0.conv.": "phi.", "W_g.0.": "phi.", "W_g.1.": "phi_norm."},
    **{"psi.0.conv.": "psi.", "psi.0.": "psi.", "psi.1.": "psi_norm."},
}
"""Keys of MONAI's and Image_Segmentation's blocks."""


def _from_other_blocks(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in list(state):
        own = key.removeprefix(prefix)
        theirs = next((name for name in _THEIRS if own.startswith(name)), None)
        if key.startswith(prefix) and theirs:
            state[prefix + _THEIRS[theirs] + own.removeprefix(theirs)] = state.pop(key)
