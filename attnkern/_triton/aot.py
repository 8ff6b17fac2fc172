"""Triton kernels ahead of time: compiled for a target GPU with none present.

An operator lists representative calls in ``ops/<op>/triton_aot.py``: ``CALLS``, label -> function
on meta tensors.  The launchers run on them with launches recorded in place of executed, so what is
compiled here is what they launch.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from attnkern import _cubin
from attnkern._triton import LAUNCH

CAPABILITIES = (80, 90, 100)
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """A kernel with the types and constants of one launch, as Triton would specialise it."""

    kernel: JITFunction
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]  # arguments known to be divisible by 16
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return self.kernel.__name__


def describe(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    types, constants, aligned = [], [], []
    for index, parameter in enumerate(kernel.params):
        value, kind = given[parameter.name], "constexpr"
        if parameter.is_constexpr or value is None:
            pass
        elif isinstance(value, torch.Tensor):
            kind = _TYPES[value.dtype]
            aligned.append(index)
        elif isinstance(value, int) and (value != 1 or parameter.do_not_specialize):
            kind = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(index)
        elif isinstance(value, float):
            kind = "fp32"
        types.append((parameter.name, kind))
        if kind == "constexpr":
            constants.append((parameter.name, value))
    options = tuple((name, given[name]) for name in (*LAUNCH, "num_stages") if name in given)
    return Launch(kernel, tuple(types), tuple(constants), tuple(aligned), options)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, Triton launches are appended to the list instead of run."""
    launches: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(describe(self, args, kwargs))

    run = JITFunction.run
    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def declarations() -> Iterator[tuple[str, Any]]:
    """(operator, its triton_aot module) for every operator that has one."""
    import attnkern.ops

    for op in pkgutil.iter_modules(attnkern.ops.__path__):
        module = f"attnkern.ops.{op.name}.triton_aot"
        if importlib.util.find_spec(module):
            yield op.name, importlib.import_module(module)


def launches(calls: dict[str, Callable[[], object]]) -> dict[Launch, str]:
    """Every distinct launch that ``calls`` make, with the label of the first that makes it."""
    found: dict[Launch, str] = {}
    for label, call in calls.items():
        with recorded() as made:
            call()
        for launch in made:
            found.setdefault(launch, label)
    return found


def compile(launch: Launch, capability: int) -> Any:
    """Triton's CompiledKernel for compute capability ``capability`` / 10."""
    source = ASTSource(
        launch.kernel,
        dict(launch.types),
        dict(launch.constants),
        {(index,): [["tt.divisibility", 16]] for index in launch.aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=dict(launch.options))


def resources(compiled: Any) -> _cubin.Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        (used,) = _cubin.resources(cubin.name).values()
    return used._replace(shared=compiled.metadata.shared)
