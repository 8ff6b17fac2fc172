"""``python -m bench``: see bench/README.md."""

from __future__ import annotations

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler counts memory here, it need not talk

import argparse
import importlib.util
import logging
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import screen as screens

NEEDS = {
    "rich": ("rich", "the terminal display (or pass --plain)"),
    "jinja2": ("jinja2", "the HTML report (or pass --json)"),
    "matplotlib": ("matplotlib", "the plots of the HTML report (or pass --json)"),
    "timm": ("timm", "the whole models (or pass --only kernel)"),
    "torchvision": ("torchvision", "the whole models (or pass --only kernel)"),
    "skimage": ("scikit-image", "the photographs of the whole models (or pass --only kernel)"),
    "monai": ("monai", "the network of the run brain"),
    "nilearn": ("nilearn", "the volumes of the run brain"),
    "sklearn": ("scikit-learn", "the handwritten digits of the real runs"),
    "ai_edge_litert": ("ai-edge-litert", "the original of the run selfie"),
    "onnx": ("onnx", "the networks of the run ocr"),
    "onnxruntime": ("onnxruntime", "the networks of the run ocr"),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="python -m bench",
        description="Is attnkern right on this machine, how fast is it, and against what.",
    )
    p.add_argument(
        "--full", action="store_true", help="every row, every torch.compile, larger batches"
    )
    p.add_argument("--only", choices=("kernel", "models"), help="one half of it")
    p.add_argument(
        "--run", metavar="NAME", help="real runs instead: names of --list, comma-separated, or all"
    )
    p.add_argument("--quick", action="store_true", help="a shorter real run, as the tests do it")
    p.add_argument("--op", help="rows of this operator alone")
    p.add_argument("--match", default="", help="rows whose key contains this (see --list)")
    p.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16", "fp64"), help="rows of this dtype alone"
    )
    p.add_argument("--pass", dest="which", choices=("forward", "training"), help="one pass alone")
    p.add_argument(
        "--impl", help="implementations, comma-separated (default: all that can run here)"
    )
    p.add_argument(
        "--gpu", action="store_true", help="the GPU rows, all of them; an error without a GPU"
    )
    p.add_argument("--cpu", action="store_true", help="the CPU rows, even where there is a GPU")
    p.add_argument("--threads", type=int, help="CPU threads (default: all)")
    p.add_argument("--seconds", type=float, default=1.0, help="of timing per row (default 1)")
    p.add_argument("--no-compile", action="store_true", help="leave the torch.compile columns out")
    p.add_argument(
        "--repeats", type=int, default=1, help="separate processes, merged; published figures: 3"
    )
    p.add_argument("--shard", help="i/n: the i-th of n parts; skips what OUT already holds")
    p.add_argument("--out", type=Path, default=Path("bench/out"), help="folder (default bench/out)")
    p.add_argument("--json", action="store_true", help="write JSON and CSV, no HTML")
    p.add_argument(
        "--plain", action="store_true", help="plain lines (the default when not a terminal)"
    )
    p.add_argument("--list", action="store_true", help="print the keys that would run, and stop")
    options = p.parse_args(arguments)
    if options.shard:
        try:
            i, n = map(int, options.shard.split("/"))
        except ValueError:
            p.error(f"--shard must be i/n, got {options.shard}")
        if not 1 <= i <= n:
            p.error(f"--shard must be between 1/{n} and {n}/{n}, got {options.shard}")
        options.shard = (i, n)
        if options.repeats > 1:
            p.error("--shard and --repeats do not combine")
    if options.gpu and options.cpu:
        p.error("--gpu and --cpu exclude each other")
    if options.repeats < 1:
        p.error(f"--repeats must be at least 1, got {options.repeats}")
    if options.threads is not None and options.threads < 1:
        p.error(f"--threads must be at least 1, got {options.threads}")
    return options


