"""Loads the compiled extension ``attnkern._C``, or remembers why it cannot be used."""

from __future__ import annotations

import importlib
from typing import Any

import torch  # noqa: F401  (libtorch must be loaded before _C, which links against it)

_C: Any = None
reason = ""
"""Why the compiled extension is absent; empty when it is loaded."""

try:
    _C = importlib.import_module("attnkern._C")
except ImportError as error:
    reason = (
        f"the compiled extension attnkern._C is not available ({error}); "
        "reinstall with a C++ compiler: pip install --no-build-isolation ."
    )

available = _C is not None
has_cuda: bool = bool(available and _C.build_info()["cuda"])
