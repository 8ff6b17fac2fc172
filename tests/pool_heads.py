"""Every module whose forward the pooling rules replace, small, by name; and how two of them are compared."""

import pool_modules as copied
import pytest
import torch
from timm.layers import (
    AttentionPool2d,
    AttentionPoolLatent,
    GlobalContext,
    RmsNorm,
    RotAttentionPool2d,
)
from torch import nn

from attnkern import testing


class Flat(nn.Module):
    """A backbone for MILModel."""

    def forward(self, x):
        return x.flatten(1)


def mil(mode):
    nets = pytest.importorskip("monai.networks.nets")
    return nets.MILModel(2, mil_mode=mode, backbone=Flat(), backbone_num_features=24)


def open_clip_pool():
    return pytest.importorskip("open_clip.modified_resnet").AttentionPool2d(3, 32, 4, 10)


HEADS = {
    "latent": (lambda: AttentionPoolLatent(32, num_heads=4, norm_layer=nn.LayerNorm), (3, 9, 32)),
    "latents": (
        lambda: AttentionPoolLatent(
            32, 24, num_heads=2, latent_len=3, pos_embed="abs", feat_size=9, pool_type="avg",
        ),
        (3, 9, 32),
    ),
    "latent without projections": (
        lambda: AttentionPoolLatent(32, 0, q_proj=False, qkv_bias=False, pool_type=""),
        (3, 9, 32),
    ),
    "normalised keys": (
        lambda: AttentionPoolLatent(32, num_heads=4, qk_norm=True, norm_layer=RmsNorm),
        (3, 9, 32),
    ),
    "pool2d": (lambda: AttentionPool2d(32, 3, 10, head_dim=8), (3, 32, 3, 3)),
    "pool2d resampled": (
        lambda: AttentionPool2d(32, 3, 0, embed_dim=32, head_dim=8, qkv_separate=True, class_token=True),
        (3, 32, 4, 5),
    ),
    "rotary": (lambda: RotAttentionPool2d(32, 10, 3, head_dim=8), (3, 32, 3, 3)),
    "rotary resampled": (
        lambda: RotAttentionPool2d(32, 0, 3, num_heads=4, qkv_separate=True, class_token=True, rope_type="base"),
        (3, 32, 4, 5),
    ),
    "rotary halves": (
        lambda: RotAttentionPool2d(32, 6, 3, 128, num_heads=2, qkv_bias=False, rope_type="mrope"),
        (3, 32, 4, 5),
    ),
    "global context": (lambda: GlobalContext(32), (3, 32, 4, 5)),
    "global context added": (
        lambda: GlobalContext(32, fuse_add=True, gate_layer="hard_sigmoid"),
        (3, 32, 4, 5),
    ),
    "open_clip": (open_clip_pool, (3, 32, 3, 3)),
    "clip": (lambda: copied.OpenAIAttentionPool2d(3, 32, 4, 10), (3, 32, 3, 3)),
    "clam plain": (lambda: copied.CLAM(gate=False), (40, 24)),
    "clam gated": (lambda: copied.CLAM(dropout=0.1), (40, 24)),
    "clam branches": (lambda: copied.CLAM(n_classes=3), (40, 24)),
    "clam bags": (lambda: copied.Slide(copied.CLAM_SB(dropout=0.1)), (40, 24)),
    "clam bags of branches": (lambda: copied.Slide(copied.CLAM_MB(gate=False)), (40, 24)),
    "torchmil": (lambda: copied.AttentionPool(act="gelu"), (3, 9, 24)),
    "torchmil gated": (lambda: copied.AttentionPool(gated=True), (3, 9, 24)),
    "monai": (lambda: mil("att"), (3, 9, 2, 3, 4)),
    "monai transformer": (lambda: mil("att_trans"), (3, 9, 2, 3, 4)),
    "captioning": (copied.Decoder, (4, 9, 24)),
}  # fmt: skip


def head(name, dtype=torch.float32):
    """The seeded module in eval mode, and its input."""
    torch.manual_seed(0)
    make, shape = HEADS[name]
    model = make()
    for parameter in model.parameters():
        if parameter.dim() == 1 or not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return model.to(dtype).eval(), x.to(dtype)


def gradients(model, x, **options):
    x = x.detach().clone().requires_grad_()
    outputs = testing.as_tuple(model(x, **options))
    dy = testing.noise_like(outputs)
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(outputs, inputs, dy, allow_unused=True, materialize_grads=True)
    return [*outputs, *grads]


def close(got, want, tolerance=1e-4):
    assert len(got) == len(want)
    steepest = max(float(w.detach().abs().max()) for w in want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * steepest)
