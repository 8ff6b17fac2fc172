"""Which class of which library maps to which operator: one file per library, all found here.

Rules name classes by their qualified names, so no library is imported before a model uses it.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from attnkern._activations import qualified_name


@dataclass(frozen=True)
class Rule:
    """How instances of one class are served.

    Attributes:
        cls: qualified name of the class.
        op: what serves it, for the report.
        read: module -> the operator's arguments, a weight first, or the reason (str) why it cannot
            be served.
        forward: ``forward(module, x, *, impl)``, the rerouted forward: picklable by name.
        names: for each method that ``forward`` stands in for, the names its code refers to, in
            order.  A version of the library whose code refers to others is left alone.
        part: the child that must be served itself for this rule to apply (a block around it).
    """

    cls: str
    op: str
    read: Callable[[nn.Module], Any]
    forward: Callable[..., Any]
    names: dict[str, str]
    part: str | None = None

    def refuse(self, module: nn.Module) -> str | None:
        """Why ``module`` cannot be served; None when it can."""
        cls = type(module)
        base = next(base for base in cls.__mro__ if qualified_name(base) == self.cls)
        for method, names in self.names.items():
            own = getattr(cls, method)
            if own is not getattr(base, method) or (
                method != "forward" and method in module.__dict__
            ):
                return f"{cls.__name__} has its own {method}"
            code = getattr(own, "__code__", None)
            if code is None or list(code.co_names) != names.split():
                return f"this version of {self.cls} has another {method}"
        arguments = self.read(module)
        return arguments if isinstance(arguments, str) else None


def is_rerouted(module: nn.Module) -> bool:
    """Whether ``forward`` of this instance is one of ours (by `attnkern.optimize`)."""
    forward = module.__dict__.get("forward")
    function = forward.func if isinstance(forward, functools.partial) else None
    return function is not None and function.__module__.startswith(f"{__name__}.")


def _load() -> dict[str, Rule]:
    rules = {}
    for library in pkgutil.iter_modules(__path__, f"{__name__}."):
        for rule in getattr(importlib.import_module(library.name), "RULES", ()):
            rules[rule.cls] = rule
    return rules


_rules: dict[str, Rule] = {}


def find(cls: type) -> Rule | None:
    """The rule for ``cls`` or for the nearest base that has one."""
    if not _rules:
        _rules.update(_load())
    names = map(qualified_name, cls.__mro__)
    return next((_rules[name] for name in names if name in _rules), None)
