"""A page read by trained networks whose squeeze-and-excitation is ours: PP-OCR's detector, classifier, recogniser.

rapidocr-onnxruntime's wheel holds the three, with 21 blocks of three kinds: x s and x + x s with a hard
sigmoid of slope 0.2, x s with slope 1/6.  Each graph is cut at its blocks: onnxruntime runs what is
between them, attnkern the blocks, and both must give what onnxruntime gives for the whole file.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkern import testing
from bench import cut, wheels
from bench.cut import Block, Cut, Gate, Graph
from bench.run import Claim, Cost, Outcome, Settings, compare

NEEDS = ("onnx", "onnxruntime", "skimage", "matplotlib")
WHEELS = ("rapidocr_onnxruntime",)
FILES = {
    "detector": "ch_PP-OCRv4_det_infer",
    "classifier": "ch_ppocr_mobile_v2.0_cls_infer",
    "recogniser": "ch_PP-OCRv4_rec_infer",
}
HEIGHT = 48  # of a line, for the classifier and the recogniser
# shorter sides of the page: read best, and what PP-OCR's own pipeline makes of it
SIDE, LARGE = 384, 736
HALF = 2.0**-11  # the spacing of half-precision numbers below 1
SAYS = """Region-based segmentation Let us first determine markers of the coins and the background. These
markers are pixels that we can label unambiguously as either object or background. Here, the markers are found
at the two extreme parts of the histogram of grey values: >>> markers = np.zeros_like(coins)"""
Network = Callable[[Tensor], Tensor]


def graph(name: str) -> Graph:
    return Graph(wheels.read(*WHEELS, f"models/{FILES[name]}.onnx"))


def letters(recogniser: Graph) -> list[str]:
    """What its outputs stand for: a blank, those that the file lists, a space."""
    return ["", *recogniser.metadata("character").splitlines(), " "]


# ------------------------------------------------------------------ reading


class Line(NamedTuple):
    """Where a line of text runs on the page: a parabola, and how high the text is."""

    left: float
    right: float
    parabola: Any  # of the column, highest power first
    height: float


def page(side: int) -> Tensor:
    """[1, 3, H, W] in -1..1, the shorter side ``side``, both multiples of 32 as the detector wants them."""
    from skimage import data

    pixels = torch.from_numpy(data.page())[None, None].float()
    size = [round(n * side / min(pixels.shape[2:]) / 32) * 32 for n in pixels.shape[2:]]
    grey = F.interpolate(pixels, size, mode="bilinear") / 127.5 - 1
    return grey.expand(-1, 3, -1, -1).contiguous()


def lines_of(probability: Tensor) -> list[Line]:
    """What hangs together in the detector's map [1, 1, H, W] is a line, drawn thinner than its text."""
    import numpy as np
    from skimage import measure

    found = []
    for region in measure.regionprops(measure.label(probability[0, 0].numpy() > 0.3)):
        rows, columns = region.coords.T
        thickness = region.area / (columns.max() - columns.min() + 1)
        if thickness < 3 or region.area < 4 * thickness**2:
            continue  # a speck
        # the network learns lines shrunk by area (1 - 0.4^2) / perimeter; PP-OCR widens by 1.6 of it
        margin = 0.8 * thickness
        left, right = columns.min() - margin, columns.max() + margin
        found.append(Line(left, right, np.polyfit(columns, rows, 2), thickness + 2 * margin))
    return sorted(found, key=lambda line: np.polyval(line.parabola, line.left))


def straightened(pixels: Tensor, line: Line) -> Tensor:
    """[1, 3, 48, W], the text along the line."""
    import numpy as np

    width = round(HEIGHT * (line.right - line.left) / line.height)
    x = np.linspace(line.left, line.right, width)
    y = np.polyval(line.parabola, x) + line.height * np.linspace(-0.5, 0.5, HEIGHT)[:, None]
    size = torch.tensor([pixels.shape[3], pixels.shape[2]])
    places = torch.from_numpy(np.stack(np.broadcast_arrays(x, y), 2))
    grid = ((2 * places + 1) / size - 1).to(pixels.dtype)
    return F.grid_sample(pixels, grid[None], padding_mode="border", align_corners=False)


def text_of(probabilities: Tensor, letters: list[str]) -> str:
    """The likeliest letter of each step [1, steps, letters], repetitions once, blanks (0) dropped."""
    best = probabilities[0].argmax(1).tolist()
    return "".join(letters[i] for i, _ in itertools.groupby(best) if i)


def read(
    networks: dict[str, Network], pixels: Tensor, letters: list[str]
) -> tuple[list[str], list[Line]]:
    lines, texts = lines_of(networks["detector"](pixels)), []
    for line in lines:
        crop = straightened(pixels, line)
        if turned(networks["classifier"], squashed(crop)):
            crop = crop.flip((2, 3))
        texts.append(text_of(networks["recogniser"](crop), letters))
    return texts, lines


def squashed(crop: Tensor) -> Tensor:
    """As the classifier takes a line, whatever its length."""
    return F.interpolate(crop, (HEIGHT, 192), mode="bilinear")


def turned(classifier: Network, line: Tensor) -> bool:
    """Whether the line is upside down."""
    return bool(classifier(line)[0, 1] > 0.9)


# ------------------------------------------------------------------ the run


class Compared(NamedTuple):
    gates: float  # error over onnxruntime's, the worst gate over all inputs
    apart: float  # onnxruntime's output and ours
    allowed: float  # onnxruntime's output with and without its optimisations


