"""The results file: its schema, what follows from the times, merging of runs, CSV."""

from __future__ import annotations

import csv
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.rows import Target, benches

SCHEMA = 1
SECTIONS = {
    "machine": dict,
    "settings": dict,
    "kernels": list,
    "models": list,
}


def empty(machine: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "machine": dict(machine),
        "settings": dict(settings),
        "kernels": [],
        "models": [],
    }


def load(path: Path) -> dict[str, Any]:
    """The results in ``path``; ValueError names what is wrong with the file."""
    try:
        results = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"bench: {path} is not JSON ({error})") from error
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        found = results.get("schema") if isinstance(results, dict) else type(results).__name__
        raise ValueError(f"bench: {path} must have schema {SCHEMA}, got {found}")
    for name, kind in SECTIONS.items():
        if not isinstance(results.get(name), kind):
            raise ValueError(f"bench: {path} must have a section {name} ({kind.__name__})")
    return results


def save(results: Mapping[str, Any], path: Path) -> None:
    """Whole or not at all: a killed shard leaves the last complete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    os.replace(part, path)


def median(row: Mapping[str, Any], name: str, mode: str = "cold") -> float | None:
    stats = row["times"].get(name, {}).get(mode)
    return stats["median"] if stats else None


def derive(row: dict[str, Any], copy_GBps: float, cache: int) -> None:
    """Ratios, bandwidth and percent of the copy roof, from the times; refuses what cannot be.

    The roof is the fastest copy seen: of these very inputs, interleaved, and, for a working set
    that no cache holds (over 4 times the last level), also of the whole machine.  For an operation
    that writes no map forward a plain read of the inputs counts too, which may be faster.
    """
    row["ratios"], row["roof"], row["refused"] = {}, None, None
    impl = row["impl"]
    ours = median(row, impl)
    if ours is None:
        return
    in_memory = row["minimum_bytes"] > 4 * cache
    fastest = {name: modes["cold"]["fastest"] for name, modes in row["times"].items()}
    rates = [2 * row["map_bytes"] / t / 1e9 for n, t in fastest.items() if n.startswith("copy")]
    rates += [row["map_bytes"] / t / 1e9 for n, t in fastest.items() if n.startswith("read")]
    roof = max(*rates, copy_GBps if in_memory else 0.0)
    reached = row["minimum_bytes"] / ours / 1e9
    percent = 100 * reached / roof
    row["roof"] = {"GBps": reached, "copy_GBps": roof, "percent": percent, "in_memory": in_memory}
    if in_memory and percent > 100:
        row["refused"] = (
            f"{reached:.1f} GB/s is {percent:.0f} % of the fastest copy ({roof:.1f} GB/s) on data "
            "that no cache holds: the measurement is wrong, no speed-up is given"
        )
        return
    row["ratios"] = {
        mode: ratios for mode in ("cold", "hot", "launched") if (ratios := _ratios(row, mode))
    }


def _ratios(row: Mapping[str, Any], mode: str) -> dict[str, float]:
    ours = median(row, row["impl"], mode)
    if ours is None:
        return {}

    def best(*names: str) -> float | None:
        return min((t for n in names if (t := median(row, n, mode)) is not None), default=None)

    compiled = best("compile", "compile, max-autotune")
    inside = best(f"{row['impl']}, in compile")
    candidates = {
        "eager": (best("eager"), ours),
        "eager_any_layout": (best("eager", "eager, other layout"), ours),
        "compile": (compiled, ours),
        "in_compile": (compiled, inside),
    }
    return {
        n: them / us for n, (them, us) in candidates.items() if them is not None and us is not None
    }


def failures(results: Mapping[str, Any]) -> list[str]:
    """Every red gate and refused figure, one sentence each."""
    found = []
    for row in [*results["kernels"], *results["models"]]:
        found += [
            f"{row['key']} ({name}): {gate['why']}"
            for name, gate in row["gate"].items()
            if not gate["ok"]
        ]
        if row.get("refused"):
            found.append(f"{row['key']}: {row['refused']}")
    return found


def geomean(values: Iterable[float]) -> float | None:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def against_targets(results: Mapping[str, Any], targets: Iterable[Target]) -> list[dict[str, Any]]:
    """Geometric mean and worst row of each target's group beside what it asks for."""
    rows = []
    for target in targets:
        members = [
            r
            for r in results["kernels"]
            if r["group"] == target.group
            and r["pass"] == target.which
            and r["dtype"] in target.dtypes
        ]
        whole = _members(results["machine"]["device"], target)
        for baseline, least in (("eager", target.eager), ("compile", target.compile)):
            # single samples on a GPU: eager pays its launches, compile is held in a graph
            mode = (
                "launched"
                if baseline == "eager" and any("launched" in r["ratios"] for r in members)
                else "cold"
            )
            ratios = {
                r["key"]: r["ratios"][mode][baseline]
                for r in members
                if baseline in r["ratios"].get(mode, {})
            }
            mean = geomean(ratios.values())
            if mean is None:
                continue
            worst = min(ratios, key=lambda k: ratios[k])
            rows.append(
                {
                    "what": target.label,
                    "unit": f"x {baseline}",
                    "target": least,
                    "reached": mean,
                    "rows": len(ratios),
                    "of": whole,
                    "worst": ratios[worst],
                    "worst_key": worst,
                    "met": mean >= least and ratios[worst] >= 1,
                }
            )
        percents = {r["key"]: r["roof"]["percent"] for r in members if r["roof"] and r["ratios"]}
        if target.roof is not None and percents:
            worst = min(percents, key=lambda k: percents[k])
            mean = geomean(percents.values())
            assert mean is not None
            rows.append(
                {
                    "what": target.label,
                    "unit": "% of copy",
                    "target": target.roof,
                    "reached": mean,
                    "rows": len(percents),
                    "of": whole,
                    "worst": percents[worst],
                    "worst_key": worst,
                    "met": mean >= target.roof,
                }
            )
    return rows


