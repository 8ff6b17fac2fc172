"""MONAI's 3-D attention U-Net learns grey and white matter of the MNI152 brain; eager trains beside it.

The T1 volume and the two maps of probability ship inside nilearn, 1 mm; here 2 mm.  Two coronal slabs
are held out with a gap around them; left and right would not do, the template is symmetric.  A patch is
never larger than what lies between slabs, so the network has seen no voxel of them.  Three eager
trainings, which differ in their seed, span the band of losses that the optimised network's is held to.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnkern
from bench import alphas
from bench.run import Claim, Outcome, Settings, compare

NEEDS = ("nilearn", "monai", "matplotlib")
MATTERS = ("grey", "white")  # classes 1 and 2; 0 is the rest
STRETCHES = ((2, 24), (44, 68), (88, 110))  # coronal slices to learn from, of 116
SLABS = ((28, 40), (72, 84))  # held out, 4 slices or 8 mm from any stretch
PATCH = (32, 20, 32)
SEEDS = 3  # eager trainings
START = 3  # steps in which rounding has not yet grown
ROUNDINGS = 128  # by which losses may differ in them: a gate's gradient 10 % off makes 600
WINDOW = 20  # steps that a point of a smoothed curve averages
MARGIN = 0.1  # of its edges, by which the band is widened


class Brain(NamedTuple):
    t1: Tensor  # [98, 116, 94], standardised inside the brain
    labels: Tensor  # the same, which class is the most probable
    inside: tuple[slice, ...]  # the box that holds the brain


def brain() -> Brain:
    t1, *matters = (_volume(name) for name in ("t1", "gm", "wm"))
    labels = torch.stack([255 - sum(matters), *matters]).argmax(0)
    within = t1[t1 > 0]
    box = [slice(int(i.min()), int(i.max()) + 1) for i in (t1 > 0).nonzero().T]
    return Brain((t1 - within.mean()) / within.std(), labels, tuple(box))


def _volume(name: str) -> Tensor:
    """At 2 mm, in 0..255."""
    import nibabel
    import numpy as np

    spec = importlib.util.find_spec("nilearn")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("nilearn")
    file = f"datasets/data/mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz"
    image: Any = nibabel.load(Path(spec.origin).parent / file)
    voxels = torch.from_numpy(np.asarray(image.dataobj).copy()).float()
    return F.avg_pool3d(voxels[None], 2)[0]


# ------------------------------------------------------------------ training


class Plan(NamedTuple):
    channels: tuple[int, ...]
    steps: int
    patches: int  # a step
    rate: float  # of learning, at its highest


def network(seed: int, plan: Plan) -> nn.Module:
    from monai.networks.nets import AttentionUnet

    torch.manual_seed(seed)
    return AttentionUnet(3, 1, 1 + len(MATTERS), plan.channels, strides=(2, 2))


def draw(b: Brain, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Patches [count, 1, *PATCH] of the stretches and their labels."""
    found = []
    for _ in range(count):
        first, last = STRETCHES[int(torch.randint(len(STRETCHES), (), generator=generator))]
        x, _, z = b.inside
        places = []
        for begin, end, side in zip(
            (x.start, first, z.start), (x.stop, last, z.stop), PATCH, strict=True
        ):
            at = int(torch.randint(begin, end - side + 1, (), generator=generator))
            places.append(slice(at, at + side))
        found.append((b.t1[tuple(places)], b.labels[tuple(places)]))
    t1, labels = zip(*found, strict=True)
    return torch.stack(t1)[:, None], torch.stack(labels)


def train(
    model: nn.Module,
    b: Brain,
    seed: int,
    plan: Plan,
    say: Callable[[str], None] = lambda message: None,
    most: int | None = None,
) -> list[float]:
    """The loss of every step, or of the first ``most``."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.train().parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, plan.rate, total_steps=plan.steps)
    losses = []
    for step in range(most or plan.steps):
        if step % 25 == 0:
            say(f"step {step} of {plan.steps}")
        x, labels = draw(b, plan.patches, generator)
        loss = F.cross_entropy(model(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def nudged(model: nn.Module, seed: int) -> nn.Module:
    """Every weight moved by one rounding: what the smallest difference there is grows to."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        signs = torch.randint(0, 2, p.shape, generator=generator) * 2 - 1
        p *= 1 + torch.finfo(p.dtype).eps * signs
    return model


