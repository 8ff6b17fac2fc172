"""The Triton kernels executed on the CPU by Triton's interpreter.

Triton reads TRITON_INTERPRET when a kernel is defined, so the tests of ``triton_interpreted*.py``
run in processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")


INNER = sorted(Path(__file__).parent.glob("triton_interpreted*.py"))


@pytest.mark.minutes
@pytest.mark.parametrize("inner", INNER, ids=lambda path: path.stem)
def test_in_the_interpreter(inner):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--maxfail=9",
        "-p",
        "no:cacheprovider",
        str(inner),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "only 0-dimensional arrays can be converted" in done.stdout:  # int() of an array of one
        pytest.skip(f"numpy {numpy.__version__} is too new for Triton {triton.__version__}'s loops")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
