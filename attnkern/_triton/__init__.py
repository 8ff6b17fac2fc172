"""Triton pieces below the operators.  Importing this package does not import triton."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from attnkern import _library
from attnkern._select import _interpreting

LAUNCH: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}
if torch.version.hip is None:
    LAUNCH["maxnreg"] = 128
"""Options of every launch: four blocks of 128 threads share a processor's 65536 registers.

Left to itself ptxas aims at 56 to 80 registers and spills 8 bytes in some kernels.  Fusion is
stated because Triton 3.10 turns its default off.
"""


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
