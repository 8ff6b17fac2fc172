"""What is printed while the benchmark runs: a line per row as soon as it is measured."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from bench import clock
from bench.results import against_targets, failures, losses, median

KERNEL = (
    ("shape", 29),
    ("type", 5),
    ("layout", 6),
    ("pass", 8),
    ("ours ms", 9),
    ("±%", 4),
    ("eager", 9),
    ("compile", 9),
    ("×eager", 7),
    ("×compile", 8),
    ("inside", 7),
    ("GB/s", 7),
    ("%copy", 6),
    ("MB", 7),
    ("error", 6),
)
MODEL = (
    ("network", 31),
    ("pass", 28),
    ("layout", 6),
    ("ours ms", 9),
    ("±%", 4),
    ("eager", 9),
    ("compile", 9),
    ("×eager", 7),
    ("×compile", 8),
    ("img/s", 8),
    ("att. %", 6),
    ("limit×", 7),
    ("error", 6),
)
LAYOUT = {"channels_first": "first", "channels_last": "last", "items": "items"}
PASS = {"forward": "fwd", "forward+backward": "fwd+bwd"}
KERNEL_LEGEND = (
    "ours, eager, compile: median ms per call, inputs rotated past 3x the last-level cache (cold) "
    "· ±%: interquartile range over median · ×: how many times ours is faster than the fastest "
    "eager formulation in this layout, and than torch.compile · inside: ours inside torch.compile "
    "against torch.compile · GB/s: of the fewest bytes possible · %copy: of the fastest copy seen, "
    "or read where the op only reads (~: partly in cache, no hard limit) · MB: peak memory of a "
    "call beyond its inputs · error: "
    "against float64, over eager's own (2 is the limit) · –: not measured in this run"
)
MODEL_LEGEND = (
    "layout: channels first or last, where eager is faster · att. %: time of eager that goes away "
    "when its attention modules do nothing · limit×: the speed-up if they cost "
    "nothing · error: outputs and gradients, against the network in float64, over eager's own (2 "
    "is the limit) · training: forward and backward, dropout off · weights are random and seeded, "
    "batch norms settled on the photographs"
)


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    value = seconds * 1e3
    return f"{value:.4f}" if value < 0.1 else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"


def megabytes(size: float | None) -> str:
    return "–" if size is None else f"{size / 1e6:.3g}" if size < 1e9 else f"{size / 1e6:.0f}"


def kernel_cells(row: Mapping[str, Any]) -> dict[str, str]:
    ratios, roof = row["ratios"].get("cold", {}), row["roof"]
    ours = row["times"].get(row["impl"], {}).get("cold")
    gate = row["gate"][row["impl"]]
    compiled = [
        t for n in ("compile", "compile, max-autotune") if (t := median(row, n)) is not None
    ]
    return {
        "shape": row["case"],
        "type": row["dtype"],
        "layout": LAYOUT[row["layout"]],
        "pass": PASS[row["pass"]],
        "ours ms": milliseconds(ours["median"]) if ours else "–",
        "±%": f"{100 * clock.spread(ours):.0f}" if ours else "–",
        "eager": milliseconds(median(row, "eager")),
        "compile": milliseconds(min(compiled, default=None)),
        "×eager": times(ratios.get("eager")),
        "×compile": times(ratios.get("compile")),
        "inside": times(ratios.get("in_compile")),
        "GB/s": f"{roof['GBps']:.4g}" if roof and row["ratios"] else "–",
        "%copy": ("" if roof["in_memory"] else "~") + f"{roof['percent']:.0f}"
        if roof and row["ratios"]
        else "–",
        "MB": megabytes(row["peak_bytes"].get(row["impl"])),
        "error": f"{gate['ratio']:.2f}" if gate["ok"] else "RED",
    }


def model_cells(row: Mapping[str, Any]) -> dict[str, str]:
    ours = row["times"].get("ours", {}).get("cold")
    gate = row["gate"]["ours"]
    return {
        "network": row["model"],
        "pass": row["pass"].replace("forward+backward", "training") + f" of {row['shape'][0]}",
        "layout": LAYOUT.get(row["layout"], "–"),
        "ours ms": milliseconds(ours["median"]) if ours else "–",
        "±%": f"{100 * clock.spread(ours):.0f}" if ours else "–",
        "eager": milliseconds(median(row, "eager")),
        "compile": milliseconds(median(row, "compile")),
        "×eager": times(row["ratios"].get("eager")),
        "×compile": times(row["ratios"].get("compile")),
        "img/s": f"{row['images_per_second']['ours']:.3g}" if row["ratios"] else "–",
        "att. %": f"{100 * row['attention_share']:.0f}" if row["ratios"] else "–",
        "limit×": times(row["ceiling"]) if row["ratios"] else "–",
        "error": f"{gate['ratio']:.2f}" if gate["ok"] else "RED",
    }


def header_lines(results: Mapping[str, Any]) -> list[str]:
    m, s = results["machine"], results["settings"]
    copy, allocator = m["copy"], m["allocator"]
    cache = m["llc_bytes"] / 2**20
    lines = [
        f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, "
        f"kernels {m['isa'] or 'not built'}, last-level cache {cache:.0f} MiB"
    ]
    if m["device"] == "cuda":
        lines.append(
            f"{m['gpu']} (sm {m['capability']}), CUDA {m['cuda']}, driver {m['driver']}, "
            f"clocks {m['clocks']}"
        )
    lines.append(
        f"torch {m['torch']}, Python {m['python']}, attnkern {m['attnkern']} at {m['commit']}, "
        f"{m['os']}"
    )
    forms = ", ".join(f"{n} {v:.4g}" for n, v in copy["forms_GBps"].items())
    lines.append(
        f"copy: {copy['memory_GBps']:.4g} GB/s from memory ({forms}), "
        f"{copy['cache_GBps']:.4g} in cache"
    )
    text = f"allocator: {allocator['kind']}"
    if "copy_100MB_warm_ms" in allocator:
        before, after = allocator["copy_100MB_default_ms"], allocator["copy_100MB_warm_ms"]
        text += (
            f"; a fresh 100 MB result costs {before:.3g} ms with malloc's defaults, "
            f"{after:.3g} ms with pages kept, as timed here"
        )
    lines.append(text)
    lines.append(f"implementations: {', '.join(s['impls'])}")
    return lines


class Screen:
    """Prints with rich on a terminal, where it also shows what is running; else plain lines."""

    def __init__(self, plain: bool, quiet: bool = False):
        self.quiet = quiet
        self.console: Any = None
        self._status: Any = None
        if not plain and not quiet:
            from rich.console import Console

            self.console = Console(highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        if self.console is None:
            yield
            return
        with self.console.status("starting") as self._status:
            yield
        self._status = None

    def say(self, message: str) -> None:
        if self._status is not None:
            self._status.update(message)

    def line(self, text: str = "", style: str = "") -> None:
        if self.quiet:
            return
        if self.console is None:
            print(text, flush=True)
        else:
            self.console.print(text, style=style or None, markup=False)

    def head(self, columns: tuple[tuple[str, int], ...]) -> None:
        self.line()
        self.line(_aligned(dict.fromkeys((n for n, _ in columns)), columns, names=True), "bold")

    def row(
        self, cells: Mapping[str, str], columns: tuple[tuple[str, int], ...], row: Mapping[str, Any]
    ) -> None:
        bad = any(not g["ok"] for g in row["gate"].values()) or row.get("refused")
        ratios = row["ratios"].get("cold", row["ratios"])
        ratio = ratios.get("eager")
        style = "red" if bad else "yellow" if ratio is not None and ratio < 1 else ""
        self.line(_aligned(cells, columns), style)
        for name, gate in row["gate"].items():
            if not gate["ok"]:
                self.line(f"    gate red, no speed-up is given ({name}): {gate['why']}", "red")
        if row.get("refused"):
            self.line(f"    refused: {row['refused']}", "red")
        for note in row["notes"]:
            self.line(f"    {note}", "dim")


def _aligned(
    cells: Mapping[str, str | None], columns: tuple[tuple[str, int], ...], names: bool = False
) -> str:
    text = ""
    for i, (name, width) in enumerate(columns):
        value = name if names else cells[name] or ""
        left = i < 2 or name in ("layout", "pass")
        text += f"{value:<{width}} " if left else f"{value:>{width}} "
    return text.rstrip()


def summary(screen: Screen, results: Mapping[str, Any], targets: list[Any]) -> None:
    reached = against_targets(results, targets)
    if reached:
        screen.line()
        screen.line(
            "against the targets (geometric mean, no row under 1; part: met by the rows that ran)",
            "bold",
        )
        for r in reached:
            mark = "missed" if not r["met"] else "met   " if r["rows"] == r["of"] else "part  "
            screen.line(
                f"  {mark} {r['reached']:6.2f} of {r['target']:<5g} {r['unit']:<10} {r['what']}: "
                f"{r['rows']} of {r['of']} rows, lowest {r['worst']:.2f} ({r['worst_key']})",
                "green" if r["met"] else "yellow",
            )
    slower = losses(results)
    screen.line()
    screen.line("losses" if slower else "losses: none in what was measured", "bold")
    for text in slower:
        screen.line(f"  {text}", "yellow")
    red = failures(results)
    if red:
        screen.line()
        screen.line("red: these rows are wrong and carry no speed-up", "bold red")
        for text in red:
            screen.line(f"  {text}", "red")


__all__ = ["Screen", "header_lines", "kernel_cells", "model_cells", "summary"]


def is_terminal() -> bool:
    return sys.stdout.isatty()
