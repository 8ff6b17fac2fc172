"""Whole networks on a real photograph: same outputs and gradients, then the time of the whole.

Weights are random (seeded) and batch-norm statistics are taken from the photographs: pretrained
weights would need a download, and speed does not depend on them.  ``zero_init_last=False``, or
the squeeze-and-excitation of a residual network would multiply zeros and any gate would pass.
A segmentation network labels every position.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import clock
from bench.gate import LIMIT, sentence
from bench.rows import FORWARD, TRAINING
from bench.runner import Settings, peak_bytes

SIZE = 224
# in scikit-image's wheel
PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
ATTENTION = (
    "SEModule",
    "SqueezeExcite",
    "EffectiveSEModule",
    "SqueezeExcitation",
    "AttentionBlock",
)
DROPOUT = {"Dropout": ("p",), "StochasticDepth": ("p",), "DropPath": ("drop_prob",)}
LAYOUTS = {"channels_first": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Network:
    library: str
    name: str
    options: tuple[tuple[str, Any], ...] = ()
    compile: bool = False  # the default run pays for its torch.compile

    @property
    def label(self) -> str:
        return f"{self.library} {self.name}"

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        if self.library == "timm":
            import timm

            return timm.create_model(self.name, pretrained=False, **dict(self.options))
        if self.library == "monai":
            import monai

            return getattr(monai.networks.nets, self.name)(**dict(self.options))
        import torchvision

        return torchvision.models.get_model(self.name, weights=None, **dict(self.options))


UNET = (
    ("spatial_dims", 2),
    ("in_channels", 3),
    ("out_channels", 2),
    ("channels", (32, 64, 128, 256)),
    ("strides", (2, 2, 2)),
)
NETWORKS = [
    Network("timm", "seresnet50", (("zero_init_last", False),)),
    Network("timm", "efficientnet_b0"),
    Network("timm", "regnety_032", (("zero_init_last", False),)),
    Network("torchvision", "mobilenet_v3_large", compile=True),
    Network("torchvision", "efficientnet_b0"),
    Network("monai", "AttentionUnet", UNET),
]


# ------------------------------------------------------------------ photographs


def photographs() -> list[Tensor]:
    """[3, H, W] in 0..1, from files that ship inside scikit-image: nothing is downloaded."""
    import numpy as np
    from PIL import Image

    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("scikit-image")
    folder = Path(spec.origin).parent / "data"
    found = []
    for name in PHOTOGRAPHS:
        if (folder / name).exists():
            pixels = np.asarray(Image.open(folder / name).convert("RGB"))
            found.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255)
    if not found:
        raise ModuleNotFoundError(
            "scikit-image (its wheel ships the photographs, this one has none)"
        )
    return found


def _prepare(crop: Tensor) -> Tensor:
    """[3, SIZE, SIZE], resized and normalised as ImageNet networks expect it."""
    x = F.interpolate(crop[None], (SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((x.clamp(0, 1) - mean.view(3, 1, 1)) / std.view(3, 1, 1))[0]


def photograph() -> Tensor:
    """The first photograph, its centre square, [1, 3, SIZE, SIZE]."""
    image = photographs()[0]
    side = min(image.shape[1:])
    top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
    return _prepare(image[:, top : top + side, left : left + side])[None]


def crops(count: int, seed: int = 0) -> Tensor:
    """Random square crops of the photographs, [count, 3, SIZE, SIZE]."""
    images, generator = photographs(), torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high + 1, (), generator=generator))

    found = []
    for i in range(count):
        image = images[i % len(images)]
        height, width = image.shape[1:]
        side = min(height, width)
        side -= draw(side // 2)
        top, left = draw(height - side), draw(width - side)
        found.append(_prepare(image[:, top : top + side, left : left + side]))
    return torch.stack(found)


# ------------------------------------------------------------------ models


def prepare(network: Network, batch: Tensor) -> nn.Module:
    """The network without dropout, so that two runs agree, and with settled batch norms."""
    model = network.build()
    for module in model.modules():
        for name in DROPOUT.get(type(module).__name__, ()):
            setattr(module, name, 0.0)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 1.0
    with torch.no_grad():
        model.train()(batch)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    return model.eval()


class _Through(nn.Module):
    """Returns the map that an attention module would weigh: x, however it is called."""

    def forward(self, x: Tensor, *_: Any, g: Tensor | None = None) -> Tensor:
        return x


def without_attention(model: nn.Module) -> tuple[nn.Module, int]:
    """A copy whose attention modules do nothing, and how many it has."""
    bare = copy.deepcopy(model)
    count = 0
    for parent in list(bare.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ in ATTENTION:
                setattr(parent, name, _Through())
                count += 1
    return bare, count


@dataclass
class Outcome:
    """What the gate compares, each a list of tensors."""

    outputs: list[Tensor]
    grads: list[Tensor]


def outcome(model: nn.Module, image: Tensor, batch: Tensor) -> Outcome:
    """Logits of the photograph (eval), and logits and all gradients of a batch (train)."""
    model = copy.deepcopy(model)  # batch norms of the original keep their statistics
    first = next(model.parameters())
    image, batch = image.to(first), batch.to(first).requires_grad_()
    with torch.no_grad():
        logits = model.eval()(image)
    trained = model.train()(batch)
    noise = torch.randn(trained.shape, generator=torch.Generator().manual_seed(3)).to(trained)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(trained, [batch, *parameters], noise)
    return Outcome([logits, trained.detach()], list(grads))


def error(got: list[Tensor], oracle: list[Tensor]) -> float:
    """Root mean square over tensors of |got - oracle| / |oracle|; tensors that are zero but for
    rounding (a convolution's bias before a batch norm) have no relative error and are left out."""
    norms = [float(o.norm()) / math.sqrt(o.numel()) for o in oracle]
    floor = 1e-7 * max(norms)
    squares = [
        (float((g.double() - o).norm()) / float(o.norm())) ** 2
        for g, o, n in zip(got, oracle, norms, strict=True)
        if n > floor
    ]
    return math.sqrt(sum(squares) / len(squares))


def gate(ours: Outcome, eager: Sequence[Outcome], oracle: Outcome) -> dict[str, Any]:
    """Errors against the network in float64, over the error eager has itself; the limit is 2.

    Eager's is the largest of several runs: one relu that flips with the order of a convolution's
    sums moves a gradient more than all other roundings, so a single run may be small by luck.
    """
    ratios = {}
    for name in ("outputs", "grads"):
        o = getattr(oracle, name)
        band = torch.finfo(getattr(ours, name)[0].dtype).eps
        own = max(error(getattr(run, name), o) for run in eager) + band
        ratios[name] = {"ratio": error(getattr(ours, name), o) / own, "eager_error": own}
    worst = max(r["ratio"] if math.isfinite(r["ratio"]) else math.inf for r in ratios.values())
    if worst <= LIMIT:
        return {"ok": True, "ratio": worst, "of": ratios}
    where = ", ".join(f"{n} {r['ratio']:.3g}" for n, r in ratios.items())
    return {
        "ok": False,
        "why": f"error against float64 over eager's own: {where} (limit {LIMIT:g})",
    }


# ------------------------------------------------------------------ measurement


def _in_layout(
    model: nn.Module,
    x: Tensor,
    which: str,
    form: torch.memory_format,
    wrap: Callable[[nn.Module], Any] = lambda model: model,
) -> clock.Call:
    """One pass of a copy of the model; training is forward and backward, without the optimiser."""
    model = copy.deepcopy(model).to(memory_format=form).train(which == TRAINING)
    x = x.contiguous(memory_format=form)
    parameters = [p for p in model.parameters() if p.requires_grad]
    run = wrap(model)

    def forward(i: int) -> Any:
        with torch.no_grad():
            return run(x)

    def training(i: int) -> Any:
        logits = run(x)  # [B, classes], or [B, classes, *spatial]
        labels = torch.arange(len(x), device=x.device) % logits.shape[1]
        labels = labels.view(-1, *(1,) * (logits.dim() - 2)).expand(-1, *logits.shape[2:])
        return torch.autograd.grad(F.cross_entropy(logits, labels), parameters)

    return forward if which == FORWARD else training


def measure(network: Network, settings: Settings) -> list[dict[str, Any]]:
    """Rows of one network: the photograph forward, a batch forward and a training step."""
    import attnkern

    device, say = settings.device, settings.say
    large = device.type == "cuda"
    say(f"{network.label}: build")
    image, batch = photograph(), crops(64 if large else 8)
    base = prepare(network, batch[:8])
    base, image, batch = base.to(device), image.to(device), batch.to(device)
    ours = copy.deepcopy(base)
    report = attnkern.optimize(ours, impl=settings.impls[0])
    bare, modules = without_attention(base)

    say(f"{network.label}: gate against float64")
    small = batch[:2]
    last = copy.deepcopy(base).to(memory_format=torch.channels_last)
    eager = [outcome(base, image, small), outcome(last, image, small)]
    oracle = outcome(copy.deepcopy(base).double(), image, small)
    try:
        verdict = gate(outcome(ours, image, small), eager, oracle)
    except Exception as problem:
        verdict = {"ok": False, "why": sentence(problem)}
    with torch.no_grad():
        teeth = error([bare.eval()(image)], oracle.outputs[:1])
    if not teeth > 1e-3:  # fp32 against float64 is 1e-6
        verdict = {
            "ok": False,
            "why": f"outputs do not depend on the attention modules ({teeth:.1g}): no gate",
        }
    del eager, oracle

    inputs = {FORWARD + ", photograph": image}
    if large or settings.full:
        inputs[FORWARD + ", batch"] = batch
    inputs[TRAINING + ", batch"] = batch if large or settings.full else batch[:4]
    rows = []
    for label, x in inputs.items():
        which = label.split(",")[0]
        if which not in settings.passes:
            continue
        row = {
            "key": f"{network.library}/{network.name}/{label}",
            "model": network.label,
            "shape": list(x.shape),
            "dtype": "fp32",
            "layout": "",
            "pass": label,
            "impl": "ours",
            "gate": {"ours": verdict},
            "replaced": len(report.replaced),
            "attention_modules": modules,
            "times": {},
            "peak_bytes": {},
            "compile_seconds": {},
            "ratios": {},
            "notes": [],
        }
        rows.append(row)
        if verdict["ok"]:
            _time(
                row,
                {"eager": base, "ours": ours, "without attention": bare},
                x,
                which,
                network,
                settings,
            )
            derive(row)
    return rows


def _time(
    row: dict[str, Any],
    models: dict[str, nn.Module],
    x: Tensor,
    which: str,
    network: Network,
    settings: Settings,
) -> None:
    """Every model in the memory layout where eager is faster, interleaved."""
    settings.say(f"{network.label}, {row['pass']}: choose the layout")
    tried = {n: _in_layout(models["eager"], x, which, form) for n, form in LAYOUTS.items()}
    samplers = {
        n: clock.sampler(c, clock.Rotation(1), settings.device, "launched")
        for n, c in tried.items()
    }
    times = clock.interleave(samplers, 0.0, least=2)
    row["layout"] = min(times, key=lambda n: times[n].fastest)
    form = LAYOUTS[row["layout"]]
    calls = {n: _in_layout(m, x, which, form) for n, m in models.items()}
    if settings.compile and (settings.full or (network.compile and which == FORWARD)):
        torch.compiler.reset()
        for column, name in (("compile", "eager"), ("ours, in compile", "ours")):
            settings.say(f"{network.label}, {row['pass']}: {column}")
            call = _in_layout(
                models[name], x, which, form, functools.partial(torch.compile, dynamic=False)
            )
            start = time.perf_counter()
            try:
                call(0)
            except Exception as problem:
                row["notes"].append(f"{column} left out: {sentence(problem)}")
                continue
            row["compile_seconds"][column] = time.perf_counter() - start
            calls[column] = call
    settings.say(f"{network.label}, {row['pass']}: time")
    row["peak_bytes"] = {
        n: peak_bytes(c, settings.device) for n, c in calls.items() if n != "without attention"
    }
    samplers = {
        n: clock.sampler(c, clock.Rotation(1), settings.device, "launched")
        for n, c in calls.items()
    }
    for name, stats in clock.interleave(samplers, 2 * settings.seconds, least=3).items():
        row["times"][name] = {"cold": stats.dict()}


def derive(row: dict[str, Any]) -> None:
    """Speed-ups, images per second, the share of attention and the speed-up if it cost nothing."""
    row["ratios"] = {}
    if "ours" not in row["times"] or not row["gate"]["ours"]["ok"]:
        return

    def median(name: str) -> float | None:
        return row["times"][name]["cold"]["median"] if name in row["times"] else None

    ours, eager, bare, compiled = map(median, ("ours", "eager", "without attention", "compile"))
    if not (ours and eager and bare):
        return
    row["ratios"]["eager"] = eager / ours
    if compiled:
        row["ratios"]["compile"] = compiled / ours
        if inside := median("ours, in compile"):
            row["ratios"]["in_compile"] = compiled / inside
    row["attention_share"] = max(0.0, 1 - bare / eager)
    row["ceiling"] = eager / min(bare, eager)
    row["images_per_second"] = {
        name: row["shape"][0] / modes["cold"]["median"] for name, modes in row["times"].items()
    }