def stop(sentence: str) -> Any:
    print(f"bench: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def missing(options: argparse.Namespace) -> list[str]:
    """Packages that the chosen work needs and this Python lacks."""
    needed = []
    if not options.plain and not options.list:
        needed.append("rich")
    if options.run:
        from bench import wheels

        chosen = chosen_runs(options)
        for wheel in (w for module in chosen for w in getattr(module, "WHEELS", ())):
            if wheels.find(wheel) is None:
                stop(wheels.advice(wheel))
        needed += sorted({name for module in chosen for name in module.NEEDS})
        return [name for name in needed if importlib.util.find_spec(name) is None]
    if not options.json and not options.list:
        needed += ["jinja2", "matplotlib"]
    if options.only != "kernel" and not options.list:
        needed += ["timm", "torchvision", "skimage"]
    return [name for name in needed if importlib.util.find_spec(name) is None]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    options.plain = options.plain or not screens.is_terminal()
    lacking = missing(options)
    if lacking and options.shard:
        # a shard on a borrowed machine measures what it can and says what it leaves out
        for name in lacking:
            print(f"bench: left out, the package {NEEDS[name][0]} is missing: {NEEDS[name][1]}")
        options.plain |= "rich" in lacking
        options.json |= bool({"jinja2", "matplotlib"} & set(lacking))
        if {"timm", "torchvision", "skimage"} & set(lacking):
            if options.only == "models":
                stop("nothing is left to measure; pip install timm torchvision scikit-image")
            options.only = "kernel"
    elif lacking:
        packages = " ".join(NEEDS[name][0] for name in lacking)
        reasons = "; ".join(f"{NEEDS[name][0]} is needed for {NEEDS[name][1]}" for name in lacking)
        stop(f"pip install {packages} ({reasons})")
    if options.run:
        return real_runs(options)
    if options.repeats > 1:
        return repeat(options, sys.argv[1:] if arguments is None else arguments)
    return run(options, sys.argv[1:] if arguments is None else arguments)


def chosen_runs(options: argparse.Namespace) -> list[Any]:
    from bench.run import runs

    known = runs()
    names = list(known) if options.run == "all" else options.run.split(",")
    if unknown := [name for name in names if name not in known]:
        stop(f"--run must be of {', '.join(known)} or all, got {', '.join(unknown)}")
    return [known[name] for name in names]


def real_runs(options: argparse.Namespace) -> int:
    """Each chosen run, its claims and figures; 1 when a claim is missed."""
    import torch

    from bench.run import Settings, lines

    if options.threads:
        torch.set_num_threads(options.threads)
    screen = screens.Screen(options.plain)
    missed = False
    for module in chosen_runs(options):
        name = module.__name__.split(".")[-1]
        title = (module.__doc__ or "").splitlines()[0]
        start = time.perf_counter()
        with screen.running():
            settings = Settings(
                options.out,
                options.impl or "auto",
                options.quick,
                seconds=options.seconds,
                say=screen.say,
            )
            outcome = module.run(settings)
        outcome.save(options.out / f"{name}.json")
        screen.line(f"{name}: {title}", "bold")
        for line in lines(outcome):
            screen.line(f"  {line}", "red" if line.startswith("MISSED") else "")
        screen.line(f"  {time.perf_counter() - start:.0f} s; written to {options.out}/{name}.json")
        missed |= not all(claim.met for claim in outcome.claims)
    return int(missed)


def choose_device(options: argparse.Namespace) -> Any:
    import torch

    if options.gpu and not torch.cuda.is_available():
        stop("--gpu needs a CUDA GPU that torch can see, and torch sees none")
    return torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")


def choose_impls(options: argparse.Namespace, device: Any) -> tuple[tuple[str, ...], str]:
    """What to measure, the one a user would get first; and a sentence when it is not a kernel."""
    import torch

    from attnkern._select import IMPLS, ORDER, refuse

    if options.impl:
        impls = tuple(options.impl.split(","))
        for impl in impls:
            if impl not in IMPLS[1:]:
                stop(f"--impl must be of {', '.join(IMPLS[1:])}, got {impl}")
            if reason := refuse(impl, device, torch.float32):
                stop(f"--impl {impl} cannot run here: {reason}")
        return impls, ""
    order = [impl for impl in ORDER[device.type] if impl != "reference"]
    reasons = {impl: refuse(impl, device, torch.float32) for impl in order}
    impls = tuple(impl for impl in order if reasons[impl] is None)
    if impls:
        return impls, "; ".join(f"{i} is left out: {r}" for i, r in reasons.items() if r)
    why = "; ".join(f"{impl}: {reason}" for impl, reason in reasons.items())
    return ("reference",), f"no kernel can run here, these figures are of the reference ({why})"


def select(options: argparse.Namespace, device: Any) -> tuple[list[Any], list[Any]]:
    """The subjects and networks that the options ask for, this shard's part of them."""
    from bench.models import NETWORKS
    from bench.rows import benches

    if options.op and options.op not in benches():
        stop(f"--op must be one of {', '.join(benches())}, got {options.op}")
    everything = options.full or options.gpu
    subjects = [
        s
        for op, found in benches().items()
        for s in found.subjects[device.type]
        if options.only != "models"
        and options.op in (None, op, s.op)
        and options.dtype in (None, s.dtype)
        and (everything or s.quick or options.match)
        and any(options.match in s.key(which) for which in s.passes)
    ]
    networks = [
        n
        for n in NETWORKS
        if options.only != "kernel"
        and options.op in (None, "squeeze_excite")
        and options.dtype in (None, "fp32")
        and options.match in f"{n.library}/{n.name}"
    ]
    if options.shard:
        i, n = options.shard
        units = [*subjects, *networks][i - 1 :: n]
        subjects = [u for u in subjects if u in units]
        networks = [u for u in networks if u in units]
    return subjects, networks


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    start = time.perf_counter()
    device = choose_device(options)
    subjects, networks = select(options, device)
    if options.list:
        from bench.run import runs

        for subject in subjects:
            print("\n".join(subject.key(which) for which in subject.passes))
        for network in networks:
            print(f"{network.library}/{network.name}")
        if not (options.only or options.op or options.match) and (options.shard or (1,))[0] == 1:
            print("\n".join(f"--run {name}" for name in runs()))
        return 0
    if not subjects and not networks:
        stop("no row matches; python -m bench --list --full shows them all")

    import torch

    from bench import machine, models, results, runner
    from bench.gate import Oracles
    from bench.rows import FORWARD, PASSES, TRAINING, benches

    # says on every machine without a GPU that there is none
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if options.threads:
        torch.set_num_threads(options.threads)
    screen = screens.Screen(options.plain)
    impls, remark = choose_impls(options, device)
    problem = "as asked" if options.no_compile else machine.compile_problem(device)
    about = machine.describe(device)
    about["allocator"] = machine.allocator_state(device)
    about["copy"] = machine.copy_bandwidth(device)
    notes = [remark] if remark else []
    if problem and not options.no_compile:
        notes.append(problem)
    if about["load"] > 0.5 * about["cores"]:
        notes.append(
            f"the machine is busy (load {about['load']:.1f}, {about['cores']} cores): expect noise"
        )
    settings = {
        "command": shlex.join(["python", "-m", "bench", *arguments]),
        "impls": list(impls),
        "seconds": options.seconds,
        "full": options.full or options.gpu,
        "compile": problem is None,
        "processes": 1,
        "notes": notes,
    }
    path = options.out / "results.json"
    found = results.empty(about, settings)
    if options.shard and path.exists():
        before = results.load(path)
        if all(before["machine"].get(k) == about[k] for k in ("commit", "device", "torch", "cpu")):
            found["kernels"], found["models"] = before["kernels"], before["models"]
    for line in screens.header_lines(found):
        screen.line(line)
    for note in notes:
        screen.line(note, "yellow")

    passes = {None: PASSES, "forward": (FORWARD,), "training": (TRAINING,)}[options.which]
    config = runner.Settings(
        device,
        impls,
        passes,
        options.seconds,
        options.full or options.gpu,
        problem is None,
        about["copy"]["memory_GBps"],
        screen.say,
    )
    done = {row["key"] for row in [*found["kernels"], *found["models"]]}
    subjects = [s for s in subjects if any(s.key(w) not in done for w in s.passes if w in passes)]
    networks = [
        n for n in networks if not any(k.startswith(f"{n.library}/{n.name}/") for k in done)
    ]
    work: list[tuple[str, Any, Any, Any]] = []
    oracles = Oracles(device)
    if subjects:
        work.append(("kernels", subjects, screens.KERNEL, screens.kernel_cells))
    if networks:
        work.append(("models", networks, screens.MODEL, screens.model_cells))
    with screen.running():
        for section, units, columns, cells in work:
            screen.head(columns)
            for unit in units:
                rows = (
                    runner.measure(unit, config, oracles)
                    if section == "kernels"
                    else models.measure(unit, config)
                )
                again = {row["key"] for row in rows}
                found[section] = [row for row in found[section] if row["key"] not in again]
                for row in rows:
                    found[section].append(row)
                    screen.row(cells(row), columns, row)
                results.save(found, path)
            screen.line(
                screens.KERNEL_LEGEND if section == "kernels" else screens.MODEL_LEGEND, "dim"
            )
    found["settings"]["seconds_total"] = time.perf_counter() - start
    return finish(
        options, found, screen, [t for b in benches().values() for t in b.targets[device.type]]
    )


def finish(
    options: argparse.Namespace, found: dict[str, Any], screen: Any, targets: list[Any]
) -> int:
    from bench import results

    screens.summary(screen, found, targets)
    results.save(found, options.out / "results.json")
    results.write_csv(found, options.out / "results.csv")
    written = ["results.json", "results.csv"]
    if not options.json:
        from bench import report

        report.write(found, targets, options.out / "report.html")
        written.append("report.html")
    screen.line()
    seconds = found["settings"].get("seconds_total", 0.0)
    screen.line(f"{seconds:.0f} s; written to {options.out}/: {', '.join(written)}")
    return 1 if results.failures(found) else 0


def repeat(options: argparse.Namespace, arguments: list[str]) -> int:
    """The same run in separate processes, one after the other, then their merged results."""
    from bench import models, results
    from bench.rows import benches

    start = time.perf_counter()
    screen = screens.Screen(options.plain)
    paths = []
    for i in range(options.repeats):
        screen.line(f"process {i + 1} of {options.repeats}", "bold")
        out = options.out / f"run-{i + 1}"
        command = [
            sys.executable,
            "-m",
            "bench",
            *arguments,
            "--repeats",
            "1",
            "--json",
            "--out",
            str(out),
        ]
        code = subprocess.run(command, check=False).returncode
        if code not in (0, 1):
            return code
        paths.append(out / "results.json")
    found = results.merge([results.load(p) for p in paths], models.derive)
    found["settings"]["command"] = shlex.join(["python", "-m", "bench", *arguments])
    found["settings"]["seconds_total"] = time.perf_counter() - start
    screen.head(screens.KERNEL)
    for row in found["kernels"]:
        screen.row(screens.kernel_cells(row), screens.KERNEL, row)
    if found["models"]:
        screen.head(screens.MODEL)
    for row in found["models"]:
        screen.row(screens.model_cells(row), screens.MODEL, row)
    device = found["machine"]["device"]
    return finish(
        options, found, screen, [t for b in benches().values() for t in b.targets[device]]
    )


if __name__ == "__main__":
    sys.exit(main())
