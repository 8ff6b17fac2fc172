"""Softmax pooling's CUDA launchers on the emulator, as its torch operators.

What register.cpp does for the device: tensors -> the structs of params.h -> the launcher.
"""

from __future__ import annotations

import ctypes
from typing import Any

import run as simt
import torch
from launchers import DTYPES, Launchers
from torch import Tensor

from attnkern.ops.softmax_pool import op
from attnkern.ops.softmax_pool.reference import ACTS, SCORERS, Inputs, Options, accumulation_dtype

_struct = simt.struct
Items = _struct("Items", "data stride_batch:l stride_head:l stride_item:l stride_feature:l")
Rows = _struct("Rows", "data stride_batch:l stride_head:l stride_query:l")
_Sizes = _struct("_Sizes", "batch:l heads:l items:l queries:l features:l hidden:l")
_Inputs = _struct(
    "_Inputs",
    "dtype:i sizes:s scorer:i act:i scale:d values:t keys:t query:r scores:r V b_V U b_U w "
    "c:r bias:r offsets",
    s=_Sizes,
    t=Items,
    r=Rows,
)
ForwardParams = _struct("ForwardParams", "z lse top scores_out whole peaks workspace", _Inputs)
BackwardParams = _struct(
    "BackwardParams",
    "dz z dlse dscores top dvalues:t dkeys:t dquery dlogits dV db_V dU db_U dw workspace",
    _Inputs,
    t=Items,
)
Force = _struct("Force", "pieces:l tile:i")
Plan = _struct(
    "Plan",
    "threads:i product:b held:b stages:i tile:i value_width:i key_width:i block_queries:i "
    "padded_queries:i query_blocks:i length:l pieces:l units:l block_units:l "
    "slots:l chunk_units:l splits:i grid:l shared_bytes:i blocks_per_sm:i force:f",
    b=ctypes.c_bool,
    f=Force,
)


class Emulated(Launchers):
    folder = "softmax_pool"
    sources = ("forward.cu", "backward.cu", "plan.cpp")
    prefix = "sp"
    names = ("forward", "backward")
    mirrors = (ForwardParams, BackwardParams, Force, Plan)

    def operators(self) -> tuple[tuple[Any, Any], ...]:
        """Each operator and what serves it here."""
        return (op.softmax_pool_fwd, self.forward), (op.softmax_pool_bwd, self.backward)

    # ---- the torch operators

    def forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        i, options, return_scores = (
            Inputs(*arguments[:12]),
            Options(*arguments[12:15]),
            arguments[15],
        )
        p = ForwardParams()
        self._fill(p, i, options)
        batch, heads, items, features = i.values.shape
        rows = op.rows_of(i)
        small = torch.empty(0, dtype=accumulation_dtype(i.values.dtype))
        outputs = {
            "z": i.values.new_empty(*rows, features, dtype=torch.float32),
            "lse": small.new_empty(rows),
            "top": small.new_empty(2, *rows),
            "scores_out": small.new_empty((batch, heads, rows[2], items) if return_scores else 0),
        }
        self.call("forward", p, outputs, {}, *self.planned(Force, Plan))
        return tuple(outputs.values())

    def backward(
        self, dz: Tensor, z: Tensor, dlse: Tensor | None, dscores: Tensor | None, *rest: Any
    ) -> tuple[Tensor, ...]:
        i, top, options, needs = Inputs(*rest[:12]), rest[12], Options(*rest[13:16]), rest[16:]
        p = BackwardParams()
        self._fill(p, i, options)
        given = {"dz": dz, "z": z, "dlse": dlse, "dscores": dscores, "top": top}
        for name, t in given.items():
            setattr(p, name, self.upload(t, name))
        values, keys, query, weights, logits = needs
        batch, heads, items, _ = i.values.shape

        def like(t: Tensor | None, needed: bool, dtype: torch.dtype | None = None) -> Tensor:
            empty = i.values.new_empty(0)
            return torch.empty_like(t, dtype=dtype) if t is not None and needed else empty

        outputs = {
            "dvalues": like(i.values, values),
            "dkeys": like(i.keys, keys),
            "dquery": like(i.query, query),
            "dlogits": top.new_empty((batch, heads, dz.shape[2], items) if logits else 0),
            **{
                f"d{name}": like(getattr(i, name), weights, top.dtype)
                for name in ("V", "b_V", "U", "b_U", "w")
            },
        }
        strided = dict.fromkeys(("dvalues", "dkeys"), lambda at, t: Items(at, *t.stride()))
        self.call("backward", p, outputs, strided, *self.planned(Force, Plan))
        return tuple(outputs.values())

    # ---- tensors to device memory and back

    def _rows(self, t: Tensor | None, name: str) -> Any:
        """The strides of [B, H, M, ...], 0 along axes of size 1."""
        if t is None or t.numel() == 0:
            return Rows()
        strides = (s if n > 1 else 0 for n, s in zip(t.shape[:3], t.stride()[:3], strict=True))
        return Rows(self.upload(t, name), *strides)

    def _fill(self, p: Any, i: Inputs, o: Options) -> None:
        batch, _, queries = op.rows_of(i)
        _, heads, items, features = i.values.shape
        p.dtype = DTYPES.index(i.values.dtype)
        hidden = 0
        if o.scorer == "gated":
            hidden = i.V.shape[0]
        elif o.scorer != "given":
            hidden = features if i.keys is None else i.keys.shape[3]
        p.sizes = _Sizes(batch, heads, items, queries, features, hidden)
        p.scorer, p.act, p.scale = SCORERS.index(o.scorer), ACTS.index(o.act), o.scale
        p.values = Items(self.upload(i.values, "values"), *i.values.stride())
        if i.keys is not None:
            p.keys = Items(self.upload(i.keys, "keys"), *i.keys.stride())
        for name in ("query", "scores", "c", "bias"):
            setattr(p, name, self._rows(getattr(i, name), name))
        for name in ("V", "b_V", "U", "b_U", "w", "offsets"):
            setattr(p, name, self.upload(getattr(i, name), name))
