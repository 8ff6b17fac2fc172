"""Reading digits off a canvas: show, attend and tell on a map of 14x14 cells.

One to three real digits stand on a canvas of 56x56 pixels; the caption is what they say in reading
order.  As in the paper the encoder is a convolutional network that has learnt to classify, here single
digits in windows of 12x12 pixels, and stays as it is; it turns the canvas into a 14x14 map.  An LSTM
asks the map for the next digit by additive attention, whose keys are projected once a canvas; captions are sorted by
length, so that the batch shrinks as they end.  The doubly stochastic regulariser sends a gradient
into the weights themselves.  Canvases of the test hold digits that no training canvas has held.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnkern.functional import additive_attention_pool
from bench import digits
from bench.digits import SIDE, Digits
from bench.run import Claim, Outcome, Settings, compare

NEEDS = ("sklearn", "matplotlib")
CELLS, CELL = 14, 4  # cells a side, pixels a cell
WINDOW = 12  # pixels that a cell sees, around its own
LINE = 18  # pixels between lines of digits, and between places on a line
MOST = 3  # digits on a canvas
END, START = 10, 11  # words beside the ten digits
FEATURES, HIDDEN, STATE = 64, 96, 128
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Canvases(NamedTuple):
    """Sorted by the number of digits, longest first."""

    pixels: Tensor  # [B, 1, 56, 56]
    words: Tensor  # [B, MOST + 1], the digits in reading order, then END
    corners: Tensor  # [B, MOST, 2], the pixel row and column where each digit begins
    lengths: Tensor  # [B], digits


def draw(source: Digits, count: int, generator: torch.Generator, most: int = MOST) -> Canvases:
    lengths = torch.randint(1, most + 1, (count,), generator=generator).sort(descending=True).values
    side, across = CELLS * CELL, CELLS * CELL // LINE
    places = torch.rand(count, across**2, generator=generator).argsort(1)[:, :MOST]
    absent = torch.arange(MOST) >= lengths[:, None]
    # reading order, then what is absent
    places = places.masked_fill(absent, across**2).sort(1).values
    jitter = torch.randint(LINE - SIDE + 1, (count, MOST, 2), generator=generator)
    corners = LINE * torch.stack([places // across, places % across], 2) + jitter
    chosen = torch.randint(len(source.labels), (count, MOST), generator=generator)
    words = F.pad(source.labels[chosen].masked_fill(absent, END), (0, 1), value=END)

    pixels = torch.rand(count, side, side, generator=generator) * 0.1
    inside = torch.arange(SIDE)
    b, n = (~absent).nonzero(as_tuple=True)
    rows, columns = (corners[b, n, axis, None] + inside for axis in (0, 1))
    pixels[b[:, None, None], rows[:, :, None], columns[:, None, :]] += source.pixels[chosen[b, n]]
    return Canvases(pixels[:, None], words, corners, lengths)


# ------------------------------------------------------------------ encoder


def windows(source: Digits, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Windows [count, 1, 12, 12] with a digit in them (its label) or at most a part of one (END)."""
    chosen = torch.randint(len(source.labels), (count,), generator=generator)
    board = F.pad(source.pixels[chosen], (10,) * 4)
    board += torch.rand(board.shape, generator=generator) * 0.1
    begin = torch.randint(2, 17, (count, 2), generator=generator)  # the digit begins at 10
    begin[::2] = begin[::2] % 6 + 5  # half of them hold it
    inside = begin[:, :, None] + torch.arange(WINDOW)
    each = torch.arange(count)[:, None, None]
    pixels = board[each, inside[:, 0, :, None], inside[:, 1, None, :]]
    whole = ((begin >= 5) & (begin <= 10)).all(1)
    return pixels[:, None], source.labels[chosen].where(whole, torch.tensor(END))


