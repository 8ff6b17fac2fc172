"""The HTML report: one file that loads nothing, for someone who decides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from bench import plots, screen
from bench.results import against_targets, failures, geomean, losses
from bench.rows import FORWARD, PASSES


def write(results: Mapping[str, Any], targets: list[Any], path: Path) -> None:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(**content(results, targets))
    path.write_text(page, encoding="utf-8")


def content(results: Mapping[str, Any], targets: list[Any]) -> dict[str, Any]:
    kernels, models = results["kernels"], results["models"]
    figures = [
        ("Whole networks", plots.networks(models)),
        *((f"Kernels, {which}", plots.speedups(kernels, which, targets)) for which in PASSES),
        ("Bandwidth: how close to a plain copy", plots.roof(kernels)),
        ("Memory in training", plots.memory(kernels)),
    ]
    return {
        "results": results,
        "device": results["machine"].get("gpu", results["machine"]["cpu"]),
        "header": screen.header_lines(results),
        "headlines": headlines(results),
        "failures": failures(results),
        "losses": losses(results),
        "targets": against_targets(results, targets),
        "figures": [(title, Markup(plots.svg(f))) for title, f in figures if f is not None],
        "kernel_columns": [name for name, _ in screen.KERNEL],
        "kernel_legend": screen.KERNEL_LEGEND,
        "kernels": [_kernel(row) for row in kernels],
        "model_columns": [name for name, _ in screen.MODEL],
        "model_legend": screen.MODEL_LEGEND,
        "models": [
            {"row": row, "cells": screen.model_cells(row), "tone": _tone(row, row["ratios"])}
            for row in models
        ],
    }


def _kernel(row: Mapping[str, Any]) -> dict[str, Any]:
    """Table cells, and every competitor's times in each mode for the fold-out."""
    detail = []
    for name, modes in row["times"].items():
        for mode, stats in modes.items():
            detail.append(
                {
                    "name": name,
                    "mode": mode,
                    "median": screen.milliseconds(stats["median"]),
                    "q1": screen.milliseconds(stats["q1"]),
                    "q3": screen.milliseconds(stats["q3"]),
                    "samples": stats["samples"],
                    "memory": screen.megabytes(row["peak_bytes"].get(name)),
                    "compiling": row["compile_seconds"].get(name),
                }
            )
    ratios = row["ratios"].get("cold", {})
    return {
        "row": row,
        "cells": screen.kernel_cells(row),
        "detail": detail,
        "tone": _tone(row, ratios),
    }


def _tone(row: Mapping[str, Any], ratios: Mapping[str, float]) -> str:
    if row.get("refused") or any(not g["ok"] for g in row["gate"].values()):
        return "red"
    return "loss" if any(r < 1 for r in ratios.values()) else ""


def headlines(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures that decide, each with what it is of."""
    found = []
    for which in PASSES:
        for baseline, name in (("eager", "eager"), ("compile", "torch.compile")):
            rows = [
                r["ratios"]["cold"][baseline]
                for r in results["kernels"]
                if r["pass"] == which and baseline in r["ratios"].get("cold", {})
            ]
            if (mean := geomean(rows)) is not None:
                what = "forward" if which == FORWARD else "forward + backward"
                found.append(
                    (
                        f"{mean:.2f}×",
                        f"as fast as {name}, one layer, {what}: mean of {len(rows)} rows, "
                        f"worst {min(rows):.2f}",
                    )
                )
    wholes = [r["ratios"]["eager"] for r in results["models"] if r["ratios"]]
    if wholes:
        found.append(
            (
                f"{min(wholes):.2f}–{max(wholes):.2f}×",
                f"as fast as eager, whole networks: {len(wholes)} rows, mean {geomean(wholes):.2f}",
            )
        )
    gates = [g for r in (*results["kernels"], *results["models"]) for g in r["gate"].values()]
    good = sum(g["ok"] for g in gates)
    found.append(
        (
            f"{good} of {len(gates)}",
            "gates green: outputs and gradients within twice eager's own error",
        )
    )
    return found
