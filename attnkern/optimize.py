"""``optimize`` and ``restore``: serve the modules of an existing model without replacing them.

An instance keeps its class, parameters, buffers, hooks and state_dict; it gains one attribute,
``forward`` (or another method), a partial of a function in `attnkern.integrations` over itself.  A partial
is copied by ``deepcopy`` through its memo (the copy runs on its own parameters), pickled by name
and traced by ``torch.compile``; deleting it restores the class's forward.

Optimize before ``torch.compile``, which may keep code it traced earlier, and restore before
``torch.jit.script``, which compiles no partials.
"""

from __future__ import annotations

import functools
import html
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from attnkern import _checks, integrations
from attnkern._select import IMPLS, select
from attnkern.integrations import Rule, rerouted

_HEADER = ("name", "class", "op", "implementation", "reason")


class Row(NamedTuple):
    """One module: what serves it, or the reason why it (or the block around it) is left alone."""

    name: str
    class_name: str
    op: str
    implementation: str
    reason: str


@dataclass
class Report:
    """What `optimize` did: the modules ``replaced`` and those ``skipped``; prints as a table.

    ``implementation`` is what serves the module's parameters as they lie now; ``impl="auto"``
    chooses anew at every call.  The reason of a replaced row, if any, says why the block around it
    is not fused as well.

    >>> attnkern.optimize(model).skipped
    []
    """

    replaced: list[Row] = field(default_factory=list)
    skipped: list[Row] = field(default_factory=list)

    @property
    def summary(self) -> str:
        return f"attnkern.optimize: {len(self.replaced)} replaced, {len(self.skipped)} left alone"

    def __str__(self) -> str:
        rows = [*self.replaced, *self.skipped]
        if not rows:
            return self.summary
        lines = [_HEADER, *rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
        table = (
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in (_HEADER, ["-" * width for width in widths], *rows)
        )
        return "\n".join([self.summary, *table])

    def _repr_html_(self) -> str:
        def line(cells: Any, tag: str) -> str:
            return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

        rows = "".join(line(row, "td") for row in (*self.replaced, *self.skipped))
        return f"<p>{html.escape(self.summary)}</p><table>{line(_HEADER, 'th')}{rows}</table>"


def optimize(
    model: nn.Module, *, impl: str = "auto", strict: bool = False, dry_run: bool = False
) -> Report:
    """Serve every module of ``model`` that attnkern knows by its operators, in place.

    Outputs and gradients stay those of the stock modules up to rounding.  A module whose children
    carry hooks, parametrizations or wrappers, now or at a later call, runs its own forward; so
    does one given an input that the stock module would refuse or promote.  Applying it twice
    changes nothing.

    Args:
        model: any ``nn.Module``, wrapped or not.
        impl: auto, native, triton or reference, for every replaced module.
        strict: raise where a known module cannot be served, instead of naming it in the report.
        dry_run: report without touching the model.

    Returns:
        the `Report`; ``print`` it.

    Raises:
        TypeError: model is not a module.
        ValueError: unknown ``impl``, an explicit ``impl`` that cannot serve a module's parameters,
            or with ``strict`` the modules left alone.  The model is then untouched.

    >>> report = attnkern.optimize(timm.create_model("seresnet50"))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize: model must be a torch.nn.Module, got {type(model).__name__}")
    _checks.choice("optimize", "impl", impl, IMPLS)
    report, served = _plan(model, impl)
    if strict and report.skipped:
        lines = [f"  {row.name} ({row.class_name}): {row.reason}" for row in report.skipped]
        raise ValueError("\n".join([f"optimize: {len(lines)} modules cannot be served:", *lines]))
    if not dry_run:
        for module, rule in served:
            _reroute(module, rule.method, rule.forward, impl)
    return report


def restore(model: nn.Module) -> None:
    """Undo `optimize`: every module runs its class's forward again.

    >>> attnkern.restore(model)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if methods := rerouted(module):
            for attribute in (*methods, "_replicate_for_data_parallel", "_reading"):
                module.__dict__.pop(attribute, None)


def _plan(model: nn.Module, impl: str) -> tuple[Report, list[tuple[nn.Module, Rule]]]:
    """Decide for every module; innermost first, since a block depends on its part."""
    served: dict[nn.Module, tuple[Rule, Row]] = {}
    skipped: dict[nn.Module, Row] = {}
    order = list(model.named_modules())
    for name, module in reversed(order):
        rule = integrations.find(module)
        if rule is None:
            continue
        part = getattr(module, rule.part) if rule.part else None
        if rule.part and part not in served:
            continue  # a block with nothing to fuse
        reason = _refuse(module, rule)
        if reason and part is not None:
            part_rule, row = served[part]
            served[part] = part_rule, row._replace(reason=f"not fused with {name}: {reason}")
            continue
        chosen = note = ""
        if not reason:
            arguments = rule.read(module)
            op, weight = rule.op.partition("(")[0], arguments[0]
            chosen = select(op, impl, weight.device, weight.dtype, rule.operator)
            note = getattr(arguments, "note", "")
        row = Row(name or "(model)", type(module).__name__, rule.op, chosen, reason or note)
        if reason:
            skipped[module] = row
        else:
            served[module] = rule, row
    modules = [module for _, module in order]
    report = Report(
        [served[m][1] for m in modules if m in served],
        [skipped[m] for m in modules if m in skipped],
    )
    return report, [(module, rule) for module, (rule, _) in served.items()]


def _refuse(module: nn.Module, rule: Rule) -> str | None:
    if rule.method in module.__dict__ and rule.method not in rerouted(module):
        forward = module.__dict__[rule.method]
        owner = getattr(forward, "func", forward)  # through a functools.partial
        owner = owner if hasattr(owner, "__qualname__") else type(owner)
        return f"its {rule.method} was replaced by {owner.__module__}.{owner.__qualname__}"
    return rule.refuse(module)


def _reroute(module: nn.Module, method: str, forward: Any, impl: str) -> None:
    module.__dict__[method] = functools.partial(forward, module, impl=impl)
    module.__dict__["_replicate_for_data_parallel"] = functools.partial(_replicate, module)


def _replicate(module: nn.Module) -> nn.Module:
    """``nn.DataParallel``'s shallow copy, with its methods over the copy."""
    replica = type(module)._replicate_for_data_parallel(module)
    for method in rerouted(module):
        forward = module.__dict__[method]
        _reroute(replica, method, forward.func, **forward.keywords)
    return replica
