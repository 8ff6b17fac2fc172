"""Whether a module's children compute what their classes say, so that it can be inlined."""

from __future__ import annotations

from typing import Any

import torch.nn.modules.module as _module
from torch import nn

from attnkern._activations import qualified_name
from attnkern._layers import hooked
from attnkern._once import say_once
from attnkern.integrations import is_rerouted


def altered(module: nn.Module) -> str | None:
    """What of ``module`` would not run if its computation were inlined; None when nothing."""
    if hooked(module):
        return "has hooks"
    if "forward" in module.__dict__ and not is_rerouted(module):
        return "has a replaced forward"
    return None


def refuse_child(role: str, module: Any, *classes: type) -> str | None:
    """Why a child's computation cannot be inlined; None when it is plainly one of ``classes``."""
    if type(module) not in classes:
        return f"its {role} is a {qualified_name(type(module))}"
    reason = altered(module)
    return reason and f"its {role} {reason}"


def refuse_linear(role: str, layer: Any, outputs: int | None = None) -> str | None:
    if reason := refuse_child(role, layer, nn.Linear):
        return reason
    if outputs is not None and layer.out_features != outputs:
        return f"its {role} has {layer.out_features} outputs, not {outputs}"
    return None


def refuse_conv(conv: Any) -> str | None:
    if type(conv) is not nn.Conv2d:
        return f"its 1x1 convolution is a {qualified_name(type(conv))}"
    if conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.padding != (0, 0):
        return f"its convolution is not a plain 1x1 one: {conv}"
    if conv.groups != 1:
        return f"its 1x1 convolution has {conv.groups} groups"
    reason = altered(conv)
    return reason and f"its 1x1 convolution {reason}"


def inlinable() -> bool:
    """Whether no hook watches every module of the process, children included."""
    return not (
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def say_refused(module: nn.Module, reason: str) -> None:
    """That a module was optimized, and why its own forward runs."""
    name = type(module).__name__
    say_once(lambda: f"attnkern: {name} was optimized but runs its own forward: {reason}")
