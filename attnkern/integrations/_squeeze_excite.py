"""Reads the arguments of ``squeeze_excite`` off the children of another library's module.

A call computes what the children say at its time: what was read of them is kept only while none has
changed (``_reading.py``).  An activation swapped, a hook registered or a convolution wrapped after
``optimize`` is honoured, by running the module's own forward where the children's computation cannot
be inlined.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnkern import _activations, _autocast
from attnkern._layers import weight_and_bias
from attnkern._reading import kept
from attnkern.integrations._children import altered, inlinable, refuse_conv, say_refused
from attnkern.ops.squeeze_excite.op import Call, run
from attnkern.ops.squeeze_excite.reference import ACTS, GATES, Options


class Arguments(NamedTuple):
    """What `squeeze_excite` takes besides x."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor | None
    b2: Tensor | None
    act_weight: Tensor | None
    call: Call


def read(fc1: Any, act: Any, fc2: Any, gate: Any) -> Arguments | str:
    """The arguments of a two-layer MLP, or why its children cannot be inlined."""
    hidden, out = _activations.read(act), _activations.read(gate)
    if reason := refuse_conv(fc1) or refuse_conv(fc2):
        return reason
    if reason := _refuse("activation", act, hidden, ACTS) or _refuse("gate", gate, out, GATES):
        return reason
    assert hidden is not None
    assert out is not None
    call = Call("squeeze_excite", Options(hidden.name, hidden.slope, out.name), {}, accepts)
    return Arguments(*weight_and_bias(fc1), *weight_and_bias(fc2), hidden.weight, call)


def read_one_layer(fc: Any, gate: Any) -> Arguments | str:
    """The arguments of effective squeeze-and-excitation's one layer, or why not."""
    out = _activations.read(gate)
    if reason := refuse_conv(fc) or _refuse("gate", gate, out, GATES):
        return reason
    assert out is not None
    call = Call("squeeze_excite", Options("identity", gate=out.name), {}, accepts)
    return Arguments(*weight_and_bias(fc), None, None, None, call)


def _refuse(
    role: str, module: Any, found: _activations.Activation | None, names: tuple[str, ...]
) -> str | None:
    if found is None or found.name not in names:
        extra = f"({module.extra_repr()})" if isinstance(module, nn.Module) else ""
        return f"its {role} {type(module).__name__}{extra} is not supported"
    reason = altered(module)
    return reason and f"its {role} {type(module).__name__} {reason}"


_TENSORS = (Tensor, nn.Parameter)


def accepts(x: Any, src: None, *weights: Tensor | None) -> bool:
    """Whether the stock module would take x and return x's dtype: else its own forward decides."""
    weight = weights[0]
    assert weight is not None
    if not isinstance(x, Tensor) or x.dim() != 4 or (x.numel() == 0 and 0 in x.shape[2:]):
        return False
    if x.device != weight.device or x.size(1) != weight.size(1):
        return False
    dtype = weight.dtype
    for t in weights:
        # sharded and quantised parameters are wrapper subclasses; their convolutions know them
        if t is not None and (
            t.dtype is not dtype
            or (type(t) not in _TENSORS and hasattr(type(t), "__tensor_flatten__"))
        ):
            return False
    if low := _lowered(x):
        return x.dtype == low and dtype in (torch.float32, low)
    return x.dtype == dtype


def _lowered(x: Tensor) -> torch.dtype | None:
    """What autocast would make of a 16-bit x, beside metadata all that `accepts` decides by."""
    return None if x.dtype is torch.float32 else _autocast.lowers_to(x)


def forward(
    module: nn.Module,
    read: Callable[[Any], Arguments | str],
    names: tuple[str, ...],
    x: Any,
    impl: str,
) -> Any:
    """The rerouted forward of a module that is squeeze-and-excitation and nothing else: of its ``names``."""
    arguments = kept(module, read, names)
    if isinstance(arguments, str):
        say_refused(module, arguments)
    elif isinstance(x, Tensor) and inlinable():
        w1, b1, w2, b2, act_weight, call = arguments
        tensors = (x, None, w1, b1, w2, b2, act_weight, None, None)
        result = run(call, impl, tensors, _lowered(x))
        if result is not None:
            return result[0]
    return type(module).forward(module, x)
