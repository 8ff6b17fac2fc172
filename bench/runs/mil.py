"""Does the bag hold a 9?  Multiple-instance learning on bags of 10 to 10 000 handwritten digits.

A bag's label is all that is learnt from.  Bag sizes are log-uniform; half the bags hold 9s, between
one and a tenth of their items, log-uniform too.  Training begins with small bags, where one 9 moves
the pool, and ends with the largest, where its weight must outgrow ten thousand others.  Bags of the
test are drawn from digits that no training bag has held, none of them distorted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnkern.functional import gated_attention_pool
from bench import digits
from bench.digits import Digits
from bench.run import Claim, Outcome, Settings, compare

NEEDS = ("sklearn", "matplotlib")
SMALLEST = 10
WANTED = 9
FEATURES, HIDDEN = 64, 64
TEMPERATURE = 0.25  # one item must outweigh ten thousand: logits of 10 and more


class Bags(NamedTuple):
    pixels: Tensor  # [N, 8, 8], items of all bags
    offsets: Tensor  # [B+1]
    labels: Tensor  # [B], 1.0 where the bag holds a 9
    wanted: Tensor  # [N], the items that are 9s: the test alone looks at it


class Pool:
    """Which digits bags are drawn from."""

    def __init__(self, source: Digits):
        self.pixels = source.pixels
        self.nines = (source.labels == WANTED).nonzero()[:, 0]
        self.others = (source.labels != WANTED).nonzero()[:, 0]

    def draw(self, count: int, largest: int, generator: torch.Generator) -> Bags:
        """``count`` bags, every second one with 9s in it."""

        def some(of: Tensor, size: int) -> Tensor:
            return of[torch.randint(len(of), (size,), generator=generator)]

        items, wanted = [], []
        for bag in range(count):
            size, share = (float(u) for u in torch.rand(2, generator=generator))
            size = round(SMALLEST * (largest / SMALLEST) ** size)
            chosen, is_wanted = some(self.others, size), torch.zeros(size, dtype=torch.bool)
            if bag % 2:
                places = torch.randperm(size, generator=generator)
                places = places[: max(1, round((size / 10) ** share))]
                chosen[places], is_wanted[places] = some(self.nines, len(places)), True
            items.append(chosen)
            wanted.append(is_wanted)
        offsets = torch.tensor([0, *map(len, items)]).cumsum(0)
        labels = torch.arange(count) % 2
        return Bags(self.pixels[torch.cat(items)], offsets, labels.float(), torch.cat(wanted))


class Classifier(nn.Module):
    """A small encoder, a gated attention pool over ragged bags, a linear head."""

    def __init__(self, impl: str):
        super().__init__()
        self.impl = impl
        self.encoder = nn.Sequential(
            *(nn.Unflatten(1, (1, digits.SIDE)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(512, FEATURES), nn.ReLU()),
        )
        self.V, self.U = nn.Linear(FEATURES, HIDDEN), nn.Linear(FEATURES, HIDDEN)
        self.w = nn.Linear(HIDDEN, 1)
        self.head = nn.Linear(FEATURES, 1)

    def pool(self, h: Tensor, offsets: Tensor, **returns: bool) -> Any:
        scorer = (self.V.weight, self.V.bias, self.U.weight, self.U.bias)
        scorer += (self.w.weight, self.w.bias)
        return gated_attention_pool(
            h, *scorer, offsets=offsets, temperature=TEMPERATURE, impl=self.impl, **returns
        )

    def eager_pool(self, h: Tensor, offsets: Tensor) -> Tensor:
        """All scores at once, then a softmax a bag: what takes the least time without padding."""
        e = self.w(torch.tanh(self.V(h)) * torch.sigmoid(self.U(h)))[:, 0] / TEMPERATURE
        sizes = offsets.diff().tolist()
        bags = zip(e.split(sizes), h.split(sizes), strict=True)
        return torch.stack([torch.softmax(scores, 0)[None] @ items for scores, items in bags])

    def forward(self, bags: Bags, pool: Callable[..., Tensor] | None = None) -> Tensor:
        z = (pool or self.pool)(self.encoder(bags.pixels), bags.offsets)
        return self.head(z[:, 0])[:, 0]


def train(model: Classifier, pool: Pool, settings: Settings, generator: torch.Generator) -> None:
    steps, largest, budget = (250, 1000, 1500) if settings.quick else (600, 10_000, 5000)
    optimiser = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 3e-3, total_steps=steps, pct_start=0.1
    )
    for step in range(steps):
        # the largest bag grows, and there are as many bags as make about ``budget`` items
        ratio = (largest / SMALLEST) ** min(1.0, 0.1 + 1.1 * step / steps)
        count = round(budget / SMALLEST * math.log(ratio) / (ratio - 1))
        bags = pool.draw(2 * max(3, min(32, count // 2)), round(SMALLEST * ratio), generator)
        loss = F.binary_cross_entropy_with_logits(model(bags), bags.labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        settings.say(f"mil: step {step + 1} of {steps}, loss {loss.detach():.3f}")


class Found(NamedTuple):
    sizes: Tensor  # [bags]
    right: Tensor  # [bags]
    mass: Tensor  # [positive bags], the attention on 9s


@torch.no_grad()
def examine(
    model: Classifier, pool: Pool, count: int, largest: int, generator: torch.Generator
) -> Found:
    sizes, right, mass = [], [], []
    for _ in range(count // 10):
        bags = pool.draw(10, largest, generator)
        z, p = model.pool(model.encoder(bags.pixels), bags.offsets, return_weights=True)
        right.append((model.head(z[:, 0])[:, 0] > 0) == (bags.labels > 0))
        sizes.append(bags.offsets.diff())
        on_wanted = torch.where(bags.wanted, p[0], 0.0).split(sizes[-1].tolist())
        mass.append(torch.stack([t.sum() for t in on_wanted])[bags.labels > 0])
    return Found(torch.cat(sizes), torch.cat(right), torch.cat(mass))


@torch.no_grad()
def separation(model: Classifier, source: Digits) -> float:
    """How often a held-out 9 has a larger score than another held-out digit (area under the ROC)."""
    offsets = torch.tensor([0, len(source.labels)])
    _, e = model.pool(model.encoder(source.pixels), offsets, return_scores=True)
    nine = source.labels == WANTED
    return float((e[0, nine, None] > e[0, ~nine]).float().mean())


def run(settings: Settings) -> Outcome:
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    known, held_out = digits.split(settings.seed)
    model = Classifier(settings.impl)
    source = Pool(digits.warped(known, 100, generator))
    train(model, source, settings, generator)

    largest = 1000 if settings.quick else 10_000
    held = Pool(held_out)
    found = examine(model, held, 400, largest, generator)
    bounds = [b for b in (10, 100, 1000, 10_000) if b < largest]
    figures = {}
    for low in bounds:
        these = (found.sizes >= low) & (found.sizes < 10 * low + (low * 10 == largest))
        label = f"accuracy, {low} to {10 * low} items ({int(these.sum())} bags)"
        figures[label] = float(found.right[these].float().mean())
    outcome = Outcome(
        [
            Claim(
                "accuracy on 400 bags of held-out digits", float(found.right.float().mean()), 0.95
            ),
            Claim("attention on the 9s of a bag that holds some", float(found.mass.mean()), 0.85),
            Claim("a 9 scores above another digit", separation(model, held_out), 0.95),
        ],
        figures,
    )
    bags = source.draw(8, largest, torch.Generator().manual_seed(0))
    outcome.costs[f"training step, 8 bags, {len(bags.pixels)} items"] = compare(
        settings,
        {"eager": lambda: _step(model, bags, model.eager_pool), "ours": lambda: _step(model, bags)},
    )
    h = model.encoder(bags.pixels).detach().requires_grad_()
    outcome.costs["its pool alone, forward and backward"] = compare(
        settings,
        {
            "eager": lambda: model.eager_pool(h, bags.offsets).sum().backward(),
            "ours": lambda: model.pool(h, bags.offsets).sum().backward(),
        },
    )
    outcome.pictures.append(picture(model, held, largest, settings, generator))
    return outcome


def _step(model: Classifier, bags: Bags, pool: Callable[..., Tensor] | None = None) -> None:
    loss = F.binary_cross_entropy_with_logits(model(bags, pool), bags.labels)
    torch.autograd.grad(loss, list(model.parameters()))


@torch.no_grad()
def picture(
    model: Classifier, pool: Pool, largest: int, settings: Settings, generator: torch.Generator
) -> Any:
    """The most attended digits of three bags that hold 9s, one bag a row, 9s framed in green."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown, rows = 12, []
    while len(rows) < 3:
        bags = pool.draw(2, largest, generator)
        start, end = bags.offsets[1:].tolist()
        if end - start < 10 ** (1 + len(rows)):
            continue
        _, p = model.pool(model.encoder(bags.pixels), bags.offsets, return_weights=True)
        most = p[0, start:end].topk(min(shown, end - start)).indices + start
        rows.append(
            (end - start, int(bags.wanted.sum()), bags.pixels[most], bags.wanted[most], p[0, most])
        )
    figure, axes = plt.subplots(3, shown, figsize=(shown, 4.2))
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for (size, nines, pixels, wanted, weights), line in zip(rows, axes, strict=True):
        line[0].set_title(
            f"{size} items, {nines} of them 9s; by attention:", loc="left", fontsize=9
        )
        for axis, image, good, weight in zip(line, pixels, wanted, weights, strict=False):
            axis.imshow(image.numpy(), cmap="gray_r")
            axis.set_xlabel(f"{float(weight):.3f}", fontsize=8)
            for spine in axis.spines.values():
                spine.set(color="tab:green" if good else "tab:red", linewidth=2)
    path = settings.out / "mil.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
