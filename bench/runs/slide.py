"""Patches of a histology and a retina photograph pooled by a CLAM-style gated head; heat maps.

Both images ship inside scikit-image.  A bag is a window of 8x8 patches and its weak label says
whether any of them holds what is sought: brown stain (diaminobenzidine, by colour deconvolution), or
vessels (dark lines of the green channel).  The head learns from windows of the left half alone; the
map of its raw attention scores over the right half must follow the stain it was never shown.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnkern import testing
from attnkern.functional import gated_attention_pool
from bench.run import Claim, Outcome, Settings, compare

NEEDS = ("skimage", "matplotlib")
PATCH = 16  # pixels
HIDDEN, ATTENTION = 128, 64


@dataclass(frozen=True)
class Slide:
    name: str
    sought: str
    image: Tensor  # [3, H, W] in 0..1
    features: Tensor  # [rows, columns, D] of every patch, standardised
    tissue: Tensor  # [rows, columns], patches that are not background
    stain: Tensor  # [rows, columns], how much of what is sought a patch holds
    level: float  # above which a patch holds it, from the left half


# ------------------------------------------------------------------ images


def photograph(name: str) -> Tensor:
    import numpy as np
    from PIL import Image

    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("scikit-image")
    pixels = np.asarray(Image.open(Path(spec.origin).parent / "data" / name).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def brown(image: Tensor) -> Tensor:
    """The diaminobenzidine channel of Ruifrok and Johnston's colour deconvolution, [H, W]."""
    from skimage.color import rgb2hed

    return torch.from_numpy(rgb2hed(image.permute(1, 2, 0).numpy())[..., 2]).float()


