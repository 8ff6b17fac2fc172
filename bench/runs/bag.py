"""The memory of training a gated pool over one bag of 100 000 x 1024: x and O(N) scalars, or not.

Each competitor runs in a process of its own, so that the peak of its resident memory is its own too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import torch
from torch import Tensor

from attnkern.functional import gated_attention_pool
from bench.machine import ROOT
from bench.run import Claim, Cost, Outcome, Settings
from bench.runner import peak_bytes

NEEDS = ()
FEATURES, HIDDEN = 1024, 256


def eager(x: Tensor, V: Tensor, b_V: Tensor, U: Tensor, b_U: Tensor, w: Tensor) -> Tensor:
    h = torch.tanh(x @ V.t() + b_V) * torch.sigmoid(x @ U.t() + b_U)
    return torch.softmax((h @ w.t()).transpose(1, 2), 2) @ x


def measure(name: str, items: int, impl: str) -> dict[str, float]:
    """Seconds of one forward and backward pass, and what it held at once beyond its inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.empty(1, items, FEATURES).uniform_(-1, 1, generator=generator)
    shapes = ((HIDDEN, FEATURES), (HIDDEN,), (HIDDEN, FEATURES), (HIDDEN,), (1, HIDDEN))
    weights = [torch.empty(s).uniform_(-0.05, 0.05, generator=generator) for s in shapes]
    leaves = [t.requires_grad_() for t in weights]  # x is frozen, as features of a slide are

    def step(i: int = 0) -> None:
        z = eager(x, *leaves) if name == "eager" else gated_attention_pool(x, *leaves, impl=impl)
        torch.autograd.grad(z, leaves, torch.ones_like(z))

    _forget_peak()
    before = _resident("VmRSS")
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    resident = _resident("VmHWM") - before
    held = peak_bytes(step, torch.device("cpu"))
    return {"seconds": seconds, "resident": resident, "held": held or 0, "x": x.numel() * 4}


def _resident(field: str) -> int:
    """Bytes of this process that are in memory now (VmRSS) or were at most (VmHWM); 0 where unknown."""
    try:
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith(field))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024


def _forget_peak() -> None:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return


def run(settings: Settings) -> Outcome:
    items = 20_000 if settings.quick else 100_000
    found = {}
    for name in ("eager", "ours"):
        settings.say(f"bag: {name}")
        call = f"measure({name!r}, {items}, {settings.impl!r})"
        script = f"import json; from bench.runs.bag import measure; print(json.dumps({call}))"
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        found[name] = json.loads(done.stdout.splitlines()[-1])
    ours = found["ours"]
    figures = {"x": f"{ours['x'] / 1e6:.4g} MB"}
    for name, f in found.items():
        figures[f"{name}: growth of resident memory"] = f"{f['resident'] / 1e6:.4g} MB"
    return Outcome(
        [
            Claim(
                "held beyond x in a training step, as a share of x",
                ours["held"] / ours["x"],
                0.3,
                at_most=True,
            )
        ],
        figures,
        {
            f"a bag of {items} x {FEATURES}, hidden {HIDDEN}, first step": {
                name: Cost(f["seconds"], f["held"]) for name, f in found.items()
            }
        },
    )
