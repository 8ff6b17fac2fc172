"""Cases of squeeze_excite, excite and squeeze for tests and benchmarks, and their eager formulation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkern.ops.squeeze_excite.op import excite, squeeze, squeeze_excite
from attnkern.ops.squeeze_excite.reference import ACTS, APPLIES, GATES, OUT_ACTS
from attnkern.testing import Case, OpSpec

WEIGHTS = ("w1", "b1", "w2", "b2", "act_weight")


def _act(x: Tensor, act: str, slope: float, weight: Tensor | None) -> Tensor:
    if act == "prelu":
        assert weight is not None
        return F.prelu(x, weight)
    if act == "leaky_relu":
        return F.leaky_relu(x, slope)
    return x if act == "identity" else getattr(F, act)(x)


def _gate(z: Tensor, gate: str, slope: float, offset: float) -> Tensor:
    if gate == "hard_sigmoid":
        return (slope * z + offset).clamp(0, 1)
    return z if gate == "identity" else getattr(torch, gate)(z)


def eager(
    x: Tensor,
    w1: Tensor | None = None,
    b1: Tensor | None = None,
    w2: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    src: Tensor | None = None,
    act: str = "relu",
    act_slope: float = 0.01,
    act_weight: Tensor | None = None,
    gate: str = "sigmoid",
    gate_slope: float = 1 / 6,
    gate_offset: float = 0.5,
    apply: str = "scale",
    gain: float = 1.0,
    residual: Tensor | None = None,
    drop_path: Tensor | None = None,
    out_act: str = "identity",
    return_gate: bool = False,
) -> Any:
    """squeeze_excite as a model writes it today, every step in x's dtype."""
    spatial = tuple(range(2, x.dim()))
    ones = (1,) * len(spatial)

    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(x.dtype)

    z = x.mean(spatial) if src is None else src.to(x.dtype)
    if w1 is not None:
        z = F.linear(z, w1.flatten(1).to(x.dtype), cast(b1))
    if w2 is not None:
        z = _act(z, act, act_slope, cast(act_weight))
        z = F.linear(z, w2.flatten(1).to(x.dtype), cast(b2))
    channels = x.shape[1]
    g = _gate(z[:, :channels], gate, gate_slope, gate_offset)
    g_map = g.reshape(*g.shape, *ones)
    if apply == "scale":
        y = x * g_map
    elif apply == "scale1p":
        y = x * (1 + g_map)
    elif apply == "scale_shift":
        y = x * g_map + z[:, channels:].reshape(*g.shape, *ones)
    else:
        y = x + g_map
    if gain != 1.0:
        y = y * gain
    if drop_path is not None:
        y = y * drop_path.to(x.dtype).reshape(-1, 1, *ones)
    if residual is not None:
        y = y + residual
    y = _act(y, out_act, 0.0, None)
    return (y, g) if return_gate else y


def _eager_excite(x: Tensor, logits: Tensor, **options: Any) -> Tensor:
    return eager(x, src=logits, **{"gate": "identity", **options})


def _eager_squeeze(x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.dim())))


def case(
    name: str,
    batch: int,
    channels: int,
    spatial: tuple[int, ...],
    hidden: int | None,
    *,
    layers: int = 2,
    bias: bool = True,
    src: bool = False,
    residual: bool = False,
    drop_path: bool = False,
    trailing: int = 0,
    prelu: int = 0,
    **options: Any,
) -> Case:
    """A Case of squeeze_excite; ``trailing`` adds that many ones to the weights' shape."""
    width = 2 * channels if options.get("apply") == "scale_shift" else channels
    first = hidden if layers == 2 else width
    shapes: dict[str, tuple[int, ...]] = {"x": (batch, channels, *spatial)}
    ones = (1,) * trailing
    if layers >= 1:
        assert first is not None
        shapes["w1"] = (first, channels, *ones)
        if bias:
            shapes["b1"] = (first,)
    if layers == 2:
        assert hidden is not None
        shapes["w2"] = (width, hidden, *ones)
        if bias:
            shapes["b2"] = (width,)
    if prelu:
        options["act"] = "prelu"
        shapes["act_weight"] = (prelu,)
    if src:
        shapes["src"] = (batch, channels if layers else width)
    if residual:
        shapes["residual"] = shapes["x"]
    if drop_path:
        shapes["drop_path"] = (batch,)
    scale = {"w1": 2 * channels**-0.5, "w2": 2 * (hidden or 1) ** -0.5}
    per_sample = tuple(k for k in ("x", "src", "residual", "drop_path") if k in shapes)
    return Case(name, shapes, options, ("x", "residual"), WEIGHTS, scale, per_sample)


