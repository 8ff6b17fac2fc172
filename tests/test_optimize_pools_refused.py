"""Pooling heads that the drop-in rules leave alone: each is named, with the reason."""

import functools

import pool_modules as copied
import pytest
import torch
from pool_heads import HEADS, mil
from test_optimize import traces
from timm.layers import AttentionPool2d, AttentionPoolLatent, GlobalContext, RotAttentionPool2d
from torch import nn

import attnkern


class OwnForward(AttentionPoolLatent):
    def forward(self, x, attn_mask=None):
        return x.mean(1)


class OwnScorer(copied.Attn_Net_Gated):
    def forward(self, x):
        return -super().forward(x)[0], x


class Sharper(nn.Module):
    """Show-Attend-Tell's children in another formula."""

    def __init__(self):
        super().__init__()
        vars(self).update(vars(copied.Attention()))

    def forward(self, x, h):
        e = self.full_att(self.relu(self.encoder_att(x) + self.decoder_att(h).unsqueeze(1)))
        alpha = self.softmax(2 * e.squeeze(2))
        return (x * alpha.unsqueeze(2)).sum(1), alpha


class Remembering(nn.Module):
    """A copy that keeps its scores for a picture."""

    def __init__(self):
        super().__init__()
        vars(self).update(vars(copied.Attn_Net()))

    def forward(self, x):
        self.scores = self.module(x)
        return self.scores, x


class ScoresAlone(nn.Module):
    def __init__(self):
        super().__init__()
        vars(self).update(vars(copied.Attn_Net_Gated()))

    def forward(self, x):
        return self.attention_c(self.attention_a(x) * self.attention_b(x))


class Weighted(copied.CLAM_SB):
    """A copy whose forward looks like CLAM's and is not."""

    forward = copied.clam_forward(lambda self, M: self.classifiers(M + M))


class MoreArguments(copied.CLAM_SB):
    def forward(self, h, label=None, instance_eval=False, coords=None):
        return copied.CLAM_SB.forward(self, h, label, instance_eval)


def hooked(model, child):
    model.get_submodule(child).register_forward_hook(lambda *_: None)
    return model


def swapped(model, child, value):
    setattr(model, child, value)
    return model


REFUSED = {
    "own forward": (lambda: OwnForward(32), "OwnForward has its own forward"),
    "own scorer": (OwnScorer, "OwnScorer has its own forward"),
    "another formula": (Sharper, "gives other results than Show, Attend and Tell's Attention"),
    "another result": (ScoresAlone, "gives other results than CLAM's Attn_Net_Gated"),
    "side effects": (Remembering, "does other things than CLAM's Attn_Net"),
    "all tokens": (lambda: AttentionPool2d(32, 3, head_dim=8, pool_type=""), "keeps every token"),
    "all rotated tokens": (
        lambda: RotAttentionPool2d(32, 3, head_dim=8, pool_type=""),
        "keeps every token",
    ),
    "mean context": (lambda: GlobalContext(32, use_attn=False), "use_attn=False"),
    "mean": (lambda: mil("mean"), "mil_mode='mean'"),
    "hooked kv": (lambda: hooked(HEADS["latent"][0](), "kv"), "its kv has hooks"),
    "hooked proj": (lambda: hooked(HEADS["pool2d"][0](), "proj"), "its proj has hooks"),
    "hooked context": (lambda: hooked(GlobalContext(32), "conv_attn"), "convolution has hooks"),
    "hooked tanh": (lambda: hooked(copied.Attn_Net(), "module.1"), "its activation has hooks"),
    "hooked branch": (lambda: hooked(copied.Attn_Net_Gated(), "attention_a"), "branch has hooks"),
    "hooked lazy": (lambda: hooked(copied.AttentionPool(), "fc1"), "its layer has hooks"),
    "hooked attention": (lambda: hooked(mil("att"), "attention"), "its attention has hooks"),
    "hooked keys": (lambda: hooked(copied.Attention(), "encoder_att"), "encoder_att has hooks"),
    "odd norm": (
        lambda: swapped(HEADS["latent"][0](), "k_norm", nn.BatchNorm2d(4)),
        "its k_norm is a BatchNorm2d",
    ),
    "softmax dim": (
        lambda: swapped(copied.Attention(), "softmax", nn.Softmax(dim=0)),
        "its softmax is over dim 0",
    ),
    "activation": (lambda: swapped(copied.Attention(), "relu", nn.ELU()), "activation ELU"),
    "replaced": (
        lambda: swapped(GlobalContext(32), "forward", functools.partial(torch.relu)),
        "its forward was replaced",
    ),
    "replaced head": (lambda: swapped(mil("att"), "calc_head", torch.relu), "calc_head"),
}


BAGS = {
    "other logits": (Weighted, "gives other results than CLAM's CLAM_SB or CLAM_MB"),
    "other arguments": (MoreArguments, "MoreArguments has its own forward"),
    "hooked scorer": (lambda: hooked(copied.CLAM_SB(), "attention_net.3"), "its scorer has hooks"),
    "hooked layers": (
        lambda: hooked(copied.CLAM_SB(), "attention_net"),
        "its attention_net has hooks",
    ),
}


@pytest.mark.parametrize(("make", "reason"), BAGS.values(), ids=BAGS)
def test_of_a_clam_that_is_not_served_whole_the_scorer_is(make, reason):
    report = attnkern.optimize(nn.ModuleList([make()]), impl="reference")
    assert [row.name for row in report.replaced] == ["0.attention_net.3"]
    (row,) = report.skipped
    assert (row.name, reason in row.reason) == ("0", True), row.reason


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


def test_wrappers_are_no_scorers():
    """Whatever has one child called ``module``."""
    nets = [nn.DataParallel(nn.Linear(3, 3)), torch.optim.swa_utils.AveragedModel(nn.Linear(3, 3))]
    for net in nets:
        report = attnkern.optimize(net)
        assert (report.replaced, report.skipped) == ([], [])
