"""``python -m attnkern info [--run]`` and ``python -m attnkern aot``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any

from attnkern import _cubin, _info, _native


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m attnkern", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser(
        "info", help="versions, devices, and which implementation serves what"
    )
    info.add_argument("--run", action="store_true", help="also check each against float64")
    aot = commands.add_parser(
        "aot", help="registers, shared memory and spills of every GPU kernel; needs no GPU"
    )
    aot.add_argument("--kernel", default="", help="only kernels whose name contains this")
    chosen = parser.parse_args(arguments)
    if chosen.command == "info":
        return _print_info(chosen.run)
    return _print_aot(chosen.kernel)


def _print_info(run: bool) -> int:
    _table("environment", ("what", "value"), list(_info.environment().items()))
    _table("implementations", ("device", "dtype", "auto", *_info.IMPLS), _info.served())
    if not run:
        return 0
    rows = _info.probe()
    header = ("operator", "device", "dtype", "implementation", "against float64")
    _table("probe: forward and backward", header, rows)
    return int(any(row[-1] != "ok" for row in rows))


def _print_aot(kernel: str) -> int:
    header = ("kernel", "variant", "target", "registers", "shared", "stack")
    rows = []
    for title, collect in (("CUDA C++", _cuda_rows), ("Triton", _triton_rows)):
        found, absent = collect(kernel)
        if absent:
            print(f"{title}: {absent}")
        else:
            _table(f"{title}: registers a thread, bytes a block, bytes a thread", header, found)
        rows += found
    spilling = sum(int(row[-1]) > _cubin.CALL_FRAME for row in rows)
    print(
        f"{len(rows)} kernels, {spilling} of them with spills "
        f"(more than the {_cubin.CALL_FRAME} bytes of a call's frame)"
    )
    return int(spilling > 0)


Rows = list[tuple[str, ...]]


def _cuda_rows(kernel: str) -> tuple[Rows, str]:
    if not _native.has_cuda:
        reason = _native.reason or "the compiled extension was built without CUDA"
        return [], f"{reason}; nothing to show"
    compiled: Any = _native._C
    found = _cubin.resources(compiled.__file__)
    names = _cubin.demangle([name for name, _ in found])
    rows = [
        (*_split(name), target, *map(str, used))
        for name, ((_, target), used) in zip(names, found.items(), strict=True)
        if kernel in name
    ]
    return sorted(rows), ""


def _split(name: str) -> tuple[str, str]:
    """kernel<variant> -> kernel, variant."""
    kernel, _, variant = name.partition("<")
    return kernel, variant.removesuffix(">")


def _triton_rows(kernel: str) -> tuple[Rows, str]:
    if importlib.util.find_spec("triton") is None:
        return [], "the package triton is not installed; nothing to show"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return [], "kernels are interpreted while TRITON_INTERPRET=1; unset it"
    from attnkern._triton import aot

    rows = []
    for _, module in aot.declarations():
        for launch, label in aot.launches(module.CALLS).items():
            if kernel not in launch.name:
                continue
            for capability in aot.CAPABILITIES:
                used = aot.resources(aot.compile(launch, capability))
                rows.append((launch.name, label, f"sm_{capability}", *map(str, used)))
    return sorted(rows), ""


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if importlib.util.find_spec("rich") is None:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        print(title)
        for row in (header, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    # piped into a file there is no width: let a row have the line it needs
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