# Sizes are odd on purpose: no vector width divides them.
CASES = [
    case("resnet", 3, 64, (14, 14), 8, trailing=2),
    case("effnet", 2, 51, (7, 9), 13, act="silu", trailing=2),
    case("mobilenet", 2, 72, (5, 6), 24, gate="hard_sigmoid"),
    case("no_bias", 2, 40, (6, 6), 10, bias=False),
    case("ese", 2, 33, (7, 7), None, layers=1, gate="hard_sigmoid"),
    case("1d", 3, 19, (37,), 5),
    case("3d", 2, 12, (3, 5, 7), 6, act="leaky_relu", act_slope=0.2, trailing=3),
    case("one_pixel", 4, 24, (1, 1), 6),
    case("one_channel", 2, 1, (9, 9), 1),
    case("one_sample_long", 1, 6, (97, 101), 3),
    case("wide", 1, 700, (3, 3), 44),
    case("gate_returned", 2, 20, (5, 5), 5, return_gate=True),
    case("src", 2, 20, (5, 5), 5, src=True),
    case("src_shift", 2, 20, (5, 5), 5, src=True, apply="scale_shift"),
    case("residual_relu", 3, 37, (7, 7), 9, residual=True, out_act="relu"),
    case(
        "residual_relu_drop_path", 3, 32, (8, 8), 8, residual=True, drop_path=True, out_act="relu"
    ),
    case(
        "residual_silu", 2, 37, (7, 5), 9, residual=True, drop_path=True, gain=2.0, out_act="silu"
    ),
    case("lc0", 2, 48, (8, 8), 16, act="mish", apply="scale_shift", residual=True, out_act="relu"),
    case("prelu_shared", 2, 24, (5, 5), 6, prelu=1),
    case("prelu", 2, 24, (5, 5), 6, prelu=6),
    *(case(f"act_{act}", 2, 22, (5, 5), 7, act=act) for act in ACTS if act != "prelu"),
    *(case(f"gate_{gate}", 2, 22, (5, 5), 7, gate=gate) for gate in GATES),
    *(case(f"apply_{a}", 2, 22, (5, 5), 7, apply=a, drop_path=True, gain=0.5) for a in APPLIES),
    *(case(f"out_{a}", 2, 22, (5, 5), 7, out_act=a) for a in OUT_ACTS),
    *(case(f"res_out_{a}", 2, 22, (5, 5), 7, residual=True, out_act=a) for a in OUT_ACTS),
]


def _excite_case(c: Case) -> Case:
    shapes = {"logits" if k == "src" else k: v for k, v in c.shapes.items()}
    per_sample = tuple("logits" if k == "src" else k for k in c.per_sample)
    return Case(c.name, shapes, c.options, c.maps, c.weights, c.scale, per_sample)


_EXCITE: dict[str, dict[str, Any]] = {
    "plain": {},
    "sigmoid_residual_relu": {"gate": "sigmoid", "residual": True, "out_act": "relu"},
    "shift_drop_path": {"apply": "scale_shift", "drop_path": True, "out_act": "gelu"},
}

SPECS = [
    OpSpec("squeeze_excite", squeeze_excite, eager, CASES, "squeeze_excite_fwd"),
    OpSpec(
        "excite",
        excite,
        _eager_excite,
        [
            _excite_case(case(name, 2, 21, (6, 5), None, layers=0, src=True, **options))
            for name, options in _EXCITE.items()
        ],
        "squeeze_excite_fwd",
    ),
    OpSpec(
        "squeeze",
        squeeze,
        _eager_squeeze,
        [
            Case("2d", {"x": (3, 21, 6, 5)}, per_sample=("x",)),
            Case("3d", {"x": (2, 5, 4, 6, 5)}, per_sample=("x",)),
            Case("1d", {"x": (2, 9, 401)}, per_sample=("x",)),
        ],
        "squeeze_fwd",
    ),
]
