"""What is said once in a process."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import torch

_said: set[str] = set()


def say_once(text: Callable[[], str]) -> None:
    """Warns of ``text()`` at the caller's line, unless it has been said; never in a trace."""
    if torch.compiler.is_compiling():
        return
    said = text()
    if said not in _said:
        _said.add(said)
        warnings.warn(said, stacklevel=_frames_to_caller())


def _frames_to_caller() -> int:
    """The stacklevel, seen from the caller of this function, of the first frame that is neither ours nor torch's."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("attnkern.", "torch.")):
        frame, level = frame.f_back, level + 1
    return level
