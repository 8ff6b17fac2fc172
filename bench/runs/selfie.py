"""A trained network rebuilt on squeeze_excite: MediaPipe's selfie segmenter, gate by gate.

Its 106 000 half-precision weights come out of mediapipe's wheel.  Six blocks of the encoder are
squeezed and excited, one gate of the head is computed from another map than it scales, and three
skips are gated by what they are added to: with u = conv(up(d)) the decoder hands on x s + u,
s = sigmoid(FC relu FC mean(x + u)).  The original is the file itself, run by Google's LiteRT.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnkern import testing
from attnkern.functional import excite, squeeze, squeeze_excite
from bench import wheels
from bench.run import Claim, Cost, Outcome, Settings, compare

NEEDS = ("ai_edge_litert", "skimage", "matplotlib")
WHEELS = ("mediapipe",)
# what they see, [height, width], and the file
GRAPHS = {
    "astronaut": (256, 256, "selfie_segmentation"),
    "coffee": (144, 256, "selfie_segmentation_landscape"),
}
HALF = 2.0**-11  # the spacing of half-precision numbers below 1
Gates = Any  # Eager, Ours or Recorded
Weights = dict[str, Tensor]
Mlp = tuple[Tensor, Tensor, Tensor, Tensor]

# ------------------------------------------------------------------ the original


class Original:
    """A segmenter's file in the runtime it was made for, all operations of it, the custom one included."""

    def __init__(self, name: str):
        from ai_edge_litert.interpreter import Interpreter

        content = wheels.read(*WHEELS, f"modules/selfie_segmentation/{GRAPHS[name][2]}.tflite")
        self.graph = Interpreter(model_content=content, num_threads=torch.get_num_threads())
        self.graph.allocate_tensors()

    def __call__(self, pixels: Tensor) -> Tensor:
        """The mask [1, 1, H, W] of pixels [1, 3, H, W] in 0..1."""
        self.graph.set_tensor(
            self.graph.get_input_details()[0]["index"],
            pixels.permute(0, 2, 3, 1).contiguous().numpy(),
        )
        self.graph.invoke()
        mask = self.graph.get_tensor(self.graph.get_output_details()[0]["index"])
        return torch.from_numpy(mask).permute(0, 3, 1, 2)

    def weights(self) -> Weights:
        """What a file stores, by its names (the last layer has two), as PyTorch lays convolutions out."""
        found = {}
        for detail in self.graph.get_tensor_details():
            layer, _, kind = detail["name"].rpartition("/")
            layer = "last" if layer in ("segment", "conv2d_transpose") else layer
            if kind in ("Kernel", "Bias"):
                stored = torch.from_numpy(self.graph.get_tensor(detail["index"])).float()
                if kind == "Kernel":
                    # [out, h, w, in], or [1, h, w, channels] where each channel has its own
                    apart = layer.startswith(("depthwise", "last"))
                    stored = stored.permute((3, 0, 1, 2) if apart else (0, 3, 1, 2)).contiguous()
                found[f"{layer}/{kind}"] = stored
        return found


# ------------------------------------------------------------------ gates


