"""User errors, all of one form: ``op: argument must be ..., got ...``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor


def fail(op: str, argument: str, expected: str, given: object) -> NoReturn:
    raise ValueError(f"{op}: {argument} must {expected}, got {given}")


def tensor(op: str, argument: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument} must be a Tensor, got {type(value).__name__}")


def choice(op: str, argument: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        fail(op, argument, f"be one of {', '.join(choices)}", repr(value))


def number(op: str, argument: str, value: Any, *, minimum: float | None = None) -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {argument} must be a number, got {type(value).__name__}")
    largest = sys.float_info.max  # not isfinite: value may be symbolic under torch.compile
    if not -largest <= value <= largest:
        fail(op, argument, "be finite", value)
    if minimum is not None and value < minimum:
        fail(op, argument, f"be at least {minimum:g}", value)


def dtype(op: str, argument: str, value: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if value.dtype not in allowed:
        names = " or ".join(dict.fromkeys(str(d) for d in allowed))
        fail(op, argument, f"have dtype {names}", value.dtype)


def strided(op: str, argument: str, value: Tensor) -> None:
    if value.layout != torch.strided:
        fail(op, argument, "be a strided tensor", value.layout)


def device(op: str, argument: str, value: Tensor, like: Tensor, like_name: str = "x") -> None:
    if value.device != like.device:
        fail(op, argument, f"be on the device of {like_name} ({like.device})", value.device)
