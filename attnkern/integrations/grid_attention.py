"""Attention-Gated-Networks' grid attention, 2-D and 3-D, as copied: (W(alpha x), alpha).

``_GridAttentionBlockND`` in its three modes, and ``_GridAttentionBlockND_TORR`` (the classifier's) where it
normalises by a sigmoid or a softmax.  A ``MultiAttentionBlock`` is served by its two gates.
"""

from __future__ import annotations

from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from attnkern import _autocast
from attnkern._activations import qualified_name
from attnkern._reading import kept
from attnkern.integrations import Rule, _attention_gate
from attnkern.integrations._attention_gate import Arguments, Layer
from attnkern.integrations._structure import by_name, refers_to

_CHILDREN = {"theta", "phi", "psi", "W"}
_NAMES = (
    "theta phi psi W F torch nn functional upsample interpolate upsample_mode relu softplus sigmoid "
    "softmax size shape view reshape flatten expand_as"
)
_TORR = f"{_NAMES} nl1 mode sum min max NotImplementedError"
_MODES = {"concatenation_sigmoid": "sigmoid", "concatenation_softmax": "softmax"}
_LINEAR = {nn.Conv1d: "linear", nn.Conv2d: "bilinear", nn.Conv3d: "trilinear"}


_READ = ("theta", "phi", "psi", "W", "operation_function", "upsample_mode", "mode", "nl1")


def _is_gate(m: nn.Module) -> bool:
    """A lambda may stand for any child of the classifier's, which says so by its nl1."""
    children = {*m._modules, *m._parameters}
    return children == _CHILDREN or ("nl1" in vars(m) and bool(children) and children < _CHILDREN)


def _operation(m: Any) -> Any:
    """The function that its forward calls with m first; None where it is none of its class."""
    operation = vars(m).get("operation_function")
    if operation is None:
        return type(m).forward
    own = type(operation) is MethodType and operation.__self__ is m
    return operation.__func__ if own else None


def _read(m: Any) -> Arguments | str:
    """What the code names, the trial confirms."""
    operation, c = _operation(m), m._modules
    if missing := [name for name in ("theta", "phi", "psi") if name not in c]:
        return f"it has no layer {missing[0]}"
    code = getattr(operation, "__code__", None)
    torr = code and "nl1" in code.co_names
    if not code or not refers_to(operation, _TORR if torr else _NAMES, exactly=False):
        return "its operation_function does other things"
    if not torr:
        act = "softplus" if "softplus" in code.co_names else "relu"
        gate = "softmax" if "softmax" in code.co_names else "sigmoid"
    else:
        mode, nl1 = (getattr(m, name, None) for name in ("mode", "nl1"))
        if mode not in [*_MODES]:
            return f"its mode is {mode}, neither a sigmoid nor a softmax"
        if not isinstance(nl1, FunctionType):
            return f"its nl1 is a {qualified_name(type(nl1))}"
        # one that refers to nothing returns what it is given
        act, gate = "relu" if nl1.__code__.co_names else "leaky_relu", _MODES[mode]
    out: Layer | str | None = None
    if "W" in c:
        out = _attention_gate.layer("W", c["W"]) if type(c["W"]) is nn.Sequential else Layer(c["W"])
    return _attention_gate.read(
        *(Layer(c["theta"]), Layer(c["phi"]), Layer(c["psi"]), out),
        act=act,
        act_slope=1.0,
        gate=gate,
        upsample=getattr(m, "upsample_mode", None) or _LINEAR.get(type(c["theta"])),
        align_corners=_aligns_corners(code),
    )


def _aligns_corners(code: CodeType) -> bool:
    """Whether it is spelled out, and as True: nothing else in such code is False."""
    named = any(isinstance(c, tuple) and "align_corners" in c for c in code.co_consts)
    return named and not any(c is False for c in code.co_consts)


def _trial(m: Any) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)

    def noise(channels: int, *sizes: int) -> Tensor:
        shape = (2, channels, *sizes)
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    kernel = m.theta.kernel_size
    x = noise(m.theta.in_channels, *(3 * k + 1 for k in kernel))
    return x, noise(m.phi.in_channels, *(2 for _ in kernel))


def grid_attention(module: Any, *given: Any, impl: str, **named: Any) -> Any:
    """forward(x, g)"""
    maps = by_name(module, given, named)
    a: Any = kept(module, _read, _READ)
    if len(maps) != 2 or not _attention_gate.ready(module, a, *maps):
        return type(module).forward(module, *given, **named)
    x = maps[0]
    y, _, alpha = _attention_gate.call(a, *maps, impl, return_alpha=True)
    if low := _autocast.lowers_to(x):
        wide = x.is_cuda and a.options["gate"] == "softmax"  # which autocast gives float32 there
        alpha = alpha.to(torch.float32 if wide else low)
        y = y.to(
            torch.promote_types(x.dtype, alpha.dtype) if "out_weight" not in a.weights else low
        )
    return y, alpha


RULES = (
    Rule(
        "Attention-Gated-Networks' GridAttentionBlock",
        "attention_gate",
        "attention_gate_fwd",
        _read,
        grid_attention,
        {"forward": f"operation_function {_TORR}"},
        structure=_is_gate,
        trial=_trial,
    ),
)
