"""The report's plots, as inline SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from bench.results import median

OURS, EAGER, COMPILE, INK = "#2a7f62", "#b8573a", "#5b6fa8", "#555555"
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "svg.hashsalt": "attnkern",
}
LAYOUT = {"channels_last": " channels_last"}


def svg(figure: Any) -> str:
    """Inline SVG that loads nothing and names no other host."""
    out = io.StringIO()
    figure.savefig(
        out, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None}
    )
    plt.close(figure)
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    return re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['case']} {row['dtype']}{LAYOUT.get(row['layout'], '')}"


def speedups(rows: list[Mapping[str, Any]], which: str, targets: list[Any]) -> Any:
    """Bars: how many times faster than eager and than torch.compile; lines: the targets."""
    rows = [r for r in rows if r["pass"] == which and r["ratios"]]
    if not rows:
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 0.6 + 0.36 * len(rows)))
        for i, row in enumerate(rows):
            ratios = row["ratios"]["cold"]
            for name, color, shift in (("eager", EAGER, -0.19), ("compile", COMPILE, 0.19)):
                if name in ratios:
                    axes.barh(i + shift, ratios[name], 0.36, color=color)
                    axes.text(
                        ratios[name], i + shift, f" {ratios[name]:.2f}", va="center", fontsize=7
                    )
        fp32 = [t for t in targets if t.which == which]
        if fp32:
            axes.axvline(fp32[0].eager, color=EAGER, ls=":", lw=1)
            axes.axvline(fp32[0].compile, color=COMPILE, ls=":", lw=1)
        axes.axvline(1, color=INK, lw=0.8)
        axes.set_yticks(range(len(rows)), [_label(r) for r in rows])
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel(
            f"{which}: times faster than eager (red), torch.compile (blue); dotted: target mean"
        )
        return figure


def roof(rows: list[Mapping[str, Any]]) -> Any:
    """Percent of the fastest copy against the bytes a call must move, one mark per provider."""
    providers = {"ours": (OURS, "o"), "eager": (EAGER, "x"), "compile": (COMPILE, "+")}
    rows = [r for r in rows if r["ratios"] and r["roof"]]
    if not rows:
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 3.4))
        for provider, (color, marker) in providers.items():
            points = []
            for row in rows:
                seconds = median(row, row["impl"] if provider == "ours" else provider)
                if seconds:
                    percent = 100 * row["minimum_bytes"] / seconds / 1e9 / row["roof"]["copy_GBps"]
                    points.append((row["minimum_bytes"] / 1e6, percent))
            if points:
                axes.scatter(
                    *zip(*points, strict=True), c=color, marker=marker, s=36, label=provider
                )
        axes.axhline(100, color=INK, lw=0.8)
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("MB a call must move at least")
        axes.set_ylabel("% of the fastest copy")
        axes.legend(frameon=False, ncols=3, loc="upper left", bbox_to_anchor=(0, 1.12))
        return figure


def networks(rows: list[Mapping[str, Any]]) -> Any:
    """Bars: whole-network speed-up; the mark: what it would be if attention cost nothing."""
    rows = [r for r in rows if r["ratios"]]
    if not rows:
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 0.6 + 0.4 * len(rows)))
        for i, row in enumerate(rows):
            for name, color, shift in (("eager", EAGER, -0.19), ("compile", COMPILE, 0.19)):
                if name in row["ratios"]:
                    value = row["ratios"][name]
                    axes.barh(i + shift, value, 0.36, color=color)
                    axes.text(value, i + shift, f" {value:.2f}", va="center", fontsize=7)
            axes.plot([row["ceiling"]] * 2, [i - 0.4, i + 0.02], color=OURS, lw=2)
        axes.axvline(1, color=INK, lw=0.8)
        axes.set_yticks(
            range(len(rows)),
            [f"{r['model']}, {r['pass'].replace('forward+backward', 'training')}" for r in rows],
        )
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel(
            "whole network: times faster than eager (red), torch.compile (blue); "
            "green: eager if attention cost nothing"
        )
        return figure


def memory(rows: list[Mapping[str, Any]]) -> Any:
    """Bars: peak memory of a training call in units of x, ours and eager."""
    rows = [
        r for r in rows if r["pass"] != "forward" and r["peak_bytes"].get("eager") and r["ratios"]
    ]
    if not rows:
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 0.6 + 0.3 * len(rows)))
        for i, row in enumerate(rows):
            for name, color, shift in ((row["impl"], OURS, -0.17), ("eager", EAGER, 0.17)):
                if size := row["peak_bytes"].get(name):
                    axes.barh(i + shift, size / row["map_bytes"], 0.32, color=color)
        axes.set_yticks(range(len(rows)), [_label(r) for r in rows])
        axes.invert_yaxis()
        axes.set_xlabel(
            "peak memory of forward+backward beyond its inputs, in sizes of x: "
            "ours (green), eager (red)"
        )
        return figure
