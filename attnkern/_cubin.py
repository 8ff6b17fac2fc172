"""What compiled GPU kernels need, as cuobjdump reads it from a cubin or a library, with no GPU."""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import shutil
import subprocess
from typing import NamedTuple

CALL_FRAME = 16
"""Bytes of stack that ptxas gives a kernel which calls functions, with 0 spills in its own report."""


class Resources(NamedTuple):
    registers: int  # a thread
    shared: int  # bytes a block, without what a launch adds
    stack: int  # bytes a thread: spilled registers, local arrays, a call's frame


def cuobjdump() -> str:
    """The tool on PATH, of the CUDA toolkit or the one that Triton bundles."""
    folders = [os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    folders += sorted(glob.glob("/usr/local/cuda-*/bin"), reverse=True)
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin:
        folders.append(os.path.join(os.path.dirname(spec.origin), "backends", "nvidia", "bin"))
    tool = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(folders))
    if tool is None:
        raise RuntimeError("cuobjdump was found neither in a CUDA toolkit nor in Triton")
    return tool


def resources(path: str) -> dict[tuple[str, str], Resources]:
    """(mangled kernel, target such as sm_90a) -> its resources, for every kernel in ``path``."""
    command = [cuobjdump(), "-res-usage", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    found, target, kernel = {}, "", ""
    for line in done.stdout.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            target = match[1]
        elif match := re.match(r"\s*Function (\S+):$", line):
            kernel = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            found[kernel, target] = Resources(int(match[1]), int(match[3]), int(match[2]))
    return found


def demangle(names: list[str]) -> list[str]:
    """C++ names without namespaces and parameters, where c++filt is installed."""
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return names
    done = subprocess.run(
        [tool], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return [_short(name) for name in done.stdout.splitlines()]


def _short(name: str) -> str:
    name = re.sub(r"\((?:[^()]|\([^()]*\))*\)$", "", name.removeprefix("void "))
    return re.sub(r"(?:\w+|\(anonymous namespace\))::", "", name)