class Eager:
    """The gates as one writes them in PyTorch."""

    def squeezed(self, x: Tensor, mlp: Mlp) -> Tensor:
        return x * self._gate(x, mlp)

    def head(self, x: Tensor, source: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return x * F.conv2d(source.mean((2, 3), keepdim=True), weight, bias).sigmoid()

    def skip(self, x: Tensor, u: Tensor, mlp: Mlp) -> Tensor:
        return x * self._gate(x + u, mlp) + u

    def _gate(self, x: Tensor, mlp: Mlp) -> Tensor:
        w1, b1, w2, b2 = mlp
        h = F.conv2d(x.mean((2, 3), keepdim=True), w1, b1).relu()
        return F.conv2d(h, w2, b2).sigmoid()


class Ours:
    """The same on attnkern; x + u is never written: its mean is the sum of two."""

    def __init__(self, impl: str):
        self.impl = impl

    def squeezed(self, x: Tensor, mlp: Mlp) -> Tensor:
        return squeeze_excite(x, *mlp, impl=self.impl)

    def head(self, x: Tensor, source: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = F.linear(squeeze(source, impl=self.impl), weight.flatten(1), bias)
        return excite(x, logits, gate="sigmoid", impl=self.impl)

    def skip(self, x: Tensor, u: Tensor, mlp: Mlp) -> Tensor:
        mean = squeeze(x, impl=self.impl) + squeeze(u, impl=self.impl)
        return squeeze_excite(x, *mlp, src=mean, residual=u, impl=self.impl)


class Recorded:
    """Gates that keep what they were given."""

    def __init__(self, gates: Gates):
        self.gates = gates
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Callable[..., Tensor]:
        def gate(*given: Any) -> Tensor:
            self.calls.append((name, given))
            return getattr(self.gates, name)(*given)

        return gate


# ------------------------------------------------------------------ the network


class Convolution(nn.Module):
    """Padded as TensorFlow pads: what is left over goes below and to the right."""

    def __init__(self, weight: Tensor, bias: Tensor, stride: int = 1):
        super().__init__()
        self.weight, self.bias, self.stride = nn.Parameter(weight), nn.Parameter(bias), stride

    def forward(self, x: Tensor) -> Tensor:
        before, after = ((self.weight.shape[2] - self.stride + i) // 2 for i in (0, 1))
        if before != after:
            x, before = F.pad(x, (before, after) * 2), 0
        groups = x.shape[1] // self.weight.shape[1]
        return F.conv2d(x, self.weight, self.bias, self.stride, before, groups=groups)


class Layers:
    """Hands the convolutions out in the order of the file, which is the order they run in."""

    def __init__(self, weights: Weights):
        self.weights = weights
        self.plain, self.depthwise = self._all("conv2d"), self._all("depthwise_conv2d")

    def _all(self, kind: str) -> Iterator[tuple[Tensor, Tensor]]:
        names = (f"{kind}_{i}" if i else kind for i in itertools.count())
        return ((self.weights[f"{n}/Kernel"], self.weights[f"{n}/Bias"]) for n in names)

    def convolution(self, stride: int = 1) -> Convolution:
        return Convolution(*next(self.plain), stride)

    def separable(self, stride: int = 1) -> Convolution:
        return Convolution(*next(self.depthwise), stride)

    def mlp(self) -> nn.ParameterList:
        return nn.ParameterList([*next(self.plain), *next(self.plain)])


class Bottleneck(nn.Module):
    """MobileNetV3's: expand, filter each channel, squeeze and excite, project."""

    def __init__(
        self, layers: Layers, act: Any, stride: int = 1, se: bool = True, add: bool = True
    ):
        super().__init__()
        self.act, self.add = act, add
        self.expand, self.filter = layers.convolution(), layers.separable(stride)
        self.mlp = layers.mlp() if se else None
        self.project = layers.convolution()

    def forward(self, x: Tensor, gates: Gates) -> Tensor:
        y = self.act(self.filter(self.act(self.expand(x))))
        if self.mlp is not None:
            y = gates.squeezed(y, tuple(self.mlp))
        y = self.project(y)
        return x + y if self.add else y


class GatedSkip(nn.Module):
    """One step of the decoder, to twice the resolution."""

    def __init__(self, layers: Layers):
        super().__init__()
        self.narrow, self.mlp = layers.convolution(), layers.mlp()
        self.mix, self.filter = layers.convolution(), layers.separable()

    def forward(self, d: Tensor, x: Tensor, gates: Gates) -> Tensor:
        u = self.narrow(F.interpolate(d, scale_factor=2, mode="bilinear"))
        y = self.mix(gates.skip(x, u, tuple(self.mlp))).relu()
        return y + self.filter(y).relu()


class Segmenter(nn.Module):
    def __init__(self, weights: Weights, gates: Gates):
        super().__init__()
        self.gates = gates
        layers = Layers(weights)
        small, large = F.relu, F.hardswish
        self.stem = layers.convolution(2)
        self.to4 = Bottleneck(layers, small, 2, add=False)
        self.to8 = nn.ModuleList(
            [
                Bottleneck(layers, small, 2, se=False, add=False),
                Bottleneck(layers, small, se=False),
            ]
        )
        self.to16 = nn.ModuleList(
            [
                Bottleneck(layers, large, 2, add=False),
                *(Bottleneck(layers, large) for _ in range(4)),
            ]
        )
        self.head, self.head_gate = layers.convolution(), layers.convolution()
        self.decoder = nn.ModuleList(GatedSkip(layers) for _ in range(3))
        self.last = Convolution(weights["last/Kernel"], weights["last/Bias"], 2)

    def forward(self, pixels: Tensor) -> Tensor:
        """The mask [B, 1, H, W] of pixels [B, 3, H, W] in 0..1."""
        at2 = F.hardswish(self.stem(pixels))
        x = at4 = self.to4(at2, self.gates)
        for block in self.to8:
            x = block(x, self.gates)
        at8 = x
        for block in self.to16:
            x = block(x, self.gates)
        gate = self.head_gate
        x = self.gates.head(self.head(x).relu(), x, gate.weight, gate.bias)
        for step, skip in zip(self.decoder, (at8, at4, at2), strict=True):
            x = step(x, skip, self.gates)
        return F.conv_transpose2d(x, self.last.weight, self.last.bias, 2).sigmoid()


# ------------------------------------------------------------------ the run


def photograph(name: str) -> Tensor:
    """[1, 3, H, W] in 0..1, of the size that its graph takes, in steps of 1/255."""
    from skimage import data

    pixels = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None].float()
    size = GRAPHS[name][:2]
    return F.interpolate(pixels, size, mode="bilinear", antialias=True).round() / 255


def replay(gates: Gates, calls: list[tuple[str, tuple[Any, ...]]]) -> list[Tensor]:
    return [getattr(gates, name)(*given) for name, given in calls]


def widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else tuple(map(widened, value))


@torch.no_grad()
def run(settings: Settings) -> Outcome:
    outcome = Outcome([])
    ours, shown = Ours(settings.impl), []
    for name in GRAPHS:
        settings.say(f"selfie: {name}")
        original, pixels = Original(name), photograph(name)
        weights = original.weights()
        recorded = Recorded(Eager())
        plain, network = Segmenter(weights, recorded), Segmenter(weights, ours)
        wanted, eager, mask = original(pixels), plain(pixels), network(pixels)
        oracle = Segmenter(weights, Eager()).double()(pixels.double())
        difference = testing.largest_error(mask, wanted)
        calls = list(recorded.calls)
        exact = replay(Eager(), [(gate, tuple(map(widened, given))) for gate, given in calls])
        results = zip(replay(ours, calls), replay(Eager(), calls), exact, strict=True)
        outcome.claims += [
            Claim(f"{name}: the masks differ by", difference, HALF, at_most=True),
            Claim(
                f"{name}: error of the {len(calls)} gates over eager's, the worst",
                max(itertools.starmap(testing.error_ratio, results)),
                2,
                at_most=True,
            ),
        ]
        for what, found in (("the original", wanted), ("eager", eager), ("ours", mask)):
            error = testing.largest_error(found, oracle)
            outcome.figures[f"{name}: error of the mask against float64, {what}"] = error
        outcome.figures[f"{name}: share of the photograph in the mask"] = float(mask.mean())
        for frames in (1,) if settings.quick else (1, 16):
            outcome.costs |= costs(
                name, original, weights, pixels.repeat(frames, 1, 1, 1), settings
            )
        shown.append((pixels, wanted, mask))
    outcome.pictures.append(picture(shown, settings))
    return outcome


def costs(
    name: str, original: Original, weights: Weights, pixels: Tensor, settings: Settings
) -> dict[str, dict[str, Cost]]:
    """Of the network and of its gates alone; LiteRT's file takes one frame."""
    recorded, ours = Recorded(Eager()), Ours(settings.impl)
    Segmenter(weights, recorded)(pixels)
    calls = recorded.calls
    networks = {
        "eager": functools.partial(Segmenter(weights, Eager()), pixels),
        "ours": functools.partial(Segmenter(weights, ours), pixels),
    }
    if len(pixels) == 1:
        networks["LiteRT"] = functools.partial(original, pixels)
    whole = compare(settings, networks)
    if "LiteRT" in whole:  # torch's profiler sees nothing of its memory
        whole["LiteRT"] = replace(whole["LiteRT"], peak_bytes=None)
    alone = {"eager": functools.partial(replay, Eager(), calls)}
    alone["ours"] = functools.partial(replay, ours, calls)
    what = f"{name}, {len(pixels)} frame{'s' if len(pixels) > 1 else ''}"
    return {what: whole, f"{what}, its {len(calls)} gates alone": compare(settings, alone)}


def picture(shown: list[tuple[Tensor, Tensor, Tensor]], settings: Settings) -> Path:
    """A photograph a row: the original's mask over it, ours, and what tells the two apart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(shown), 3, figsize=(12, 7), layout="constrained")
    for line, (pixels, wanted, mask) in zip(axes, shown, strict=True):
        backdrop = torch.tensor([0.1, 0.5, 0.9])[:, None, None]
        for axis, title, m in zip(line, ("the original", "ours"), (wanted, mask), strict=False):
            axis.imshow((pixels * m + backdrop * (1 - m))[0].permute(1, 2, 0).numpy())
            axis.set_title(title, fontsize=9)
        difference = (mask - wanted)[0, 0].abs().numpy()
        image = line[2].imshow(difference, cmap="magma", vmin=0)
        line[2].set_title(f"masks differ by at most {difference.max():.1e}", fontsize=9)
        figure.colorbar(image, ax=line[2], shrink=0.8)
        for axis in line:
            axis.set(xticks=[], yticks=[])
    path = settings.out / "selfie.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
