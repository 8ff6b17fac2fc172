"""What a call of squeeze_excite, excite or squeeze must be, from metadata alone; errors name op and argument."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnkern import _checks
from attnkern.ops.squeeze_excite.reference import ACTS, APPLIES, GATES, OUT_ACTS, Options


def check_call(op: str, o: Options, tensors: tuple[Any, ...]) -> None:
    """Raise TypeError or ValueError unless the operator can compute these arguments."""
    x, src, w1, b1, w2, b2, act_weight, residual, drop_path = tensors
    check_map(op, x)
    _check_options(op, o)
    _check_mlp(op, x, src, w1, b1, w2, b2, act_weight, o)
    _check_epilogue(op, x, residual, drop_path)


def logits_width(channels: int, apply: str) -> int:
    return 2 * channels if apply == "scale_shift" else channels


def check_map(op: str, x: Any) -> None:
    _checks.tensor(op, "x", x)
    _checks.strided(op, "x", x)
    _checks.dtype(op, "x", x, _checks.DTYPES)
    if not 3 <= x.dim() <= 5:
        _checks.fail(op, "x", "have shape [B, C, *spatial] with 1 to 3 spatial dims", list(x.shape))
    for axis, size in enumerate(x.shape[1:], 1):
        if size == 0:
            _checks.fail(op, "x", f"have at least one element along dim {axis}", list(x.shape))


def _check_options(op: str, o: Options) -> None:
    _checks.choice(op, "act", o.act, ACTS)
    _checks.choice(op, "gate", o.gate, GATES)
    _checks.choice(op, "apply", o.apply, APPLIES)
    _checks.choice(op, "out_act", o.out_act, OUT_ACTS)
    _checks.number(op, "act_slope", o.act_slope, minimum=0)
    _checks.number(op, "gate_slope", o.gate_slope, minimum=0)
    _checks.number(op, "gate_offset", o.gate_offset)
    _checks.number(op, "gain", o.gain)


def _check_mlp(
    op: str,
    x: Tensor,
    src: Any,
    w1: Any,
    b1: Any,
    w2: Any,
    b2: Any,
    act_weight: Any,
    o: Options,
) -> None:
    src_name = "logits" if op == "excite" else "src"
    channels = x.shape[1]
    width = logits_width(channels, o.apply)
    if w1 is None:
        for name, value in (("b1", b1), ("w2", w2), ("b2", b2)):
            if value is not None:
                _checks.fail(op, name, "be None when w1 is None", "a tensor")
    if w2 is None and b2 is not None:
        _checks.fail(op, "b2", "be None when w2 is None", "a tensor")
    if o.act == "prelu" and w2 is None:
        _checks.fail(op, "w2", 'be given when act="prelu", which acts on the hidden layer', None)
    if (o.act == "prelu") != (act_weight is not None):
        _checks.fail(
            op,
            "act_weight",
            'be given exactly when act="prelu"',
            f"act={o.act!r} and {type(act_weight).__name__}",
        )
    if src is not None:
        _checks.operand(op, src_name, src, x)
        inputs = width if w1 is None else channels
        if src.shape[:2] != (x.shape[0], inputs) or src.numel() != x.shape[0] * inputs:
            _checks.fail(op, src_name, f"have shape [B={x.shape[0]}, {inputs}]", list(src.shape))
    elif w1 is None:
        _checks.fail(op, src_name, "be given when w1 is None", None)
    if w1 is None:
        return
    weights = {"w1": w1, "b1": b1, "w2": w2, "b2": b2, "act_weight": act_weight}
    for name, value in weights.items():
        if value is not None:
            _checks.operand(op, name, value, x)
            if value.dtype != w1.dtype:
                _checks.fail(op, name, f"have the dtype of w1 ({w1.dtype})", value.dtype)
    hidden = width if w2 is None else w1.shape[0] if w1.dim() else 0
    wide = ("2C" if o.apply == "scale_shift" else "C", width)
    first = wide if w2 is None else "R"
    _checks.shape(op, "w1", w1, first, ("C", channels), note=" (and trailing ones)")
    if w2 is not None:
        _checks.shape(op, "w2", w2, wide, ("R", hidden), note=" (and trailing ones)")
    for name, size in (("b1", hidden), ("b2", width)):
        value = weights[name]
        if value is not None and tuple(value.shape) != (size,):
            _checks.fail(op, name, f"have shape [{size}]", list(value.shape))
    if act_weight is not None and tuple(act_weight.shape) not in ((1,), (hidden,)):
        _checks.fail(op, "act_weight", f"have shape [1] or [R={hidden}]", list(act_weight.shape))


def _check_epilogue(op: str, x: Tensor, residual: Any, drop_path: Any) -> None:
    if residual is not None:
        _checks.operand(op, "residual", residual, x, dtypes=(x.dtype,))
        if residual.shape != x.shape:
            _checks.fail(
                op, "residual", f"have the shape of x {list(x.shape)}", list(residual.shape)
            )
    if drop_path is not None:
        _checks.operand(op, "drop_path", drop_path, x)
        if (
            drop_path.dim() == 0
            or drop_path.shape[0] != x.shape[0]
            or drop_path.numel() != x.shape[0]
        ):
            _checks.fail(op, "drop_path", f"have shape [B={x.shape[0]}]", list(drop_path.shape))
