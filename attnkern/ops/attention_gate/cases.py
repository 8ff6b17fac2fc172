"""Cases of attention_gate for tests and benchmarks, and its eager formulation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkern.ops.attention_gate.functions import attention_gate
from attnkern.ops.attention_gate.norm import BatchNorm
from attnkern.testing import Case, OpSpec

BRANCHES = ("theta", "phi", "psi", "out")
WEIGHTS = tuple(f"{b}_{kind}" for b in BRANCHES for kind in ("weight", "bias", "gamma", "beta"))


def running(size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Running mean and variance of a trained norm: nothing special."""
    mean = torch.linspace(-0.4, 0.5, size, device=like.device)
    var = torch.linspace(0.6, 1.7, size, device=like.device)
    return mean.to(like.dtype), var.to(like.dtype)


def batch_norm(
    kind: str, size: int, gamma: Tensor | None, beta: Tensor | None, like: Tensor
) -> BatchNorm:
    """``kind``: eval, track (training, with running statistics) or batch (without)."""
    mean, var = (None, None) if kind == "batch" else running(size, like)
    return BatchNorm(mean, var, gamma, beta, training=kind != "eval")


def call(x: Tensor, g: Tensor, **arguments: Any) -> Any:
    """attention_gate with its norms given flat: ``theta_norm`` a kind, ``theta_gamma``, ``theta_beta``."""
    for branch in BRANCHES:
        gamma, beta = (arguments.pop(f"{branch}_{name}", None) for name in ("gamma", "beta"))
        kind = arguments.pop(f"{branch}_norm", None)
        if kind is not None:
            weight = arguments[f"{branch}_weight"]
            size = 1 if branch == "psi" else weight.shape[0]
            like = weight if gamma is None else gamma
            arguments[f"{branch}_norm"] = batch_norm(kind, size, gamma, beta, like)
    positional = (
        f"{branch}_{kind}" for branch in ("theta", "phi", "psi") for kind in ("weight", "bias")
    )
    return attention_gate(x, g, *(arguments.pop(name, None) for name in positional), **arguments)


def eager(
    x: Tensor,
    g: Tensor,
    *,
    act: str = "relu",
    act_slope: float = 0.01,
    gate: str = "sigmoid",
    upsample: str | None = None,
    align_corners: bool = False,
    target: str = "x",
    return_alpha: bool = False,
    **arguments: Any,
) -> Any:
    """attention_gate as a model writes it today, every step in x's dtype."""
    dims = x.dim() - 2
    convolution = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]

    def convolve(branch: str, t: Tensor) -> Tensor:
        weight, bias, gamma, beta = (
            None if (p := arguments.get(f"{branch}_{kind}")) is None else p.to(x.dtype)
            for kind in ("weight", "bias", "gamma", "beta")
        )
        assert weight is not None
        if weight.dim() == 1:
            weight = weight.unsqueeze(0)
        kernel = tuple(weight.shape[2:]) or (1,) * dims
        t = convolution(t, weight.reshape(*weight.shape[:2], *kernel), bias, stride=kernel)
        kind = arguments.get(f"{branch}_norm")
        if kind is None:
            return t
        norm = batch_norm(kind, t.shape[1], gamma, beta, t)
        mean, var, _, _, training, momentum, eps = norm
        return F.batch_norm(t, mean, var, gamma, beta, training, momentum, eps)

    def resize(t: Tensor, size: Any) -> Tensor:
        if t.shape[2:] == size:
            return t
        assert upsample is not None
        corners = None if upsample == "nearest" else align_corners
        return F.interpolate(t, size, mode=upsample, align_corners=corners)

    theta = convolve("theta", x)
    h = theta + resize(convolve("phi", g), theta.shape[2:])
    slopes = (act_slope,) if act == "leaky_relu" else ()
    a = getattr(F, act)(h, *slopes)
    q = convolve("psi", a)
    alpha = torch.sigmoid(q) if gate == "sigmoid" else q.flatten(1).softmax(1).view_as(q)
    gated = x if target == "x" else g
    alpha_full = resize(alpha, gated.shape[2:])
    y = alpha_full * gated
    if "out_weight" in arguments:
        y = convolve("out", y)
    return (y, alpha, alpha_full) if return_alpha else y


