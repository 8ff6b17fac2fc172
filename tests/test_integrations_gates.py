"""Real networks with attention gates: outputs, gradients and statistics of the optimized equal the untouched one's."""

import copy
import functools

import gate_modules as copied
import pytest
import torch
from gate_blocks import settle
from test_integrations import differentiate
from test_optimize_gates import GATES
from torch import nn

import attnkern
from attnkern import testing

pytestmark = pytest.mark.filterwarnings("ignore:.*upsample. is deprecated")


def attention_unet(dims):
    nets = pytest.importorskip("monai.networks.nets")
    return nets.AttentionUnet(
        dims, 1, 2, channels=(8, 16, 32), strides=(2, 2), dropout=0.1 if dims == 2 else 0.0
    )


class GridUnet(nn.Module):
    """Attention-Gated-Networks' use of its gates: the coarser map gates the finer, W's result is joined."""

    def __init__(self, width=6):
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv3d(1, width, 3, padding=1), nn.BatchNorm3d(width), nn.ReLU()
        )
        self.center = nn.Conv3d(width, 2 * width, 3, stride=2, padding=1)
        self.attentionblock = copied.MultiAttentionBlock(width, 2 * width, width)
        self.up = nn.ConvTranspose3d(2 * width, width, 2, 2)
        self.final = nn.Conv3d(2 * width, 2, 1)

    def forward(self, x):
        skip = self.down(x)
        gating = self.center(skip)
        gated, _ = self.attentionblock(skip, gating)
        return self.final(torch.cat([gated, self.up(gating)], 1))


NETWORKS = {
    "AttentionUnet 2d": (lambda: attention_unet(2), (3, 1, 32, 24), 2),
    "AttentionUnet 3d": (lambda: attention_unet(3), (2, 1, 16, 12, 8), 2),
    "AttU_Net": (copied.AttU_Net, (3, 3, 16, 12), 1),
    "grids": (GridUnet, (2, 1, 12, 8, 10), 2),
}


@functools.cache
def prototype(name):
    """A float64 network with settled statistics, without dropout, and its input."""
    make, shape, gates = NETWORKS[name]
    torch.manual_seed(0)
    model = settle(make()).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        model.train()(x)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.1
    return model, x, gates


@functools.cache
def oracle(name, train):
    model, x, _ = prototype(name)
    return differentiate(copy.deepcopy(model), x, train)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NETWORKS)
def test_float64_outputs_gradients_and_buffers_are_equal(name, train):
    model, x, gates = prototype(name)
    optimized = copy.deepcopy(model)
    report = attnkern.optimize(optimized, strict=True)
    assert len(report.replaced) == gates
    want, got = oracle(name, train), differentiate(optimized, x, train)
    assert got.keys() == want.keys()
    steepest = max(float(v.abs().max()) for key, v in want.items() if key.startswith("grad of"))
    names = tuple(f"grad of {row.name}." for row in report.replaced)
    live = []
    for key, value in want.items():
        scale = float(value.abs().max())
        # zero but for rounding: the gradient of a bias that a norm takes away
        floor = 1e-10 * steepest if key.startswith("grad of") else 1e-12
        torch.testing.assert_close(
            *(got[key], value),
            rtol=1e-7,
            atol=1e-7 * scale + floor,
            msg=lambda m, key=key: f"{key}: {m}",
        )
        if key.startswith(names):
            live.append(scale > floor)
    assert sum(live) > len(live) / 2 > 0, "the comparison is nearly empty"


@pytest.mark.parametrize("target", GATES, ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NETWORKS)
def test_float32_errors_are_within_the_budget(name, train, target):
    model, x, _ = prototype(name)
    model = copy.deepcopy(model).float()
    optimized = copy.deepcopy(model)
    attnkern.optimize(optimized, impl=target.impl)
    eager = differentiate(model, x, train, device=target.device)
    # a network's rounding moves with the order of sums alone: eager's error is the larger of two inputs
    near = x * (1 + torch.finfo(torch.float32).eps)
    other = differentiate(model, near, train, device=target.device)
    got, want = differentiate(optimized, x, train, device=target.device), oracle(name, train)

    def parameters(result):
        return torch.cat([v.flatten() for k, v in result.items() if k.startswith("grad of")])

    for key in ("output", "grad of x"):
        assert min(testing.error_ratio(got[key], e[key], want[key]) for e in (eager, other)) <= 2
    ratios = [testing.error_ratio(*map(parameters, (got, e, want))) for e in (eager, other)]
    assert min(ratios) <= 2, "parameter gradients"


@pytest.mark.parametrize("name", NETWORKS)
def test_training_goes_the_same_way(name):
    """Parameters and statistics after some steps of SGD, in training and evaluation by turns."""
    prototyped, x, _ = prototype(name)
    nets = [copy.deepcopy(prototyped) for _ in range(2)]
    attnkern.optimize(nets[1], strict=True)
    for net in nets:
        optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)
        for step in range(4):
            optimizer.zero_grad()
            net.train(step != 2)(x).square().mean().backward()
            optimizer.step()
    for (key, want), got in zip(
        nets[0].state_dict().items(), nets[1].state_dict().values(), strict=True
    ):
        torch.testing.assert_close(
            got, want, rtol=1e-6, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}"
        )
    assert not torch.equal(next(nets[0].parameters()), next(prototyped.parameters())), (
        "nothing was learnt"
    )
