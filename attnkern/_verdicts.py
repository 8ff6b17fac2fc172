"""Verdicts on calls, remembered by all the metadata that was read for them."""

from __future__ import annotations

from typing import Any

KNOWN = 256


def remember(verdicts: dict[Any, Any], key: Any, verdict: Any) -> None:
    """Sizes that change from call to call must not fill the memory: at `KNOWN` all are forgotten."""
    if len(verdicts) >= KNOWN:
        verdicts.clear()
    verdicts[key] = verdict
