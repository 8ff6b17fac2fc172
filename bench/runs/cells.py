"""A 2-D attention U-Net finds coins, vessels and a cell in one half of a picture after learning from the other.

The pictures ship inside scikit-image; their masks are derived by thresholds.  The network has the form
that Image_Segmentation made common: batch-normalised blocks, a nearest upsampling and a convolution on the
way up, and a gate on every skip, with as many gating channels as skip channels.  It learns from patches of
one half alone and is scored on the other half alone, optimised and eager from the same seed.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnkern
from bench import alphas
from bench.run import Claim, Outcome, Settings, compare
from bench.runs.slide import dark_lines, photograph

NEEDS = ("skimage", "matplotlib")
SIDE = 96  # pixels of a patch
LEAST = {"coins": 0.95, "retina": 0.8, "cell": 0.95}  # Dice


class Picture(NamedTuple):
    name: str
    image: Tensor  # [H, W], standardised by the known half
    mask: Tensor  # [H, W], what is sought
    split: int  # where the known half ends
    axis: int  # 1: the left half is known, 0: the upper one

    def half(self, known: bool) -> tuple[Tensor, Tensor]:
        place = slice(None, self.split) if known else slice(self.split, None)
        index = (slice(None), place) if self.axis else (place,)
        return self.image[index], self.mask[index]


def picture(name: str) -> Picture:
    pixels = photograph({"coins": "coins.png", "retina": "retina.jpg", "cell": "cell.png"}[name])
    if name == "coins":
        grey, mask, axis, split = pixels[1], coins(pixels[1]), 1, pixels.shape[2] // 2
    else:
        pixels = F.avg_pool2d(pixels, 2)
        grey = pixels[1]
        if name == "retina":
            mask, axis, split = vessels(pixels), 1, grey.shape[1] // 2
        else:
            mask = bright(grey)
            axis, split = 0, int(mask.nonzero()[:, 0].float().mean())  # through the one cell
    found = Picture(name, grey, mask, split, axis)
    known, _ = found.half(True)
    return found._replace(image=(grey - known.mean()) / known.std())


# ------------------------------------------------------------------ masks


def coins(grey: Tensor) -> Tensor:
    """What is brighter than its surroundings of 81 pixels, by Otsu's threshold, holes filled."""
    size = 81
    low = -F.max_pool2d(-grey[None], size, 1, size // 2)
    ground = F.avg_pool2d(low, size, 1, size // 2, count_include_pad=False)[0]
    return bright(grey - ground)


def bright(grey: Tensor) -> Tensor:
    """Above Otsu's threshold after a little smoothing, holes filled, nothing small."""
    from scipy import ndimage
    from skimage.filters import gaussian, threshold_otsu
    from skimage.morphology import disk

    smooth = gaussian(grey.numpy(), 1)
    filled = ndimage.binary_fill_holes(smooth > threshold_otsu(smooth))
    return torch.from_numpy(ndimage.binary_opening(filled, disk(4)))


def vessels(pixels: Tensor) -> Tensor:
    """The tenth of the fundus with the darkest lines, but for specks and for its rim."""
    from scipy import ndimage

    inside = F.avg_pool2d((pixels[:1] > 0.15).float(), 25, 1, 12)[0] > 0.99
    smooth = F.avg_pool2d(pixels, 3, 1, 1)
    lines = dark_lines(smooth, 13)
    dark = (lines > lines[inside].quantile(0.9)) & inside
    named, count = ndimage.label(dark.numpy(), structure=[[1] * 3] * 3)
    sizes = ndimage.sum_labels(dark.numpy(), named, range(count + 1))
    return torch.from_numpy(sizes[named] > 80)


# ------------------------------------------------------------------ network


def convolution(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]


def twice(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(*convolution(inputs, outputs), *convolution(outputs, outputs))


class Attention_block(nn.Module):
    """Weighs the skip connection x by what it and the gating signal g agree on."""

    def __init__(self, F_g: int, F_l: int, F_int: int):
        super().__init__()
        self.W_g = nn.Sequential(nn.Conv2d(F_g, F_int, 1), nn.BatchNorm2d(F_int))
        self.W_x = nn.Sequential(nn.Conv2d(F_l, F_int, 1), nn.BatchNorm2d(F_int))
        self.psi = nn.Sequential(nn.Conv2d(F_int, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())
        self.relu = nn.ReLU()

    def forward(self, g: Tensor, x: Tensor) -> Tensor:
        return x * self.psi(self.relu(self.W_g(g) + self.W_x(x)))


class AttentionUNet(nn.Module):
    def __init__(self, channels: tuple[int, ...]):
        super().__init__()
        steps = [*itertools.pairwise(channels)]
        self.first = twice(1, channels[0])
        self.down = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(2), twice(fine, coarse)) for fine, coarse in steps
        )
        self.up = nn.ModuleList(
            nn.Sequential(nn.Upsample(scale_factor=2), *convolution(coarse, fine))
            for fine, coarse in steps
        )
        self.gate = nn.ModuleList(Attention_block(fine, fine, fine // 2) for fine, _ in steps)
        self.merge = nn.ModuleList(twice(2 * fine, fine) for fine, _ in steps)
        self.last = nn.Conv2d(channels[0], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 1, H, W]; H and W are multiples of 2 to the number of gates."""
        skips = [self.first(x)]
        for down in self.down:
            skips.append(down(skips[-1]))
        d = skips.pop()
        for up, gate, merge in zip(self.up[::-1], self.gate[::-1], self.merge[::-1], strict=True):
            g = up(d)
            d = merge(torch.cat([gate(g, skips.pop()), g], 1))
        return self.last(d)


# ------------------------------------------------------------------ training and scores


def draw(p: Picture, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Patches [count, 1, SIDE, SIDE] of the known half, turned and mirrored, and their masks.

    Every other patch lies around a pixel of the mask.
    """
    image, mask = p.half(True)
    both = torch.stack([image, mask.float()])
    room = torch.tensor(image.shape) - SIDE
    sought = mask.nonzero()
    found = []
    for i in range(count):
        corner = (torch.rand(2, generator=generator) * (room + 1)).long()
        if i % 2:
            pixel = sought[torch.randint(len(sought), (), generator=generator)]
            corner = (pixel - SIDE // 2).clamp(min=torch.zeros_like(room), max=room)
        top, left = corner.tolist()
        turns, mirrored = torch.randint(4, (2,), generator=generator).tolist()
        patch = both[:, top : top + SIDE, left : left + SIDE].rot90(turns, (1, 2))
        found.append(patch.flip(2) if mirrored % 2 else patch)
    patches = torch.stack(found)
    return patches[:, :1], patches[:, 1:]


def loss_of(model: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """Cross entropy, and what is missing of a soft Dice of 1."""
    logits = model(x)
    p = logits.sigmoid()
    overlap = (2 * (p * mask).sum() + 1) / (p.sum() + mask.sum() + 1)
    return F.binary_cross_entropy_with_logits(logits, mask) + 1 - overlap


def train(model: nn.Module, p: Picture, settings: Settings, steps: int, who: str) -> None:
    generator = torch.Generator().manual_seed(settings.seed)
    optimiser = torch.optim.Adam(model.train().parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, total_steps=steps)
    for step in range(steps):
        if step % 25 == 0:
            settings.say(f"cells: {p.name}, {who}, step {step} of {steps}")
        loss = loss_of(model, *draw(p, 4, generator))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


def padded(image: Tensor) -> Tensor:
    """[H, W] -> [1, 1, H, W], to sides that can be halved four times."""
    height, width = image.shape
    return F.pad(image[None, None], (0, -width % 16, 0, -height % 16), mode="replicate")


@torch.no_grad()
def found_by(model: nn.Module, image: Tensor) -> Tensor:
    return model.eval()(padded(image))[0, 0, : image.shape[0], : image.shape[1]] > 0


def scores(model: nn.Module, p: Picture) -> tuple[float, float]:
    """Dice and intersection over union of the half that was held out."""
    image, mask = p.half(False)
    found = found_by(model, image)
    both, either = int((found & mask).sum()), int((found | mask).sum())
    return 2 * both / (both + either), both / either


def run(settings: Settings) -> Outcome:
    channels, steps = ((8, 16, 32), 50) if settings.quick else ((16, 32, 64, 128), 200)
    outcome = Outcome([])
    for name, least in LEAST.items():
        p = picture(name)
        torch.manual_seed(settings.seed)
        eager = AttentionUNet(channels)
        ours = copy.deepcopy(eager)
        report = attnkern.optimize(ours, impl=settings.impl)
        train(eager, p, settings, steps, "eager")
        train(ours, p, settings, steps, "ours")
        dice, union = scores(ours, p)
        _, maps = alphas.seen(ours, padded(p.half(False)[0]))
        outcome.claims += [
            Claim(f"{name}: Dice of the half that was held out", dice, least),
            Claim(
                f"{name}: alpha, error over that of the eager gates",
                alphas.largest_error(ours, maps, settings.impl),
                2,
                at_most=True,
            ),
        ]
        outcome.figures |= {
            f"{name}: gates served": f"{len(report.replaced)} of {len(alphas.gates(ours))}",
            f"{name}: intersection over union": union,
            f"{name}: Dice and intersection over union, eager": ", ".join(
                f"{value:.4g}" for value in scores(eager, p)
            ),
        }
        outcome.pictures.append(drawing(p, ours, settings))
    x, mask = draw(p, 4, torch.Generator().manual_seed(settings.seed))

    def step(model: nn.Module) -> None:
        torch.autograd.grad(loss_of(model, x, mask), list(model.parameters()))

    settings.say("cells: costs")
    outcome.costs[f"training step, 4 patches of {SIDE}x{SIDE}"] = compare(
        settings, alphas.both(settings, AttentionUNet(channels), step)
    )
    side = 128 if settings.quick else 512
    alphas.train_one(outcome, settings, Attention_block(64, 64, 32), (64, side, side))
    return outcome


def drawing(p: Picture, model: nn.Module, settings: Settings) -> Path:
    """The picture, what is sought, what is found, and the alpha of every gate over it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    image = padded(p.image)
    _, maps = alphas.seen(model, image)
    found = found_by(model, p.image)
    height, width = p.image.shape
    columns = 3 + len(maps)
    figure, axes = plt.subplots(
        1, columns, figsize=(3.4 * columns, 0.4 + 3.2 * height / width), layout="constrained"
    )
    for axis in axes:
        axis.imshow(p.image.numpy(), cmap="gray")
        axis.set_axis_off()
        (axis.axvline if p.axis else axis.axhline)(p.split, color="white", lw=1)
    titles = [f"{p.name}, {'right' if p.axis else 'lower'} half held out", "mask", "found"]
    for axis, mask in zip(axes[1:], (p.mask, found), strict=False):
        axis.imshow(torch.where(mask, 1.0, torch.nan).numpy(), cmap="autumn", alpha=0.6)
    for axis, (name, (g, x)) in zip(axes[3:], maps.items(), strict=True):
        with torch.no_grad():
            alpha = alphas.alpha(model.get_submodule(name), g, x, settings.impl)
        alpha = F.interpolate(alpha, image.shape[2:], mode="nearest")[0, 0, :height, :width]
        drawn = axis.imshow(alpha.numpy(), cmap="jet", alpha=0.5)
        figure.colorbar(drawn, ax=axis, shrink=0.7)
        titles.append(f"alpha at {' x '.join(map(str, x.shape[2:]))}")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
    path = settings.out / f"cells-{p.name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)
    return path