def case(
    name: str,
    batch: int,
    channels: int,
    spatial: tuple[int, ...],
    hidden: int,
    *,
    gating: tuple[int, ...] | None = None,
    gating_channels: int | None = None,
    kernel: int | tuple[int, ...] = 1,
    bias: bool = True,
    norms: str | None = None,
    norm_of: tuple[str, ...] = ("theta", "phi", "psi"),
    out: int = 0,
    trailing: bool = True,
    **options: Any,
) -> Case:
    """A Case; ``gating`` and ``gating_channels`` are g's (default: x's), ``out`` the channels after the gate."""
    dims = len(spatial)
    gating_channels = gating_channels or channels
    sizes = kernel if isinstance(kernel, tuple) else (kernel,) * dims
    ones = (1,) * dims if trailing else ()
    shapes: dict[str, tuple[int, ...]] = {
        "x": (batch, channels, *spatial),
        "g": (batch, gating_channels, *(gating or spatial)),
        "theta_weight": (hidden, channels, *(sizes if trailing or kernel != 1 else ())),
        "phi_weight": (hidden, gating_channels, *ones),
        "psi_weight": (1, hidden, *ones) if trailing else (hidden,),
    }
    if out:
        target = gating_channels if options.get("target") == "g" else channels
        shapes["out_weight"] = (out, target, *ones)
    widths = {"theta": hidden, "phi": hidden, "psi": 1, "out": out}
    for branch, width in widths.items():
        if f"{branch}_weight" not in shapes:
            continue
        # a bias under statistics of the batch, or of a softmax, has gradient 0: eager has rounding errors alone
        shifts = branch != "psi" or options.get("gate") != "softmax"
        normed = norms is not None and branch in norm_of
        if bias and shifts and (norms == "eval" or not normed):
            shapes[f"{branch}_bias"] = (width,)
        if normed:
            options[f"{branch}_norm"] = norms
            shapes[f"{branch}_gamma"] = (width,)
            if shifts:
                shapes[f"{branch}_beta"] = (width,)
    scale = {
        "theta_weight": shapes["theta_weight"][1] ** -0.5,
        "phi_weight": gating_channels**-0.5,
        "psi_weight": 2 * hidden**-0.5,
    }
    return Case(name, shapes, options, ("x", "g"), WEIGHTS, scale, ("x", "g"))


# Sizes are odd on purpose: no vector width divides them.
CASES = [
    case("monai", 2, 24, (9, 11), 12, norms="eval"),
    case("monai_3d", 2, 16, (5, 6, 7), 8, norms="eval"),
    case("monai_training", 3, 18, (9, 7), 9, norms="track"),
    case("monai_training_3d", 2, 8, (4, 5, 6), 4, norms="track"),
    case("no_norm", 2, 33, (8, 9), 17),
    case("gate_no_bias", 2, 20, (6, 7), 11, bias=False, trailing=False),
    case("gate_1d", 3, 19, (37,), 5),
    case("gate_one_pixel", 4, 24, (1, 1), 6),
    case("gate_one_channel", 2, 1, (9, 9), 1),
    case("gate_long", 1, 6, (61, 67), 3),
    case("gate_wide", 1, 130, (5, 5), 70, gating_channels=260),
    case(
        "oktay",
        2,
        10,
        (8, 12, 8),
        10,
        gating=(4, 6, 4),
        gating_channels=20,
        kernel=2,
        upsample="trilinear",
        return_alpha=True,
    ),
    case("oktay_2d_odd", 2, 7, (13, 11), 9, gating=(4, 3), kernel=2, upsample="bilinear"),
    case(
        "align_corners",
        2,
        7,
        (12, 11),
        9,
        gating=(4, 3),
        kernel=(2, 3),
        upsample="bilinear",
        align_corners=True,
        return_alpha=True,
    ),
    case("coarse_nearest", 2, 13, (12, 10), 6, gating=(6, 5), upsample="nearest"),
    case("coarse_trilinear", 2, 6, (6, 7, 5), 5, gating=(3, 2, 4), upsample="trilinear"),
    case("coarse_training", 2, 6, (8, 7), 5, gating=(4, 4), upsample="bilinear", norms="track"),
    case(
        "strided_training",
        2,
        6,
        (8, 9),
        5,
        gating=(4, 4),
        kernel=2,
        upsample="nearest",
        norms="batch",
    ),
    case("linear_1d", 2, 6, (19,), 5, gating=(7,), upsample="linear"),
    case("finer_gating", 2, 6, (8, 9), 5, gating=(13, 11), upsample="bilinear"),
    case("softmax", 2, 14, (7, 9), 7, gate="softmax"),
    case("softmax_norm", 2, 14, (7, 9), 7, gate="softmax", norms="track", return_alpha=True),
    case("leaky_relu", 2, 14, (7, 9), 7, act="leaky_relu", act_slope=0.2),
    case("softplus", 2, 14, (7, 9), 7, act="softplus", return_alpha=True),
    case("target_g", 2, 14, (7, 9), 7, gating_channels=11, target="g"),
    # in channels_last a map of one channel, or of one position, lies in both layouts
    case("target_g_one_channel", 2, 14, (7, 9), 7, gating_channels=1, target="g"),
    case("target_g_one_position", 3, 6, (4, 3), 5, gating=(1, 1), kernel=(4, 3), target="g"),
    case("target_g_norm", 2, 14, (7, 9), 7, gating_channels=11, target="g", norms="batch"),
    case(
        "target_g_coarse",
        2,
        14,
        (8, 9),
        7,
        gating=(4, 5),
        gating_channels=11,
        target="g",
        upsample="bilinear",
    ),
    case("theta_norm_alone", 2, 9, (6, 5), 6, norms="track", norm_of=("theta",)),
    case("phi_norm_alone", 2, 9, (6, 5), 6, norms="batch", norm_of=("phi",)),
    case("psi_norm_alone", 2, 9, (6, 5), 6, norms="track", norm_of=("psi",)),
    case("out", 2, 9, (6, 5), 6, out=13),
    case("out_norm", 2, 9, (6, 5), 6, out=9, norms="track", norm_of=("out",)),
    case("out_norm_eval", 2, 9, (6, 5), 6, out=9, norms="eval", norm_of=("out",)),
]

SPECS = [OpSpec("attention_gate", call, eager, CASES, "attention_gate_fwd")]