def _members(device: str, target: Target) -> int:
    """How many rows the target speaks of, run or not."""
    return sum(
        s.group == target.group and s.dtype in target.dtypes and target.which in s.passes
        for bench in benches().values()
        for s in bench.subjects[device]
    )


def losses(results: Mapping[str, Any]) -> list[str]:
    """Rows where something else is faster; listed, never dropped."""
    found = []
    for row in results["kernels"]:
        for mode, ratios in row["ratios"].items():
            for name, what in (
                ("eager", "eager"),
                ("eager_any_layout", "eager in the other layout"),
                ("compile", "torch.compile"),
                ("in_compile", "torch.compile (ours inside torch.compile)"),
            ):
                if (
                    name in ratios
                    and ratios[name] < 1
                    and (name != "eager_any_layout" or ratios["eager"] >= 1)
                ):
                    found.append(f"{row['key']}, {mode}: {ratios[name]:.2f} x {what}")
    for row in results["models"]:
        found += [
            f"{row['key']}: {ratio:.2f} x {name}"
            for name, ratio in row["ratios"].items()
            if ratio < 1
        ]
    return found


def merge(runs: list[dict[str, Any]], derive_model: Any) -> dict[str, Any]:
    """One file from several processes: medians of medians, the widest quartiles."""
    merged = json.loads(json.dumps(runs[0]))
    copy = max(r["machine"]["copy"]["memory_GBps"] for r in runs)
    merged["machine"]["copy"]["memory_GBps"] = copy
    merged["settings"]["processes"] = len(runs)
    for section in ("kernels", "models"):
        others = [{row["key"]: row for row in r[section]} for r in runs]
        for row in merged[section]:
            rows = [o[row["key"]] for o in others if row["key"] in o]
            row["gate"] = {
                name: min(
                    (r["gate"][name] for r in rows if name in r["gate"]),
                    key=lambda g: (g["ok"], -g.get("ratio", 0.0)),
                )
                for name in row["gate"]
            }
            for name, modes in row["times"].items():
                for mode in modes:
                    found = [
                        r["times"][name][mode] for r in rows if mode in r["times"].get(name, {})
                    ]
                    modes[mode] = _merge_stats(found)
            if section == "kernels":
                derive(row, copy, merged["machine"]["llc_bytes"])
                if any(not g["ok"] for n, g in row["gate"].items() if n == row["impl"]):
                    row["ratios"] = {}
            else:
                derive_model(row)
    return merged


def _merge_stats(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "median": statistics.median(s["median"] for s in found),
        "q1": min(s["q1"] for s in found),
        "q3": max(s["q3"] for s in found),
        "fastest": min(s["fastest"] for s in found),
        "samples": sum(s["samples"] for s in found),
        "processes": [s["median"] for s in found],
    }


COLUMNS = (
    *("section", "key", "of", "shape", "dtype", "layout", "pass", "gate", "error_ratio"),
    *("competitor", "mode", "median_ms", "q1_ms", "q3_ms", "samples", "times_ours"),
    *("peak_bytes", "minimum_bytes"),
)


def write_csv(results: Mapping[str, Any], path: Path) -> None:
    """One line per row, competitor and mode; a red row has one line and no times."""
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, COLUMNS)
        out.writeheader()
        for section in ("kernels", "models"):
            for row in results[section]:
                gate = row["gate"][row["impl"]]
                line = {
                    "section": section,
                    "of": row.get("op") or row["model"],
                    "shape": "x".join(map(str, row["shape"])),
                    "gate": "ok" if gate["ok"] else "red",
                    "error_ratio": gate.get("ratio"),
                    "minimum_bytes": row.get("minimum_bytes"),
                    **{name: row[name] for name in ("key", "dtype", "layout", "pass")},
                }
                if not row["times"]:
                    out.writerow(line)
                for name, modes in row["times"].items():
                    for mode, stats in modes.items():
                        ours = median(row, row["impl"], mode)
                        out.writerow(
                            line
                            | {"competitor": name, "mode": mode, "samples": stats["samples"]}
                            | {f"{q}_ms": stats[q] * 1e3 for q in ("median", "q1", "q3")}
                            | {
                                "times_ours": stats["median"] / ours
                                if ours and row["ratios"]
                                else None,
                                "peak_bytes": row["peak_bytes"].get(name),
                            }
                        )
