"""User errors, all of one form: ``op: argument must be ..., got ...``."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What a map can be."""


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


def operand(
    op: str,
    argument: str,
    value: Any,
    like: Tensor,
    *,
    like_name: str = "x",
    dtypes: Sequence[torch.dtype] | None = None,
) -> None:
    """A strided Tensor on the device of ``like``, of its dtype or float32 unless ``dtypes`` says which."""
    tensor(op, argument, value)
    strided(op, argument, value)
    dtype(op, argument, value, (like.dtype, torch.float32) if dtypes is None else dtypes)
    device(op, argument, value, like, like_name)


def shape(
    op: str, argument: str, value: Tensor, *sizes: int | str | tuple[str, int], note: str = ""
) -> None:
    """``value`` has these sizes, then only ones, as a 1x1 convolution's weight has.

    A size is a number, a number with its name (("C", 8), shown as C=8), or the name of any number
    but 0; ``note`` ends what is expected.
    """
    given, count = value.shape, len(sizes)
    fits = len(given) == count or (len(given) > count and math.prod(given[count:]) == 1)
    for size, wanted in zip(given, sizes, strict=False):
        wanted = wanted[1] if isinstance(wanted, tuple) else wanted
        fits = fits and (size > 0 if isinstance(wanted, str) else size == wanted)
    if not fits:
        shown = (f"{s[0]}={s[1]}" if isinstance(s, tuple) else str(s) for s in sizes)
        fail(op, argument, f"have shape [{', '.join(shown)}]{note}", list(value.shape))
