"""Triton pieces below the operators.  Importing this package does not import triton."""

from __future__ import annotations

import importlib
from typing import Any

from attnkern import _library
from attnkern._select import _interpreting


def serve(module: str, *operators: str) -> None:
    """Serve ``attnkern::<operator>.triton`` by the function of that name in ``module``.

    The module, and with it triton, is imported on the first call.
    """
    keys = ("CUDA", "CPU") if _interpreting else ("CUDA",)
    for operator in operators:
        _library.implement(operator, "triton", _on_first_call(module, operator), *keys)


def _on_first_call(module: str, function: str) -> Any:
    def kernel(*args: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args)

    return kernel