# ------------------------------------------------------------------ measures


def smooth(losses: list[float]) -> Tensor:
    return torch.tensor(losses, dtype=torch.float64).unfold(0, WINDOW, 1).mean(1)


def outside(ours: list[float], eager: list[list[float]]) -> float:
    """How far the smoothed curve gets above the highest or below the lowest of eager, as a share of that."""
    curves = torch.stack([smooth(losses) for losses in eager])
    low, high = curves.amin(0), curves.amax(0)
    curve = smooth(ours)
    return float(torch.maximum(curve / high - 1, 1 - curve / low).max().clamp(min=0))


def apart(ours: list[float], eager: list[float]) -> float:
    """The largest relative difference of the losses in the first steps."""
    a, b = (torch.tensor(losses[:START], dtype=torch.float64) for losses in (ours, eager))
    return float(((a - b).abs() / b).max())


def slab(b: Brain, place: tuple[int, int]) -> Tensor:
    """The slices of a slab alone, padded so that the network can halve them twice, [1, 1, ...]."""
    t1 = b.t1[:, slice(*place)]
    return F.pad(t1[None, None], [p for side in t1.shape[::-1] for p in (0, -side % 4)], value=-3.0)


@torch.no_grad()
def dice(model: nn.Module, b: Brain) -> dict[str, float]:
    """Of each matter over the voxels of all slabs."""
    found, there = [], []
    for place in SLABS:
        labels = b.labels[:, slice(*place)]
        found.append(_classes(model.eval()(slab(b, place)), labels).flatten())
        there.append(labels.flatten())
    a, c = torch.cat(found), torch.cat(there)
    return {
        name: float(2 * ((a == k) & (c == k)).sum() / ((a == k).sum() + (c == k).sum()))
        for k, name in enumerate(MATTERS, 1)
    }


def _classes(logits: Tensor, like: Tensor) -> Tensor:
    return logits.argmax(1)[0][tuple(slice(side) for side in like.shape)]


def run(settings: Settings) -> Outcome:
    b = brain()
    plan = Plan((8, 16, 32), 40, 2, 5e-3) if settings.quick else Plan((16, 32, 64), 250, 4, 2e-3)
    curves, scores = [], []
    for seed in range(settings.seed, settings.seed + SEEDS):
        eager = network(seed, plan)
        say = _prefixed(settings.say, f"brain: eager, seed {seed}")
        curves.append(train(eager, b, seed, plan, say))
        scores.append(dice(eager, b))
    model = network(settings.seed, plan)
    report = attnkern.optimize(model, impl=settings.impl)
    ours = train(model, b, settings.seed, plan, _prefixed(settings.say, "brain: ours"))
    moved = nudged(network(settings.seed, plan), settings.seed)
    rounding = apart(train(moved, b, settings.seed, plan, most=START), curves[0])
    found = dice(model, b)
    image = slab(b, SLABS[0])
    _, maps = alphas.seen(model, image)
    outcome = Outcome(
        [
            Claim(
                f"share by which the loss, over {WINDOW} steps, leaves the band of {SEEDS} eager seeds",
                outside(ours, curves),
                MARGIN,
                at_most=True,
            ),
            Claim(
                f"relative difference of the losses of the first {START} steps, same seed",
                apart(ours, curves[0]),
                ROUNDINGS * torch.finfo(torch.float32).eps,
                at_most=True,
            ),
            Claim("mean Dice of the held-out slabs", _mean(found), 0.8),
            Claim(
                "alpha, error over that of the eager gates",
                alphas.largest_error(model, maps, settings.impl),
                2,
                at_most=True,
            ),
        ],
        {
            "gates served": f"{len(report.replaced)} of {len(alphas.gates(model))}",
            "the same difference, eager with its weights moved by one rounding": rounding,
            "same seed, share by which the smoothed losses part": outside(ours, curves[:1]),
            **{
                f"share by which eager with seed {settings.seed + i} leaves the band of the others": outside(
                    curves[i], curves[:i] + curves[i + 1 :]
                )
                for i in range(SEEDS)
            },
            **{f"Dice of {name} matter": value for name, value in found.items()},
            "mean Dice, eager": ", ".join(f"{_mean(s):.4g}" for s in scores),
        },
    )
    outcome.pictures = [
        picture(b, model, settings),
        loss_picture(ours, curves, settings.out / "brain-loss.png"),
    ]
    x, labels = draw(b, plan.patches, torch.Generator().manual_seed(settings.seed))

    def step(m: nn.Module) -> None:
        torch.autograd.grad(F.cross_entropy(m(x), labels), list(m.parameters()))

    settings.say("brain: costs")
    outcome.costs[f"training step, {plan.patches} patches of {'x'.join(map(str, PATCH))}"] = (
        compare(settings, alphas.both(settings, network(settings.seed, plan), step))
    )
    from monai.networks.nets.attentionunet import AttentionBlock

    side = 32 if settings.quick else 128
    torch.manual_seed(settings.seed)
    gate = AttentionBlock(3, f_int=32, f_g=64, f_l=64)
    alphas.train_one(outcome, settings, gate, (64, side, side, side))
    return outcome


