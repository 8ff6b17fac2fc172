"""Tuning of Triton tiles: off unless asked for, one measurement a key, none under graph capture.

What it does to results is tested in triton_interpreted.py, what it may choose in test_triton_aot.py.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from attnkern._triton import tune


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "False"),
        ({"ATTNKERN_TRITON_AUTOTUNE": "0"}, "False"),
        ({"ATTNKERN_TRITON_AUTOTUNE": "1"}, "True"),
        ({"ATTNKERN_TRITON_AUTOTUNE": "1", "TRITON_INTERPRET": "1"}, "False"),
    ],
)
def test_the_environment_turns_it_on(environment, expected):
    inherited = {k: v for k, v in os.environ.items() if k not in environment}
    for name in ("ATTNKERN_TRITON_AUTOTUNE", "TRITON_INTERPRET"):
        inherited.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", "from attnkern._triton import tune; print(tune.enabled)"],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == expected


@pytest.fixture
def timed(monkeypatch):
    """Candidates are their own milliseconds; the list receives each that is timed."""
    seen = []
    monkeypatch.setattr(tune, "_chosen", {})
    monkeypatch.setattr(tune, "measure", lambda launch, ms: launch(ms))
    return seen


def test_the_fastest_is_measured_once_a_key(timed):
    def launch(ms):
        timed.append(ms)
        return ms

    assert [tune.choose("a", [3, 1, 2], launch) for _ in range(3)] == [1, 1, 1]
    assert timed == [3, 1, 2]
    assert tune.choose("b", [5, 4], launch) == 4
    assert timed == [3, 1, 2, 5, 4]


def test_a_graph_under_capture_takes_what_is_known_and_measures_nothing(timed, monkeypatch):
    tune.choose("known", [2, 1], lambda ms: ms)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tune.choose("known", [2, 1], timed.append) == 1
    assert tune.choose("new", [2, 1], timed.append) == 2
    assert not timed
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert tune.choose("new", [2, 1], lambda ms: ms) == 1
