"""Which class of which library maps to which operator: one file per library, all found here.

Rules name classes by their qualified names, so no library is imported before a model uses it.
Code that people copy rather than install is matched by structure: its children, the names that its
forward refers to, and one trial that must give what ours gives.
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
from attnkern.integrations._structure import SHARDED, agrees, refers_to, sharded


@dataclass(frozen=True)
class Rule:
    """How instances of one class are served.

    Attributes:
        cls: qualified name of the class, or what the report calls a structure.
        op: what serves it, for the report.
        operator: what an implementation must have a kernel of.
        read: module -> the operator's arguments, a weight first, or the reason (str) why it cannot
            be served.  A ``note`` among them goes to the report.
        forward: ``forward(module, x, *, impl)``, the rerouted method: picklable by name.
        names: for each method that ``forward`` stands in for, the names its code refers to, in
            order; with ``structure`` those that it may refer to.  Code that refers to others, as
            that of another version of the library, is left alone.
        part: the child that must be served itself for this rule to apply (a block around it).
        method: the method that is rerouted.
        structure: whether a module of any class has the children that are looked for.
        trial: with ``structure``, inputs for one comparison of the module's forward with ours.
    """

    cls: str
    op: str
    operator: str
    read: Callable[[nn.Module], Any]
    forward: Callable[..., Any]
    names: dict[str, str]
    part: str | None = None
    method: str = "forward"
    structure: Callable[[nn.Module], bool] | None = None
    trial: Callable[[nn.Module], tuple[Any, ...]] | None = None

    def refuse(self, module: nn.Module) -> str | None:
        """Why ``module`` cannot be served; None when it can."""
        cls = type(module)
        base = self._base(cls)
        for method, names in self.names.items():
            own = getattr(cls, method)
            if own is not getattr(base, method) or (
                method != self.method and method in module.__dict__
            ):
                return f"{cls.__name__} has its own {method}"
            if not refers_to(own, names, exactly=not self.structure):
                if self.structure:
                    return f"its {method} does other things than {self.cls}"
                return f"this version of {self.cls} has another {method}"
        arguments = self.read(module)
        if isinstance(arguments, str):
            return arguments
        if self.trial and sharded(module):
            return SHARDED
        if self.trial and not agrees(module, self.method, self.forward, self.trial(module)):
            return f"its {self.method} gives other results than {self.cls}"
        return None

    def _base(self, cls: type) -> type:
        """The class whose methods ours stand in for; of a structure, the nearest that may be it."""
        if not self.structure:
            return next(base for base in cls.__mro__ if qualified_name(base) == self.cls)
        names = self.names[self.method]
        own = (base for base in cls.__mro__ if self.method in vars(base))
        return next(
            (base for base in own if refers_to(vars(base)[self.method], names, exactly=False)), cls
        )


def _is_ours(method: Any) -> bool:
    return isinstance(method, functools.partial) and getattr(
        method.func, "__module__", ""
    ).startswith(f"{__name__}.")


def is_rerouted(module: nn.Module) -> bool:
    """Whether ``forward`` of this instance is one of ours (by `attnkern.optimize`)."""
    return _is_ours(module.__dict__.get("forward"))


def rerouted(module: nn.Module) -> list[str]:
    """The methods of this instance that are ours."""
    return [name for name, value in module.__dict__.items() if _is_ours(value)]


def _load() -> list[Rule]:
    return [
        rule
        for library in pkgutil.iter_modules(__path__, f"{__name__}.")
        for rule in getattr(importlib.import_module(library.name), "RULES", ())
    ]


_rules: dict[str, Rule] = {}


def find(module: nn.Module) -> Rule | None:
    """The rule for the module's class, for the nearest base that has one, or for its structure."""
    if not _rules:
        _rules.update((rule.cls, rule) for rule in _load())
    names = map(qualified_name, type(module).__mro__)
    rule = next((_rules[name] for name in names if name in _rules), None)
    # by whose forward it is: fully_shard puts a class of its own in front of the module's
    forward = getattr(type(module), "forward", None)
    origin = getattr(forward, "__module__", None) or "torch"
    if rule or origin.partition(".")[0] in ("torch", "attnkern"):
        return rule
    return next((r for r in _rules.values() if r.structure and r.structure(module)), None)
