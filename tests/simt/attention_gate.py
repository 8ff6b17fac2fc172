"""The attention gate's CUDA launchers on the emulator, as its torch operators.

What register.cpp does for the device: tensors -> the structs of params.h -> the launcher.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import run as simt
import torch
from launchers import DTYPES, Launchers
from torch import Tensor

from attnkern import _layout
from attnkern.ops.attention_gate import op, reference
from attnkern.ops.attention_gate.normal_form import evaluate
from attnkern.ops.attention_gate.reference import ACTS, TARGETS, Inputs, Options

_struct = simt.struct
Map = _struct("Map", "data stride_batch:l stride_channel:l stride_position:l")
Branch = _struct("Branch", "scale k0 k1")
_Sizes = _struct(
    "_Sizes",
    "batch:l channels:l gating:l hidden:l x:t kernel:t grid:t g:t",
    t=ctypes.c_int64 * 3,
)
_Inputs = _struct(
    "_Inputs",
    "dtype:i sizes:s act:i slope:d target:i apply:b x:m g:m theta phi bias psi psi_bias taps "
    "tap_weights",
    s=_Sizes,
    m=Map,
    b=ctypes.c_bool,
)
ForwardParams = _struct("ForwardParams", "q y:m workspace", _Inputs, m=Map)
BackwardParams = _struct(
    "BackwardParams",
    "d:m dq q theta_branch:b phi_branch:b dx:m dg:m dtheta dphi dbias dpsi dpsi_bias workspace",
    _Inputs,
    m=Map,
    b=Branch,
)
MomentsParams = _struct("MomentsParams", "mean var workspace", _Inputs)
SumsParams = _struct("SumsParams", "dq theta_scale phi_scale dh dht dhu workspace", _Inputs)
ApplyParams = _struct("ApplyParams", "dtype:i batch:l channels:l length:l x:m alpha y:m", m=Map)
ApplyBackwardParams = _struct(
    "ApplyBackwardParams", "dtype:i batch:l channels:l length:l x:m dy:m alpha dx:m dalpha", m=Map
)
NormParams = _struct(
    "NormParams",
    "dtype:i hidden:l terms:l weight onto bias gamma beta mean var eps:d folded shift scale",
)
NormBackwardParams = _struct(
    "NormBackwardParams", "dtype:i hidden:l count:l dh dht mean var scale eps:d k0 k1 dgamma"
)
Force = _struct("Force", "tile:i warp_tile:i chunk:i chunk_units:l alone:b", b=ctypes.c_bool)
Plan = _struct(
    "Plan",
    "threads:i tile:i warp_tile:i hidden:i passes:i whole:b chunk:i map_stride:i map_size:i weight_stride:i "
    "weight_size:i tiles:l units:l blocks:l slots:l shared_bytes:i blocks_per_sm:i fused:b alone:b "
    "chunk_units:l map_columns:i rows:i weight_columns:i splits:i",
    b=ctypes.c_bool,
)


class Emulated(Launchers):
    folder = "attention_gate"
    sources = ("forward.cu", "backward.cu", "statistics.cu", "norm.cu", "apply.cu", "plan.cpp")
    prefix = "ag"
    planned_names = ("forward", "backward", "moments", "sums")
    names = (*planned_names, "norm", "norm_backward", "apply", "apply_backward")
    mirrors = (
        *(ForwardParams, BackwardParams, MomentsParams, SumsParams),
        *(NormParams, NormBackwardParams, ApplyParams, ApplyBackwardParams, Force, Plan),
    )

    def operators(self) -> tuple[tuple[Any, Any], ...]:
        """Each operator and what serves it here."""
        return (
            (op.attention_gate_fwd, self.forward),
            (op.attention_gate_eval, functools.partial(evaluate, self.forward, self.norm)),
            (op.attention_gate_bwd, self.backward),
            (op.attention_gate_moments, self.moments),
            (op.attention_gate_sums, self.sums),
            (op.gate_norm_fwd, self.norm),
            (op.gate_norm_bwd, self.norm_backward),
            (op.gate_apply_fwd, self.apply),
            (op.gate_apply_bwd, self.apply_backward),
        )

    # ---- the torch operators

    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        i, o = Inputs(*arguments[:9]), Options(*arguments[9:])
        p = ForwardParams()
        self._fill(p, i, o)
        q = i.theta.new_empty(i.x.shape[0], *reference.grid_of(i.x, o))
        target = i.x if o.target == "x" else i.g
        y = torch.empty_like(target) if o.apply else i.x.new_empty(0)
        self._call("forward", p, {"q": q}, {"y": y}, i.x)
        return q, y

    def backward(self, d: Tensor | None, dq: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        i, q, scales, o, needs = (
            Inputs(*rest[:9]),
            rest[9],
            rest[10:16],
            Options(*rest[16:23]),
            rest[23:],
        )
        p = BackwardParams()
        self._fill(p, i, o)
        if d is not None:
            p.d = self._map(d, "d", i.x)
        p.dq, p.q = self.upload(dq, "dq"), self.upload(q, "q")
        p.theta_branch, p.phi_branch = (
            Branch(*(self.upload(t, "branch") for t in scales[k : k + 3])) for k in (0, 3)
        )
        need_x, need_g, need_weights = needs
        hidden = i.theta.shape[0] if need_weights else 0
        maps = {
            "dx": torch.empty_like(i.x) if need_x else i.x.new_empty(0),
            "dg": torch.empty_like(i.g) if need_g else i.x.new_empty(0),
        }
        nothing = i.theta.new_empty(0)
        small = {
            "dtheta": torch.empty_like(i.theta) if need_weights else nothing,
            "dphi": torch.empty_like(i.phi) if need_weights and i.phi is not None else nothing,
            "dbias": i.theta.new_empty(hidden),
            "dpsi": i.theta.new_empty(hidden),
            "dpsi_bias": i.theta.new_empty(int(need_weights)),
        }
        self._call("backward", p, small, maps, i.x)
        return *maps.values(), *small.values()

    def moments(
        self, x: Tensor, weight: Tensor, k1: int, k2: int, k3: int
    ) -> tuple[Tensor, Tensor]:
        p = MomentsParams()
        p.dtype, p.x = DTYPES.index(x.dtype), self._map(x, "x", x)
        p.sizes = _sizes(x, x, weight, Options(k1=k1, k2=k2, k3=k3))
        p.theta = self.upload(weight, "theta")
        outputs = {name: weight.new_empty(weight.shape[0]) for name in ("mean", "var")}
        self._call("moments", p, outputs, {}, x)
        return outputs["mean"], outputs["var"]

    def sums(self, dq: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        i, scales, o = Inputs(*rest[:9]), rest[9:11], Options(*rest[11:])
        p = SumsParams()
        self._fill(p, i, o)
        p.dq = self.upload(dq, "dq")
        p.theta_scale, p.phi_scale = (self.upload(t, "scale") for t in scales)
        outputs = {name: i.theta.new_empty(i.theta.shape[0]) for name in ("dh", "dht", "dhu")}
        self._call("sums", p, outputs, {}, i.x)
        return tuple(outputs.values())

    def norm(self, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        p = NormParams(dtype=DTYPES.index(weight.dtype), eps=rest[-1])
        p.hidden, p.terms = weight.shape
        names = ("weight", "bias", "gamma", "beta", "mean", "var")
        for name, t in zip(names, (weight, *rest[:-1]), strict=True):
            setattr(p, name, self.upload(t, name))
        vectors = {name: weight.new_empty(p.hidden) for name in ("shift", "scale")}
        outputs = {"folded": torch.empty_like(weight), **vectors}
        self._call("norm", p, outputs, {}, weight)
        return tuple(outputs.values())

    def norm_backward(self, dq: Tensor, dh: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        p = NormBackwardParams(dtype=DTYPES.index(dh.dtype), eps=rest[-1])
        p.hidden, p.count = len(dh), dq.numel()
        for name, t in zip(("dh", "dht", "mean", "var", "scale"), (dh, *rest[:-1]), strict=True):
            setattr(p, name, self.upload(t, name))
        outputs = {name: torch.empty_like(dh) for name in ("k0", "k1", "dgamma")}
        self._call("norm_backward", p, outputs, {}, dh)
        return tuple(outputs.values())

    def apply(self, x: Tensor, alpha: Tensor) -> Tensor:
        p, y = ApplyParams(), torch.empty_like(x)
        self._fill_apply(p, x, alpha)
        self._call("apply", p, {}, {"y": y}, x)
        return y

    def apply_backward(self, dy: Tensor, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        p, dx, dalpha = ApplyBackwardParams(), torch.empty_like(x), torch.empty_like(alpha)
        self._fill_apply(p, x, alpha)
        p.dy = self._map(dy, "dy", x)
        self._call("apply_backward", p, {"dalpha": dalpha}, {"dx": dx}, x)
        return dx, dalpha

    # ---- tensors to device memory and back

    def _map(self, t: Tensor, name: str, x: Tensor) -> Any:
        return Map(self.upload(t, name), *_strides(t, x))

    def _fill(self, p: Any, i: Inputs, o: Options) -> None:
        p.dtype, p.sizes = DTYPES.index(i.x.dtype), _sizes(i.x, i.g, i.theta, o)
        p.act, p.slope = ACTS.index(o.act), o.act_slope
        p.target, p.apply = TARGETS.index(o.target), o.apply
        p.x, p.g = self._map(i.x, "x", i.x), self._map(i.g, "g", i.x)
        for name, t in zip(i._fields[2:], i[2:], strict=True):
            setattr(p, name, self.upload(t, name))

    def _fill_apply(self, p: Any, x: Tensor, alpha: Tensor) -> None:
        p.dtype = DTYPES.index(x.dtype)
        p.batch, p.channels, p.length = *x.shape[:2], x[:1, 0].numel() if len(x) else 0
        p.x, p.alpha = self._map(x, "x", x), self.upload(alpha, "alpha")

    def _call(
        self, name: str, p: Any, small: dict[str, Tensor], maps: dict[str, Tensor], x: Tensor
    ) -> None:
        strided = {output: lambda at, t: Map(at, *_strides(t, x)) for output in maps}
        planned = self.planned(Force, Plan) if name in self.planned_names else ()
        self.call(name, p, {**small, **maps}, strided, *planned)


def _strides(t: Tensor, x: Tensor) -> tuple[int, int, int]:
    """Of batch, channels and positions, in x's layout."""
    if not _layout.is_channels_last(x):
        return t.stride(0), t.stride(1), 1
    sizes = zip(reversed(t.shape[2:]), reversed(t.stride()[2:]), strict=True)
    return t.stride(0), 1, next((s for n, s in sizes if n != 1), t.shape[1])


def _sizes(x: Tensor, g: Tensor, theta: Tensor, o: Options) -> Any:
    three = ctypes.c_int64 * 3
    return _Sizes(
        *(x.shape[0], x.shape[1], g.shape[1], theta.shape[0]),
        *(three(*x.shape[2:]), three(o.k1, o.k2, o.k3)),
        *(three(*reference.grid_of(x, o)), three(*g.shape[2:])),
    )