def dark_lines(image: Tensor, width: int = 17) -> Tensor:
    """Closing minus image of the green channel: what is dark and thinner than ``width``, [H, W]."""
    green = image[None, 1:2]
    closed = green
    for sign in (1, -1):
        for shape in ((width, 1), (1, width)):
            padding = (shape[0] // 2, shape[1] // 2)
            closed = sign * F.max_pool2d(sign * closed, shape, 1, padding)
    return (closed - green)[0, 0]


def patches(maps: Tensor, stride: int) -> Tensor:
    """Patch means of maps [C, H, W], [rows, columns, C]."""
    return F.avg_pool2d(maps[None], PATCH, stride)[0].permute(1, 2, 0)


def describe(image: Tensor, stride: int, seed: int) -> Tensor:
    """Colour and texture of every patch: mean, deviation, extremes, edges and frozen random filters."""
    mean = patches(image, stride)
    deviation = (patches(image**2, stride) - mean**2).clamp(min=0).sqrt()
    extremes = [
        sign * F.max_pool2d(sign * image[None], PATCH, stride)[0].permute(1, 2, 0)
        for sign in (1, -1)
    ]
    edges = sum(F.pad(image.diff(dim=d).abs(), p) for d, p in ((1, (0, 0, 0, 1)), (2, (0, 1))))
    filters = torch.randn(16, 3, 7, 7, generator=torch.Generator().manual_seed(seed)) / 12
    filters -= filters.mean((1, 2, 3), keepdim=True)
    texture = F.conv2d(image[None], filters, padding=3)[0].relu()
    found = [mean, deviation, *extremes, patches(edges, stride), patches(texture, stride)]
    return torch.cat(found, 2)


def slide(name: str, seed: int) -> Slide:
    image = photograph({"histology": "ihc.png", "retina": "retina.jpg"}[name])
    sought, map_of = ("stain", brown) if name == "histology" else ("vessels", dark_lines)
    stride = 8 if name == "histology" else 16
    features = describe(image, stride, seed)
    tissue = features[..., :3].mean(2) > (0.0 if name == "histology" else 0.1)
    stain = patches(map_of(image)[None], stride)[..., 0]
    left = slice(None, features.shape[1] // 2)
    known, amounts = features[:, left][tissue[:, left]], stain[:, left][tissue[:, left]]
    features = (features - known.mean(0)) / (known.std(0) + 1e-6)
    # half of the histology is stained, a tenth of the retina are vessels
    level = float(amounts.quantile(0.5 if name == "histology" else 0.9))
    return Slide(name, sought, image, features, tissue, stain, level)


# ------------------------------------------------------------------ head


class Head(nn.Module):
    """CLAM with one branch: a layer, gated attention, a bag classifier and an instance classifier."""

    def __init__(self, features: int, impl: str):
        super().__init__()
        self.impl = impl
        self.layer = nn.Sequential(nn.Linear(features, HIDDEN), nn.ReLU())
        self.V, self.U = nn.Linear(HIDDEN, ATTENTION), nn.Linear(HIDDEN, ATTENTION)
        self.w = nn.Linear(ATTENTION, 1)
        self.bag, self.instance = nn.Linear(HIDDEN, 1), nn.Linear(HIDDEN, 1)

    def pool(self, h: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z [B, 1, HIDDEN] and A_raw [B, 1, N] of h [B, N, HIDDEN]."""
        scorer = (self.V.weight, self.V.bias, self.U.weight, self.U.bias)
        scorer += (self.w.weight, self.w.bias)
        return gated_attention_pool(h, *scorer, mask=mask, return_scores=True, impl=self.impl)

    def eager_pool(self, h: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As CLAM computes it."""
        raw = self.w(torch.tanh(self.V(h)) * torch.sigmoid(self.U(h))).transpose(1, 2)
        shown = raw if mask is None else raw.masked_fill(~mask, float("-inf"))
        return torch.softmax(shown, 2) @ h, raw

    def forward(self, x: Tensor, eager: bool = False) -> tuple[Tensor, Tensor]:
        """Logits [B] of bags x [B, N, D], and CLAM's instance loss: the most attended are the evidence."""
        h = self.layer(x)
        z, raw = self.eager_pool(h) if eager else self.pool(h)
        return self.bag(z[:, 0])[:, 0], h.gather(1, _most(raw).expand(-1, -1, h.shape[2]))

    def loss(self, x: Tensor, labels: Tensor, eager: bool = False) -> Tensor:
        """Of the bags, and of the most attended instances of each, which share the label of their bag."""
        logits, most = self(x, eager)
        instances = self.instance(most)[..., 0]
        expected = labels[:, None].expand_as(instances)
        loss = F.binary_cross_entropy_with_logits
        return 0.7 * loss(logits, labels) + 0.3 * loss(instances, expected)


def _most(raw: Tensor) -> Tensor:
    """The 4 most attended instances of A_raw [B, 1, N], [B, 4, 1]."""
    return raw[:, 0].topk(4).indices[..., None]


@dataclass(frozen=True)
class Windows:
    """The square windows of one half of a slide that hold some of what is sought, or none of it."""

    features: Tensor  # [windows, patches, D]
    labels: Tensor  # [windows]

    @classmethod
    def of(cls, s: Slide, columns: slice, side: int = 8) -> Windows:
        sought = (s.stain[:, columns] > s.level).float()
        share, tissue = (
            F.avg_pool2d(m[None], side, 1)[0] for m in (sought, s.tissue[:, columns].float())
        )
        some, none = (share > 0.04) & (share < 0.4), share == 0
        places = ((some | none) & (tissue == 1)).nonzero()
        features = s.features[:, columns].unfold(0, side, 1).unfold(1, side, 1)
        found = features[places[:, 0], places[:, 1]].flatten(2).transpose(1, 2)
        return cls(found, some[places[:, 0], places[:, 1]].float())

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """As many windows of one label as of the other."""
        kinds = [(self.labels == label).nonzero()[:, 0] for label in (0, 1)]
        chosen = torch.cat(
            [k[torch.randint(len(k), (count // 2,), generator=generator)] for k in kinds]
        )
        return self.features[chosen], self.labels[chosen]


def train(head: Head, windows: Windows, steps: int, generator: torch.Generator) -> None:
    optimiser = torch.optim.Adam(head.parameters(), 2e-3, weight_decay=1e-5)
    for _ in range(steps):
        loss = head.loss(*windows.draw(32, generator))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


# ------------------------------------------------------------------ measures


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's."""
    ranks = torch.stack([t.argsort().argsort().double() for t in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


@torch.no_grad()
def raw_scores_error(head: Head, x: Tensor) -> float:
    """The error of A_raw against float64, over that of the eager head."""
    h = head.layer(x)
    ours, eager = head.pool(h)[1], head.eager_pool(h)[1]
    oracle = head.double().eager_pool(h.double())[1]
    head.float()
    return testing.error_ratio(ours, eager, oracle)


@torch.no_grad()
def accuracy(head: Head, windows: Windows, count: int, generator: torch.Generator) -> float:
    x, labels = windows.draw(count, generator)
    return float(((head(x)[0] > 0) == (labels > 0)).float().mean())


def area(scores: Tensor, sought: Tensor) -> float:
    """How often a patch that is sought has a larger score than another: the area under the ROC."""
    return float((scores[sought][:, None] > scores[~sought]).float().mean())


@torch.no_grad()
def heat(head: Head, s: Slide) -> Tensor:
    """A_raw of every patch, background masked: [rows, columns]."""
    rows, columns = s.stain.shape
    x = s.features.reshape(1, rows * columns, -1)
    _, raw = head.pool(head.layer(x), mask=s.tissue.reshape(1, -1))
    return raw.reshape(rows, columns)


def run(settings: Settings) -> Outcome:
    outcome = Outcome([])
    for name in ("histology", "retina"):
        settings.say(f"slide: {name}")
        torch.manual_seed(settings.seed)
        generator = torch.Generator().manual_seed(settings.seed)
        s = slide(name, settings.seed)
        middle = s.stain.shape[1] // 2
        left, right = slice(None, middle), slice(middle, None)
        head = Head(s.features.shape[2], settings.impl)
        train(head, Windows.of(s, left), 150 if settings.quick else 400, generator)
        raw = heat(head, s)
        there = s.tissue[:, right]
        scores, stain = raw[:, right][there], s.stain[:, right][there]
        whole, label = s.features[s.tissue][None], torch.ones(1)
        outcome.claims += [
            Claim(
                f"{name}: a patch of {s.sought} has a larger score than another, right half",
                area(scores, stain > s.level),
                0.9,
            ),
            Claim(
                f"{name}: accuracy on 400 windows of the right half",
                accuracy(head, Windows.of(s, right), 400, generator),
                0.85,
            ),
            Claim(
                f"{name}: A_raw, error over that of the eager head",
                raw_scores_error(head, whole),
                2,
                at_most=True,
            ),
        ]
        figure = f"{name}: rank correlation of scores and {s.sought}, right half"
        outcome.figures[figure] = rank_correlation(scores, stain)
        outcome.costs[f"{name}: training step of {whole.shape[1]} patches"] = compare(
            settings,
            {
                "eager": functools.partial(_step, head, whole, label, True),
                "ours": functools.partial(_step, head, whole, label),
            },
        )
        outcome.pictures.append(picture(s, raw, settings.out / f"slide-{name}.png"))
    return outcome


def _step(head: Head, x: Tensor, labels: Tensor, eager: bool = False) -> None:
    torch.autograd.grad(head.loss(x, labels, eager), list(head.parameters()))


def picture(s: Slide, raw: Tensor, path: Path) -> Path:
    """The image, what is sought, and the attention by rank over the image, as CLAM draws it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rank = torch.full_like(raw, float("nan"))
    rank[s.tissue] = raw[s.tissue].argsort().argsort().float() / int(s.tissue.sum())
    image = s.image.permute(1, 2, 0).numpy()
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2))
    extent = (0, image.shape[1], image.shape[0], 0)
    axes[0].imshow(image)
    axes[1].imshow(s.stain.numpy(), extent=extent, cmap="viridis")
    axes[2].imshow(image)
    axes[2].imshow(rank.numpy(), extent=extent, cmap="jet", alpha=0.5)
    titles = (s.name, f"{s.sought}: never shown", "attention by rank; the right half was held out")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    axes[2].axvline(image.shape[1] / 2, color="white", lw=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path
