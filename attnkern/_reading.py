"""Keeps what was read from a module's children until one of them has changed.

Between two calls the convolutions of a network push our code and Python's out of the caches. To read
four children anew then takes 32 us (2 where nothing came between), to see that they are what they
were 20: a few loops that run no function of Python's.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from attnkern._layers import HOOKS

_SILENT = {"training", "inplace", "in_channels", "out_channels", "transposed", "output_padding"}
"""Attributes of stock layers that say nothing of what they compute."""


def kept(module: Any, read: Callable[[Any], Any], names: tuple[str, ...]) -> Any:
    """``read(module)``, which reads the children and attributes ``names`` and what is below them.

    A tuple is kept, with the module, where each tensor in it is a parameter of a child; anything else
    is a reason why not, and read again.
    """
    if is_dynamo_compiling():
        return read(module)
    reading = module.__dict__.get("_reading")
    if reading is not None and reading.holds(module):
        return reading.value
    value = read(module)
    reading = _Reading(module, value, names) if isinstance(value, tuple) else None
    if reading is not None and reading.may_be_kept():
        module.__dict__["_reading"] = reading
    else:
        module.__dict__.pop("_reading", None)
    return value


class _Reading:
    """A value, and the places that it was read from with what was there."""

    __slots__ = (
        *("attributes", "classes", "containers", "dicts", "hook_names", "hooked", "keys", "layers"),
        *("lengths", "modules", "names", "value", "values"),
    )

    def __init__(self, module: Any, value: tuple[Any, ...], names: tuple[str, ...]):
        self.value, self.modules = value, module._modules
        self.names = [name for name in names if name in module.__dict__]
        self.attributes = [module.__dict__[name] for name in self.names]
        children = [c for name in names if (c := self.modules.get(name)) is not None]
        self.layers = [m for child in children for m in child.modules()]
        self.classes = [*map(type, self.layers)]
        self.containers = [m._modules for m in self.layers if m._modules]
        self.lengths = [*map(len, self.containers)]
        self.hooked = [m.__dict__ for m in self.layers for _ in HOOKS]
        self.hook_names = HOOKS * len(self.layers)
        places: list[tuple[Any, str]] = [(self.modules, name) for name in names]
        places += ((d, key) for d in self.attributes if isinstance(d, dict) for key in d)
        for m in self.layers:
            tables = [t for t in ("_parameters", "_buffers", "_modules") if m.__dict__[t]]
            own = {key for key in m.__dict__ if not key.startswith("_")} - _SILENT
            places += ((m.__dict__, key) for key in {*own, *tables, "forward"})
            places += ((m.__dict__[table], key) for table in tables for key in m.__dict__[table])
        self.dicts, self.keys = [d for d, _ in places], [key for _, key in places]
        self.values = [*map(dict.get, self.dicts, self.keys)]

    def holds(self, module: Any) -> bool:
        """Whether nothing that the value was read from has changed."""
        return (
            module._modules is self.modules
            and all(map(is_, map(dict.get, self.dicts, self.keys), self.values))
            and all(map(is_, map(type, self.layers), self.classes))
            and [*map(len, self.containers)] == self.lengths
            and not any(map(dict.get, self.hooked, self.hook_names))
            and all(map(is_, map(module.__dict__.get, self.names), self.attributes))
        )

    def may_be_kept(self) -> bool:
        """Not a weight that is computed, or swapped in for one call."""
        parameters = [p for p in self.values if isinstance(p, nn.Parameter)]
        fields = (f.values() if isinstance(f, dict) else (f,) for f in self.value)
        tensors = (t for field in fields for t in field if isinstance(t, Tensor))
        return all(any(t is p for p in parameters) for t in tensors)

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy reads for itself