def _mean(scores: dict[str, float]) -> float:
    return sum(scores.values()) / len(scores)


def _prefixed(say: Callable[[str], None], prefix: str) -> Callable[[str], None]:
    return lambda message: say(f"{prefix}, {message}")


# ------------------------------------------------------------------ pictures


def picture(b: Brain, model: nn.Module, settings: Settings) -> Path:
    """A slice of each slab: the T1, its matters, those found, and the alpha of every gate over it."""
    plt = _pyplot()
    names = list(alphas.gates(model))
    columns = 3 + len(names)
    figure, axes = plt.subplots(
        len(SLABS), columns, figsize=(3.2 * columns, 5.6), layout="constrained"
    )
    for row, place in zip(axes, SLABS, strict=True):
        image = slab(b, place)
        logits, maps = alphas.seen(model, image)
        labels = b.labels[:, slice(*place)]
        middle = labels.shape[1] // 2
        t1 = b.t1[:, slice(*place)][:, middle].T
        shown = [labels[:, middle], _classes(logits, labels)[:, middle]]
        for axis, title in zip(
            row,
            (
                f"T1, y = {2 * (place[0] + middle) - 133.5} mm, held out",
                "grey and white matter",
                "found",
            ),
            strict=False,
        ):
            axis.imshow(t1.numpy(), origin="lower", cmap="gray")
            axis.set_title(title, fontsize=10)
        for axis, classes in zip(row[1:], shown, strict=False):
            over = classes.T.float()
            axis.imshow(
                over.where(over > 0, torch.nan).numpy(),
                origin="lower",
                cmap="cool",
                alpha=0.55,
                vmin=1,
                vmax=2,
            )
        for axis, name in zip(row[3:], names, strict=True):
            g, x = maps[name]
            gate = model.get_submodule(name)
            with torch.no_grad():
                found = alphas.alpha(gate, g, x, settings.impl)
            found = F.interpolate(found, image.shape[2:], mode="nearest")[0, 0]
            found = found[: t1.shape[1], middle, : t1.shape[0]].T
            axis.imshow(t1.numpy(), origin="lower", cmap="gray")
            drawn = axis.imshow(found.numpy(), origin="lower", cmap="jet", alpha=0.5)
            figure.colorbar(drawn, ax=axis, shrink=0.7)
            axis.set_title(f"alpha at {' x '.join(map(str, x.shape[2:]))}", fontsize=10)
        for axis in row:
            axis.set_axis_off()
    return _saved(figure, settings.out / "brain.png")


def loss_picture(ours: list[float], eager: list[list[float]], path: Path) -> Path:
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7, 4))
    curves = torch.stack([smooth(losses) for losses in eager])
    steps = range(WINDOW, WINDOW + curves.shape[1])
    low, high = curves.amin(0) * (1 - MARGIN), curves.amax(0) * (1 + MARGIN)
    axis.fill_between(
        steps, low.numpy(), high.numpy(), color="0.85", label=f"eager seeds, {MARGIN:.0%} wider"
    )
    for curve in curves:
        axis.plot(steps, curve.numpy(), color="0.5", lw=1)
    axis.plot(steps, smooth(ours).numpy(), color="tab:red", lw=1.5, label="ours")
    axis.set(xlabel="step", ylabel=f"loss, mean of {WINDOW} steps", yscale="log")
    axis.legend()
    return _saved(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _saved(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    _pyplot().close(figure)
    return path