def compared(network: Cut, inputs: list[Tensor], gate: Gate) -> Compared:
    graph = network.graph
    alone = {block.x: graph.block_alone(block) for block in graph.blocks}
    whole, plain = graph.whole(), graph.whole(optimised=False)
    found: dict[str, list[tuple[Tensor, ...]]] = {block.x: [] for block in graph.blocks}
    apart, allowed = [], []

    def checked(block: Block, x: Tensor) -> Tensor:
        y, exact = gate(block, x), cut.eager(block.double(), x.double())
        found[block.x].append((y.flatten(), alone[block.x](x).flatten(), exact.flatten()))
        return y

    for x in inputs:
        wanted = whole(x)
        apart.append(testing.largest_error(network(x, checked), wanted))
        allowed.append(testing.largest_error(plain(x), wanted))
    joined = [map(torch.cat, zip(*of_gate, strict=True)) for of_gate in found.values()]
    gates = itertools.starmap(testing.error_ratio, joined)
    return Compared(max(gates), max(apart), max(allowed))


@torch.no_grad()
def run(settings: Settings) -> Outcome:
    graphs = {name: graph(name) for name in FILES}
    cuts = {name: Cut(g) for name, g in graphs.items()}
    gate = functools.partial(cut.ours, impl=settings.impl)
    originals: dict[str, Network] = {name: g.whole() for name, g in graphs.items()}
    rebuilt: dict[str, Network] = {n: functools.partial(c, gate=gate) for n, c in cuts.items()}
    pixels, known = page(SIDE), letters(graphs["recogniser"])
    settings.say("ocr: reading")
    wanted, lines = read(originals, pixels, known)
    texts, found = read(rebuilt, pixels, known)
    crops = [straightened(pixels, line) for line in lines]
    ways = [squashed(crop) for crop in crops]
    ways += [way.flip((2, 3)) for way in ways]
    inputs = {"detector": [pixels], "classifier": ways, "recogniser": crops}

    told = [turned(rebuilt["classifier"], way) == (i >= len(crops)) for i, way in enumerate(ways)]
    otherwise = sum(a != b for a, b in itertools.zip_longest(texts, wanted))
    outcome = Outcome(
        [
            Claim("lines that onnxruntime reads otherwise", otherwise, 0, at_most=True),
            Claim("letters and figures read right", likeness("".join(texts), SAYS), 0.95),
            Claim("lines told from lines upside down", sum(told) / len(told), 0.9),
        ],
        {f"line {i}": text for i, text in enumerate(texts, 1)},
    )
    for name, network in cuts.items():
        settings.say(f"ocr: {name}")
        gates = f"error of the {len(network.graph.blocks)} gates over onnxruntime's, the worst"
        c = compared(network, inputs[name], gate)
        outcome.claims += [
            Claim(f"{name}: {gates}", c.gates, 2, at_most=True),
            Claim(f"{name}: probabilities differ by", c.apart, HALF, at_most=True),
        ]
        outcome.figures[f"{name}: onnxruntime without its optimisations differs by"] = c.allowed
        large = name == "detector" and not settings.quick
        x = page(LARGE) if large else inputs[name][0]
        outcome.costs |= costs(name, network, x, gate, settings)
    outcome.pictures.append(picture(pixels, found, texts, settings))
    return outcome


def likeness(text: str, wanted: str) -> float:
    """Of letters and figures: the recogniser, trained on Chinese, often leaves no space between words."""
    a, b = ("".join(filter(str.isalnum, t)) for t in (text, wanted))
    return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()


def costs(
    name: str, network: Cut, x: Tensor, gate: Gate, settings: Settings
) -> dict[str, dict[str, Cost]]:
    """Of the network and of its gates alone."""
    calls: list[tuple[Block, Tensor]] = []

    def recorded(block: Block, given: Tensor) -> Tensor:
        calls.append((block, given))
        return cut.eager(block, given)

    network(x, recorded)
    alone = [(network.graph.block_alone(block), given) for block, given in calls]
    whole = compare(
        settings,
        {
            "onnxruntime": functools.partial(network.graph.whole(), x),
            "eager": functools.partial(network, x, cut.eager),
            "ours": functools.partial(network, x, gate),
        },
    )
    gates = compare(
        settings,
        {
            "onnxruntime": lambda: [session(given) for session, given in alone],
            "eager": lambda: list(itertools.starmap(cut.eager, calls)),
            "ours": lambda: list(itertools.starmap(gate, calls)),
        },
    )
    what = f"{name}, {x.shape[2]}x{x.shape[3]}"
    return {
        what: without_memory(whole, whole),
        f"{what}, its {len(calls)} gates alone": without_memory(gates, ["onnxruntime"]),
    }


def without_memory(costs: dict[str, Cost], names: Iterable[str]) -> dict[str, Cost]:
    """Torch's profiler sees nothing of what onnxruntime holds, the stages of a cut graph among it."""
    return costs | {name: replace(costs[name], peak_bytes=None) for name in names}


def picture(pixels: Tensor, lines: list[Line], texts: list[str], settings: Settings) -> Path:
    """The page with its lines as they were found, and beside each what was read."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(14, 3.6), layout="constrained")
    axis.imshow((pixels[0, 0].numpy() + 1) / 2, cmap="gray")
    for line, text in zip(lines, texts, strict=True):
        x = np.linspace(line.left, line.right, 100)
        y = np.polyval(line.parabola, x)
        axis.fill_between(x, y - line.height / 2, y + line.height / 2, alpha=0.3, color="tab:green")
        plain = unicodedata.normalize("NFKC", text)  # the font lacks the wide brackets
        place = pixels.shape[3] + 20, y.mean()
        axis.text(*place, plain, fontsize=10, family="monospace", va="center")
    axis.set_title("lines as detected, and what is read, the gates on attnkern", fontsize=9)
    axis.set_xlim(0, 2 * pixels.shape[3])
    axis.axis("off")
    path = settings.out / "ocr.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