def pretrained(source: Digits, quick: bool, generator: torch.Generator) -> nn.Module:
    encoder = nn.Sequential(
        *(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 48, 3), nn.ReLU()),
        *(nn.Conv2d(48, FEATURES, 3, stride=2), nn.ReLU()),
    )
    classifier = nn.Sequential(encoder, nn.Flatten(), nn.Linear(FEATURES, END + 1))
    steps = 300 if quick else 1500
    optimiser = torch.optim.Adam(classifier.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=steps)
    for _ in range(steps):
        pixels, labels = windows(source, 256, generator)
        loss = F.cross_entropy(classifier(pixels), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return encoder.requires_grad_(False)


# ------------------------------------------------------------------ captioner


def waves() -> Tensor:
    """[FEATURES, 14, 14], sines and cosines of row and column, where the learnt positions begin."""
    frequencies = torch.pi / CELLS * 2.0 ** (torch.arange(FEATURES // 4) / 6)
    angles = frequencies[:, None] * torch.arange(CELLS)
    rows = torch.cat([angles.sin(), angles.cos()])[:, :, None].expand(-1, -1, CELLS)
    return 0.5 * torch.cat([rows, rows.transpose(1, 2)])


class Captioner(nn.Module):
    def __init__(self, encoder: nn.Module, impl: str):
        super().__init__()
        self.impl = impl
        self.encoder = encoder
        self.position = nn.Parameter(waves())
        self.keys = nn.Conv2d(FEATURES, HIDDEN, 1)
        self.query = nn.Linear(STATE, HIDDEN)
        self.v = nn.Parameter(torch.randn(HIDDEN))
        self.embedding = nn.Embedding(START + 1, 32)
        self.cell = nn.LSTMCell(32 + FEATURES, STATE)
        self.word = nn.Linear(STATE + FEATURES, END + 1)

    def map_of(self, pixels: Tensor) -> Tensor:
        """[B, FEATURES, 14, 14], what is there and where."""
        return self.encoder(F.pad(pixels, (CELL,) * 4)) + self.position

    def attend(self, keys: Tensor, values: Tensor, query: Tensor, v: Tensor) -> Any:
        return additive_attention_pool(keys, values, query, v, return_weights=True, impl=self.impl)

    @staticmethod
    def eager_attend(keys: Tensor, values: Tensor, query: Tensor, v: Tensor) -> Any:
        """As decoders write it; channels first, as the encoder leaves its map."""
        h = torch.tanh(keys.flatten(2) + query[:, :, None])  # [B, K, N]
        p = torch.softmax(v @ h, 1)
        return (values.flatten(2) @ p[:, :, None])[..., 0], p

    def forward(
        self,
        pixels: Tensor,
        words: Tensor | None,
        lengths: Tensor | None,
        attend: Attend | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Logits and weights of every step; the words before are given, or its own without any."""
        attend = attend or self.attend
        values = self.map_of(pixels)
        keys = self.keys(values)
        h = c = values.new_zeros(len(pixels), STATE)
        context = values.new_zeros(len(pixels), FEATURES)
        word = torch.full((len(pixels),), START)
        logits, weights = [], []
        for step in range(MOST + 1):
            # a caption of n digits takes n + 1 steps: the batch shrinks as captions end
            count = len(pixels) if lengths is None else int((lengths >= step).sum())
            given = torch.cat([self.embedding(word[:count]), context[:count]], 1)
            h, c = self.cell(given, (h[:count], c[:count]))
            context, p = attend(keys[:count], values[:count], self.query(h), self.v)
            logits.append(self.word(torch.cat([h, context], 1)))
            weights.append(p)
            word = logits[-1].argmax(1) if words is None else words[:count, step]
        return logits, weights


def loss_of(model: Captioner, c: Canvases, attend: Attend | None = None) -> Tensor:
    """Cross-entropy of the words, and the doubly stochastic term: look everywhere once."""
    logits, weights = model(c.pixels, c.words, c.lengths, attend)
    expected = torch.cat([c.words[: len(step), t] for t, step in enumerate(logits)])
    looked = sum(F.pad(p, (0, 0, 0, len(c.words) - len(p))) for p in weights)
    return F.cross_entropy(torch.cat(logits), expected) + ((1 - looked) ** 2).mean()


def train(model: Captioner, source: Digits, settings: Settings, generator: torch.Generator) -> None:
    steps = 400 if settings.quick else 1500
    optimiser = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 1e-2, total_steps=steps, pct_start=0.1
    )
    for step in range(steps):
        most = min(MOST, 1 + 6 * step // steps)  # one digit at first
        loss = loss_of(model, draw(source, 64, generator, most))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        settings.say(f"captions: step {step + 1} of {steps}, loss {loss.detach():.3f}")


def neighbourhood(corner: Tensor) -> tuple[slice, slice]:
    """The cells that a digit touches and one more on every side: what the encoder sees it from."""
    first, last = corner // CELL - 1, (corner + SIDE - 1) // CELL + 1
    rows, columns = zip(first.clamp(min=0).tolist(), (last + 1).tolist(), strict=True)
    return slice(*rows), slice(*columns)


@torch.no_grad()
def examine(model: Captioner, c: Canvases) -> tuple[float, float, float, float, list[Tensor]]:
    """Share of digits read, of whole captions, attention at the digits, and that of a uniform map."""
    logits, weights = model(c.pixels, None, None)
    read = torch.stack(logits, 1).argmax(2)  # [B, steps], its own words fed back
    digit = torch.arange(MOST) < c.lengths[:, None]
    whole = ((read == c.words) | (torch.arange(MOST + 1) > c.lengths[:, None])).all(1)
    mass, area = [], []
    for step, p in enumerate(weights[:MOST]):
        for b in digit[:, step].nonzero()[:, 0].tolist():
            cells = p[b].view(CELLS, CELLS)[neighbourhood(c.corners[b, step])]
            mass.append(cells.sum())
            area.append(cells.numel() / CELLS**2)
    right = (read == c.words)[:, :MOST][digit].float().mean()
    return (
        float(right),
        float(whole.float().mean()),
        float(torch.stack(mass).mean()),
        sum(area) / len(area),
        weights,
    )


def run(settings: Settings) -> Outcome:
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    known, held_out = digits.split(settings.seed)
    source = digits.warped(known, 20, generator)
    model = Captioner(pretrained(source, settings.quick, generator), settings.impl)
    train(model, source, settings, generator)
    canvases = draw(held_out, 300, generator)
    right, whole, mass, area, weights = examine(model, canvases)
    outcome = Outcome(
        [
            Claim("digits read on 300 canvases of held-out digits", right, 0.9),
            Claim("attention at the digit that is read", mass, 0.7),
        ],
        {"whole captions right": whole, "attention there if it were uniform": area},
    )
    batch = draw(known, 64, torch.Generator().manual_seed(0))

    def step(attend: Attend) -> Any:
        return torch.autograd.grad(
            loss_of(model, batch, attend), [p for p in model.parameters() if p.requires_grad]
        )

    outcome.costs["training step of 64 canvases"] = compare(
        settings, {"eager": lambda: step(model.eager_attend), "ours": lambda: step(model.attend)}
    )
    with torch.no_grad():
        values = model.map_of(batch.pixels)
        keys, query = model.keys(values), torch.randn(64, HIDDEN)
    leaves = [t.requires_grad_() for t in (keys, values, query, model.v)]
    outcome.costs["one attention alone, forward and backward"] = compare(
        settings,
        {
            name: lambda f=f: torch.autograd.grad(sum(t.sum() for t in f(*leaves)), leaves)
            for name, f in (("eager", model.eager_attend), ("ours", model.attend))
        },
    )
    outcome.pictures.append(picture(canvases, weights, settings.out / "captions.png"))
    return outcome


def picture(c: Canvases, weights: list[Tensor], path: Path) -> Path:
    """Four canvases, the attention of each of their steps laid over them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(4, MOST + 1, figsize=(8, 8))
    for line, b in zip(axes, range(4), strict=True):
        for step, axis in enumerate(line):
            p = weights[step][b].view(1, 1, CELLS, CELLS)
            axis.imshow(c.pixels[b, 0].numpy(), cmap="gray_r")
            over = F.interpolate(p, scale_factor=CELL, mode="bilinear")[0, 0]
            axis.imshow(over.numpy(), cmap="Reds", alpha=0.55)
            word = int(c.words[b, step])
            axis.set_title("end" if word == END else str(word), fontsize=9)
            axis.set(xticks=[], yticks=[])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path
