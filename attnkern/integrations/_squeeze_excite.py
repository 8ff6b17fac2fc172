"""Reads the arguments of ``squeeze_excite`` off the children of another library's module.

Everything is read at the time of the call, so that a module always computes what its children say
now: an activation swapped, a hook registered or a convolution wrapped after ``optimize`` is
honoured, by running the module's own forward where the children's computation cannot be inlined.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnkern import _activations, _autocast
from attnkern._layers import weight_and_bias
from attnkern.integrations._children import altered, inlinable, refuse_conv, say_refused
from attnkern.ops.squeeze_excite.op import squeeze_excite
from attnkern.ops.squeeze_excite.reference import ACTS, GATES


class Arguments(NamedTuple):
    """What `squeeze_excite` takes besides x."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor | None
    b2: Tensor | None
    act: str
    act_slope: float
    act_weight: Tensor | None
    gate: str


def read(fc1: Any, act: Any, fc2: Any, gate: Any) -> Arguments | str:
    """The arguments of a two-layer MLP, or why its children cannot be inlined."""
    hidden, out = _activations.read(act), _activations.read(gate)
    if reason := refuse_conv(fc1) or refuse_conv(fc2):
        return reason
    if reason := _refuse("activation", act, hidden, ACTS) or _refuse("gate", gate, out, GATES):
        return reason
    assert hidden is not None
    assert out is not None
    w1, b1, w2, b2 = *weight_and_bias(fc1), *weight_and_bias(fc2)
    return Arguments(w1, b1, w2, b2, hidden.name, hidden.slope, hidden.weight, out.name)


def read_one_layer(fc: Any, gate: Any) -> Arguments | str:
    """The arguments of effective squeeze-and-excitation's one layer, or why not."""
    out = _activations.read(gate)
    if reason := refuse_conv(fc) or _refuse("gate", gate, out, GATES):
        return reason
    assert out is not None
    return Arguments(*weight_and_bias(fc), None, None, "identity", 0.01, None, out.name)


def _refuse(
    role: str, module: Any, found: _activations.Activation | None, names: tuple[str, ...]
) -> str | None:
    if found is None or found.name not in names:
        extra = f"({module.extra_repr()})" if isinstance(module, nn.Module) else ""
        return f"its {role} {type(module).__name__}{extra} is not supported"
    reason = altered(module)
    return reason and f"its {role} {type(module).__name__} {reason}"


_TENSORS = (Tensor, nn.Parameter)


def accepts(x: Any, arguments: Arguments) -> bool:
    """Whether the stock module would take x and return x's dtype: else its own forward decides."""
    if not isinstance(x, Tensor) or x.dim() != 4 or (x.numel() == 0 and 0 in x.shape[2:]):
        return False
    weight = arguments.w1
    if x.device != weight.device or x.size(1) != weight.size(1):
        return False
    dtype = weight.dtype
    for t in (weight, arguments.b1, arguments.w2, arguments.b2, arguments.act_weight):
        # sharded and quantised parameters are wrapper subclasses; their convolutions know them
        if t is not None and (
            t.dtype is not dtype
            or (type(t) not in _TENSORS and hasattr(type(t), "__tensor_flatten__"))
        ):
            return False
    if x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64):
        return True
    if low := _autocast.lowers_to(x):
        return x.dtype in (torch.float32, low) and weight.dtype in (torch.float32, x.dtype)
    return x.dtype == weight.dtype


def forward(module: nn.Module, arguments: Arguments | str, x: Any, impl: str) -> Any:
    """The rerouted forward of a module that is squeeze-and-excitation and nothing else."""
    if isinstance(arguments, str):
        say_refused(module, arguments)
    elif inlinable() and accepts(x, arguments):
        return call(x, arguments, impl)
    return type(module).forward(module, x)


def call(x: Tensor, arguments: Arguments, impl: str, **epilogue: Any) -> Tensor:
    w1, b1, w2, b2, act, act_slope, act_weight, gate = arguments
    return squeeze_excite(
        *(x, w1, b1, w2, b2),
        act=act,
        act_slope=act_slope,
        act_weight=act_weight,
        gate=gate,
        impl=impl,
        **epilogue,
    )
