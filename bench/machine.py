"""The machine, the allocator, and the copy bandwidth that everything is held against."""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import os
import platform
import re
import shutil
import statistics
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch

import attnkern
from attnkern import _native

ROOT = Path(__file__).resolve().parent.parent
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def describe(device: torch.device) -> dict[str, Any]:
    info: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        "isa": _native._C.cpu_isa() if _native._C else None,  # type: ignore[attr-defined]
        "native": "built" if _native.available else _native.reason,
        "llc_bytes": last_level_cache(device),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "attnkern": attnkern.__version__,
        "commit": commit(),
        "device": device.type,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": smi("driver_version"),
            "clocks": smi("clocks.sm,clocks.mem"),
        }
    return info


def cpu_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def commit() -> str:
    """The commit the figures belong to, marked when tracked files differ from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True
        )
        # results are outputs: writing them does not change what was measured
        paths = ["--", ".", ":!bench/results"]
        status = [*git, "status", "--porcelain", "--untracked-files=no", *paths]
        dirty = subprocess.run(status, capture_output=True, text=True)
    except OSError:
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def smi(fields: str) -> str:
    try:
        out = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return out.stdout.strip().splitlines()[0] if out.stdout.strip() else "unknown"


@functools.cache
def last_level_cache(device: torch.device) -> int:
    """Bytes of the cache that stands before memory; 32 MiB when the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = index.read_text().strip()
        unit = {"K": 2**10, "M": 2**20}.get(text[-1], 1)
        sizes.append(int(text.rstrip("KM")) * unit)
    return max(sizes, default=32 * 2**20)


def compile_problem(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, in one sentence; None when it should."""
    compiler = os.environ.get("CXX") or "g++"
    if not (shutil.which(compiler) or shutil.which("clang++")):
        return f"torch.compile is left out: no C++ compiler ({compiler}) was found; install g++"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.exists():
        return (
            f"torch.compile is left out: the Python headers are missing ({header}); "
            "install python3-dev"
        )
    return None


# ------------------------------------------------------------------ allocator


def keep_memory() -> bool:
    """Make malloc keep freed memory, so that a large output does not fault its pages in each call.

    By default glibc maps every block above 32 MB afresh and gives it back at once; a training loop
    with a caching allocator (jemalloc, a GPU's) does not pay that, and neither do the figures here.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # no mapped blocks, never trim, grow by 64 MB
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 << 20))
    return all([mallopt(name, value) == 1 for name, value in settings])


def allocator_state(device: torch.device) -> dict[str, Any]:
    """Turns page reuse on for this process, and shows what it hides: a fresh 100 MB copy."""
    if device.type == "cuda":
        return {"kind": "torch caching allocator", "warm": True}

    def clone_ms() -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            x.clone()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:]) * 1e3

    x = torch.ones(25_000_000)
    before = clone_ms()
    warm = keep_memory()
    clone_ms()
    return {
        "kind": "glibc malloc, freed memory kept" if warm else "system malloc",
        "warm": warm,
        "copy_100MB_default_ms": before,
        "copy_100MB_warm_ms": clone_ms(),
    }


# ------------------------------------------------------------------ copy


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(torch.get_num_threads())


def streaming_copy(out: torch.Tensor, x: torch.Tensor) -> None:
    """memmove on every thread: libc streams large blocks past the cache, copy_ does not."""
    parts = torch.get_num_threads()
    total = x.numel() * x.element_size()
    step = -(-total // parts)

    def move(i: int) -> None:
        start = i * step
        size = min(step, total - start)
        if size > 0:
            ctypes.memmove(out.data_ptr() + start, x.data_ptr() + start, size)

    list(_pool().map(move, range(parts)))


def read(x: torch.Tensor) -> torch.Tensor:
    """One read of dense x, whatever its layout and dtype: the sum of its bytes taken as float32."""
    return torch.as_strided(x, (x.numel(),), (1,)).view(torch.float32).sum()


def copy_bandwidth(device: torch.device, seconds: float = 1.5) -> dict[str, Any]:
    """GB/s (one read, one write), the fastest of many: from memory in each form, in cache."""
    cache = last_level_cache(device)
    size = max(4 * cache, 64 << 20)
    n = size // 4
    x, out = torch.ones(n, device=device), torch.empty(n, device=device)
    small = torch.ones(cache // 4 // 4, device=device)
    small_out = torch.empty_like(small)

    def fastest(run: Any, bytes_moved: int) -> float:
        best, end = float("inf"), time.perf_counter() + seconds / 3
        while time.perf_counter() < end:
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        return bytes_moved / best / 1e9

    forms = {"copy_": fastest(lambda: out.copy_(x), 2 * size)}
    if device.type == "cpu":
        forms["streaming"] = fastest(lambda: streaming_copy(out, x), 2 * size)
    return {
        "memory_GBps": max(forms.values()),
        "forms_GBps": forms,
        "cache_GBps": fastest(lambda: small_out.copy_(small), 2 * small.numel() * 4),
    }
