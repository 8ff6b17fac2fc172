"""Attention gates that the drop-in rules leave alone: each is named, with the reason."""

import functools
import types

import gate_modules as copied
import pytest
import torch
from gate_blocks import BLOCKS, changed
from test_optimize import traces
from torch import nn

import attnkern


def hooked(name, child):
    model = BLOCKS[name][0]()
    model.get_submodule(child).register_forward_hook(lambda *_: None)
    return model


def shared_norm():
    model = BLOCKS["monai"][0]()
    model.W_g[1] = model.W_x[1]
    return model


class OwnForward(copied.Attention_block):
    def forward(self, g, x):
        return x + super().forward(g, x)


class Negated(copied.Attention_block):
    """The children of the block, in another formula."""

    def forward(self, g, x):
        return x * self.psi(self.relu(self.W_g(g) * self.W_x(x)))


class Swapped(copied.Attention_block):
    """forward(x, g)"""

    def forward(self, x, g):
        return x * self.psi(self.relu(self.W_g(g) + self.W_x(x)))


class Remembering(copied.GridAttentionBlock2D):
    def _concatenation(self, x, g):
        self.alpha = super()._concatenation(x, g)[1]
        return x, self.alpha


class Doubled(copied.AlignedCorners):
    def forward(self, x, g):
        t = self.theta(x) + self.theta(x)
        u = torch.nn.functional.interpolate(self.phi(g), t.shape[2:], mode=self.upsample_mode)
        alpha = torch.sigmoid(self.psi(torch.relu(t + u)))
        alpha = torch.nn.functional.interpolate(alpha, x.shape[2:], mode=self.upsample_mode)
        return self.W(alpha * x), alpha


class Layered(copied.AlignedCorners):
    """A copy whose theta has its norm beside it, and which spells out how it resamples."""

    def __init__(self):
        super().__init__(6, 8)
        self.theta = nn.Sequential(nn.Conv2d(6, 3, 2, 2), nn.BatchNorm2d(3))
        del self.upsample_mode

    def forward(self, x, g):
        t = self.theta(x)
        u = torch.nn.functional.interpolate(self.phi(g), t.shape[2:], mode="bilinear")
        alpha = torch.sigmoid(self.psi(torch.relu(t + u)))
        alpha = torch.nn.functional.interpolate(alpha, x.shape[2:], mode="bilinear")
        return self.W(alpha * x), alpha


class Activated(nn.Module):
    """The classifier's children by another hand."""

    def __init__(self, nl1, **attributes):
        super().__init__()
        self.theta, self.phi, self.psi = (nn.Conv2d(4, n, 1) for n in (4, 4, 1))
        self.nl1 = nl1
        vars(self).update(attributes)

    def forward(self, x, g):
        alpha = torch.sigmoid(self.psi(self.nl1(self.theta(x) + self.phi(g))))
        return alpha * x, alpha


def bound(function):
    model = copied.GridAttentionBlock2D(6, 8)
    model.operation_function = types.MethodType(function, model)
    return model


REFUSED = {
    "layered theta": (Layered, "its theta is a torch.nn.modules.container.Sequential"),
    "no mode": (lambda: Activated(torch.relu), "its mode is None"),
    "builtin activation": (
        lambda: Activated(torch.relu, mode="concatenation_sigmoid"),
        "its nl1 is a builtins.builtin_function_or_method",
    ),
    "builtin operation": (lambda: bound(torch.add), "its operation_function does other things"),
    "strided additive": (
        lambda: changed("monai", "W_x.0.conv", nn.Conv2d(8, 5, 2, 2)),
        "its theta is not a 1x1 convolution",
    ),
    "own forward": (lambda: OwnForward(6, 8, 4), "OwnForward has its own forward"),
    "another formula": (lambda: Negated(6, 6, 4), "gives other results than Image_Segmentation's"),
    "another order": (lambda: Swapped(6, 6, 4), "gives other results than Image_Segmentation's"),
    "side effects": (lambda: Remembering(6, 8), "its operation_function does other things"),
    "another grid": (lambda: Doubled(6, 8), "gives other results than Attention-Gated-Networks'"),
    "mean flow": (
        lambda: copied._GridAttentionBlockND_TORR(4, 4, 2, 2, "concatenation_mean_flow"),
        "its mode is concatenation_mean_flow",
    ),
    "no theta": (
        lambda: copied._GridAttentionBlockND_TORR(
            4, 4, 4, 2, "concatenation_sigmoid", use_theta=False
        ),
        "it has no layer theta",
    ),
    "strided phi": (
        lambda: copied._GridAttentionBlockND_TORR(4, 4, 4, 2, "concatenation_sigmoid", (2, 2)),
        "its phi is not a 1x1 convolution",
    ),
    "impossible": (
        lambda: copied.GridAttentionBlock2D(4, 4, sub_sample_factor=(2, 2, 2)),
        "gives other results",
    ),
    "padded": (
        lambda: changed("grid 2d", "theta", nn.Conv2d(6, 3, 2, 2, padding=1)),
        "its theta is not a plain convolution of whole patches",
    ),
    "grouped": (
        lambda: changed("image segmentation", "W_x.0", nn.Conv2d(8, 4, 1, groups=4)),
        "its theta is not a plain convolution of whole patches",
    ),
    "instance norm": (
        lambda: changed("image segmentation", "W_g.1", nn.InstanceNorm2d(4)),
        "its phi is followed by a torch.nn.modules.instancenorm.InstanceNorm2d",
    ),
    "shared norm": (shared_norm, "its branches share a norm"),
    "softmax": (
        lambda: changed("image segmentation", "psi.2", nn.Softmax(1)),
        "its psi's end is a torch.nn.modules.activation.Softmax",
    ),
    "activation": (
        lambda: changed("monai", "relu", nn.ELU()),
        "its activation ELU is not supported",
    ),
    "three layers": (
        lambda: changed("image segmentation", "W_g", nn.Sequential(*[nn.Conv2d(6, 6, 1)] * 3)),
        "its W_g has 3 layers",
    ),
    "hooked conv": (lambda: hooked("monai", "W_g.0.conv"), "its phi has hooks"),
    "hooked norm": (lambda: hooked("grid", "W.1"), "its out's norm has hooks"),
    "hooked sequence": (lambda: hooked("monai", "psi"), "its psi has hooks"),
    "hooked activation": (lambda: hooked("monai", "relu"), "its activation has hooks"),
    "replaced": (
        lambda: changed("monai", "forward", functools.partial(torch.relu)),
        "its forward was replaced",
    ),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_served_is_named_and_left_alone(make, reason):
    model = nn.ModuleList([make()])
    before = traces(model)
    report = attnkern.optimize(model, impl="reference")
    assert not report.replaced
    assert [row.name for row in report.skipped] == ["0"]
    assert reason in report.skipped[0].reason
    assert traces(model) == before
    with pytest.raises(ValueError, match="1 modules cannot be served"):
        attnkern.optimize(model, strict=True)
