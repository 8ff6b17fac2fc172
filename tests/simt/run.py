"""Builds kernels for the emulator with g++ and moves tensors into its device memory."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "simt"
ENGINE = ("tests/simt/emulator.cpp", "tests/simt/memory.cpp")
ENGINE_FLAGS = ("-O2",)
FLAGS = (
    *(
        "-std=c++20",
        "-O1",
        "-g1",
        "-fPIC",
        "-DATTNKERN_SIMT",
        "-Icsrc",
        "-Itests",
        "-ffp-contract=off",
    ),
    *(
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fmax-errors=3",
        "-Wno-unknown-pragmas",
        "-Wno-unused-parameter",
        "-Wno-psabi",
    ),
)


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++").split()[0]) or shutil.which("g++")


def build(name: str, *sources: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The library of `sources` (paths from the root; .cu compiled as C++) and the engine.

    An object is compiled again when the flags or any header of csrc/ or tests/simt/ has changed.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    headers = sorted(
        p
        for top in ("csrc", "tests/simt")
        for p in (ROOT / top).rglob("*")
        if p.suffix in (".h", ".cuh")
    )
    shared = hashlib.sha256(repr((compiler(), FLAGS, flags)).encode())
    for header in headers:
        shared.update(header.read_bytes())
    running, objects = [], []
    for source in (*ENGINE, *sources):
        key = shared.copy()
        key.update((ROOT / source).read_bytes())
        stem = source.replace("/", "_")
        out = BUILD / f"{stem}-{key.hexdigest()[:16]}.o"
        objects.append(out)
        if out.exists():
            continue
        for stale in BUILD.glob(f"{stem}-*.o"):
            stale.unlink()
        part = out.with_suffix(f".{os.getpid()}")
        command = [
            compiler(),
            *FLAGS,
            *(ENGINE_FLAGS if source in ENGINE else ()),
            *flags,
            "-x",
            "c++",
            "-c",
            source,
            "-o",
            str(part),
        ]
        running.append(
            (part, out, subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True))
        )
    for part, out, process in running:
        _, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"g++ refuses {out.name}:\n{errors}")
        part.rename(out)
    key = hashlib.sha256(repr(objects).encode()).hexdigest()[:16]
    library = BUILD / f"{name}-{key}.so"
    if not library.exists():
        for stale in BUILD.glob(f"{name}-*.so"):
            stale.unlink()
        part = library.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler(), "-shared", *map(str, objects), "-o", str(part)], check=True)
        part.rename(library)
    return ctypes.CDLL(str(library))


def operators() -> list[Any]:
    """The modules of this folder named like an operator of csrc/ops, each with its ``Emulated``."""
    names = (p.stem for p in sorted(Path(__file__).parent.glob("*.py")))
    return [importlib.import_module(n) for n in names if (ROOT / "csrc" / "ops" / n).is_dir()]


_KINDS = {"": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64, "d": ctypes.c_double}


def struct(name: str, fields: str, base: type = ctypes.Structure, **types: Any) -> Any:
    """A mirror of a C++ struct: ``fields`` are ``name:type`` words, a pointer where the type is missing."""
    kinds = {**_KINDS, **types}
    pairs = (word.partition(":") for word in fields.split())
    return type(name, (base,), {"_fields_": [(word, kinds[kind]) for word, _, kind in pairs]})


class Device:
    """The emulated device of a library: memory, properties and the seed of its schedules."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.simt_allocate.restype = ctypes.c_void_p
        library.simt_uninitialised.restype = ctypes.c_size_t
        self._live: list[int] = []

    def configure(
        self,
        *,
        seed: int = 0,
        sms: int = 4,
        shared: int = 227 << 10,
        capability: int = 90,
        l2: int = 60 << 20,
    ) -> None:
        self.library.simt_configure(
            ctypes.c_uint64(seed), sms, shared, capability, ctypes.c_int64(l2)
        )

    def empty(self, bytes: int, name: str) -> int:
        address = self.library.simt_allocate(ctypes.c_size_t(bytes), name.encode())
        self._live.append(address)
        return address

    def upload(self, t: torch.Tensor, name: str) -> int:
        """Copies the storage from t's first to its last element, at t's alignment."""
        flat = _span(t)
        size, shift = flat.numel() * t.element_size(), t.data_ptr() % 256
        address = self.empty(shift + size, name) + shift
        self.library.simt_upload(
            ctypes.c_void_p(address), ctypes.c_void_p(flat.data_ptr()), ctypes.c_size_t(size)
        )
        return address

    def download(self, t: torch.Tensor, address: int, name: str) -> None:
        """Copies the device's memory into the dense tensor t; every byte must have been written."""
        size = t.numel() * t.element_size()
        if missing := self.library.simt_uninitialised(
            ctypes.c_void_p(address), ctypes.c_size_t(size)
        ):
            raise AssertionError(
                f"{missing} of the {size} bytes of output {name} were never written"
            )
        ctypes.memmove(_span(t).data_ptr(), address, size)

    def release(self) -> None:
        while self._live:
            self.library.simt_release(ctypes.c_void_p(self._live.pop()))


def _span(t: torch.Tensor) -> torch.Tensor:
    """The storage between t's first and last element, as one flat tensor."""
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else -1
    return t.as_strided((last + 1,), (1,))
