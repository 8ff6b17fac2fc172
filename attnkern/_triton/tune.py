"""Tiles chosen by measurement where ATTNKERN_TRITON_AUTOTUNE=1, else by the launcher's heuristic.

Only kernels that sum nothing are tuned: no choice changes a bit of a result, whatever the timings.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from triton.testing import do_bench

from attnkern._select import _interpreting

enabled = os.environ.get("ATTNKERN_TRITON_AUTOTUNE", "0") == "1" and not _interpreting
_chosen: dict[Hashable, Any] = {}


def choose(key: Hashable, candidates: Sequence[Any], launch: Callable[[Any], object]) -> Any:
    """The candidate with the fastest ``launch``, measured once a process and key.

    Nothing can be timed while a CUDA graph is captured: there an unknown key takes the first.
    """
    if key not in _chosen:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return candidates[0]
        _chosen[key] = min(candidates, key=lambda candidate: measure(launch, candidate))
    return _chosen[key]


def measure(launch: Callable[[Any], object], candidate: Any) -> float:
    """Median milliseconds of ``launch(candidate)``, which may be repeated."""
    return float(do_bench(lambda: launch(candidate), warmup=5, rep=20, return_mode="median"))
