"""Squeeze-and-excitation's CUDA launchers on the emulator, as its torch operators.

What register.cpp does for the device: tensors -> the structs of params.h -> the launcher.
"""

from __future__ import annotations

import ctypes
from typing import Any

import run as simt
import torch
from launchers import DTYPES, Launchers
from torch import Tensor

from attnkern import _layout
from attnkern.ops.squeeze_excite import op
from attnkern.ops.squeeze_excite.reference import Options, accumulation_dtype

# the order of the enumerators in csrc
_ACTS = ["identity", "relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu", "mish", "prelu"]
_GATES = ["identity", "sigmoid", "hard_sigmoid", "relu", "tanh"]
_APPLIES = ["scale", "scale1p", "scale_shift", "shift"]

_struct = simt.struct
Map = _struct("Map", "data stride_batch:l stride_row:l")
_Sizes = _struct("_Sizes", "batch:l channels:l length:l hidden:l width:l")
_Options = _struct(
    "_Options", "act:i act_slope:d gate:i gate_slope:d gate_offset:d apply:i gain:d out_act:i"
)
_Inputs = _struct(
    "_Inputs",
    "dtype:i weight_dtype:i layout:i sizes:s options:o x:m src w1 b1 w2 b2 act_weight "
    "act_weight_stride:l residual:m drop_path",
    s=_Sizes,
    o=_Options,
    m=Map,
)
ForwardParams = _struct("ForwardParams", "y:m mean hidden logits mask workspace", _Inputs, m=Map)
BackwardParams = _struct(
    "BackwardParams",
    "dy:m dlogits mean hidden logits mask dx:m dsrc dw1 db1 dw2 db2 dact_weight "
    "dresidual:m ddrop_path workspace",
    _Inputs,
    m=Map,
)
Force = _struct("Force", "strategy:i cluster:i threads:i chunk:l")


class Emulated(Launchers):
    folder = "squeeze_excite"
    sources = ("forward.cu", "backward.cu", "plan.cpp")
    prefix = "se"
    names = ("forward", "backward", "squeeze", "public_forward", "public_backward")
    mirrors = (ForwardParams, BackwardParams, Force)

    def operators(self) -> tuple[tuple[Any, Any], ...]:
        """Each operator and what serves it here."""
        return (
            (op.squeeze_excite_fwd, self.forward),
            (op.squeeze_excite_bwd, self.backward),
            (op.squeeze_fwd, self.squeeze),
        )

    # ---- the torch operators

    def forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        tensors, options, save_mask = arguments[:9], Options(*arguments[9:17]), arguments[17]
        x, src, w1, w2 = tensors[0], tensors[1], tensors[2], tensors[4]
        p = ForwardParams()
        self._fill(p, tensors, options)
        s = p.sizes
        small = torch.empty(0, dtype=accumulation_dtype(x.dtype))
        mean = small.new_empty(s.batch, s.channels) if src is None else small
        hidden = small if w1 is None or w2 is None else small.new_empty(s.batch, s.hidden)
        columns = s.channels if p.layout else s.length
        rows = s.batch * s.channels * s.length // columns
        mask = torch.empty((rows, (columns + 7) // 8) if save_mask else 0, dtype=torch.uint8)
        outputs = (torch.empty_like(x), mean, hidden, small.new_empty(s.batch, s.width), mask)
        self._call(
            "forward", p, dict(zip(("y", "mean", "hidden", "logits", "mask"), outputs, strict=True))
        )
        return outputs

    def backward(self, dy: Tensor, dlogits: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        tensors, saved, options = rest[:9], rest[9:13], Options(*rest[13:21])
        need_dx, need_dw, need_dresidual = rest[21:]
        p = BackwardParams()
        self._fill(p, tensors, options)
        p.dy = self._map(dy, "dy", p.layout)
        p.dlogits = self.upload(dlogits, "dlogits")
        for name, t in zip(("mean", "hidden", "logits", "mask"), saved, strict=True):
            setattr(p, name, self.upload(t, name))
        x, src, w1, b1, w2, b2, act_weight, _, drop_path = tensors
        wanted = {
            "dx": x if need_dx else None,
            "dsrc": src,
            **{
                f"d{name}": t if need_dw else None
                for name, t in zip(
                    ("w1", "b1", "w2", "b2", "act_weight"),
                    (w1, b1, w2, b2, act_weight),
                    strict=True,
                )
            },
            "dresidual": x if need_dresidual else None,
            "ddrop_path": drop_path,
        }
        outputs = {
            name: x.new_empty(0) if t is None else torch.empty_like(t) for name, t in wanted.items()
        }
        self._call("backward", p, outputs)
        return tuple(outputs.values())

    def squeeze(self, x: Tensor) -> Tensor:
        p = ForwardParams()
        self._fill(p, (x, *(None,) * 8), Options())
        mean = torch.empty(x.shape[:2], dtype=accumulation_dtype(x.dtype))
        self._call("squeeze", p, {"mean": mean})
        return mean

    # ---- tensors to device memory and back

    def _map(self, t: Tensor, name: str, channels_last: int) -> Any:
        return Map(self.upload(t, name), t.stride(0), self._row(t, channels_last))

    @staticmethod
    def _row(t: Tensor, channels_last: int) -> int:
        if not channels_last:
            return t.stride(1)
        strides = [s for n, s in zip(t.shape[2:], t.stride()[2:], strict=True) if n != 1]
        return strides[-1] if strides else t.shape[1]

    def _fill(self, p: Any, tensors: tuple[Tensor | None, ...], o: Options) -> None:
        x, src, w1, b1, w2, b2, act_weight, residual, drop_path = tensors
        assert x is not None
        channels = x.shape[1]
        p.dtype = DTYPES.index(x.dtype)
        p.weight_dtype = DTYPES.index(accumulation_dtype(x.dtype) if w1 is None else w1.dtype)
        p.layout = int(_layout.is_channels_last(x))
        width = 2 * channels if o.apply == "scale_shift" else channels
        hidden = w1.shape[0] if w1 is not None and w2 is not None else 0
        p.sizes = _Sizes(x.shape[0], channels, x[0, 0].numel() if len(x) else 1, hidden, width)
        p.options = _Options(
            *(_ACTS.index(o.act), o.act_slope, _GATES.index(o.gate), o.gate_slope, o.gate_offset),
            *(_APPLIES.index(o.apply), o.gain, _ACTS.index(o.out_act)),
        )
        p.x = self._map(x, "x", p.layout)
        if residual is not None:
            p.residual = self._map(residual, "residual", p.layout)
        p.act_weight_stride = int(act_weight is not None and act_weight.numel() > 1)
        small = {"src": src, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
        for name, t in {**small, "act_weight": act_weight, "drop_path": drop_path}.items():
            setattr(p, name, self.upload(t, name))

    def _call(self, direction: str, p: Any, outputs: dict[str, Tensor]) -> None:
        strided = dict.fromkeys(
            ("y", "dx", "dresidual"),
            lambda at, t: Map(at, t.stride(0), self._row(t, p.layout)),
        )
        if direction == "squeeze":
            self.call("squeeze", p, outputs, strided)
        elif self.force is None:
            self.call(f"public_{direction}", p, outputs, strided)
        else:
            force = Force(**{"strategy": -1, **self.force})
            plan = (ctypes.c_int64 * 6)()
            self.call(direction, p, outputs, strided, ctypes.byref(force), plan)
            names = ("strategy", "cluster", "threads", "vector", "pieces", "grid")
            self.plans.append(dict(zip(names, plan, strict=True)))
