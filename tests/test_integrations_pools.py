"""Real networks with pooling heads: outputs and gradients of the optimized equal the untouched one's."""

import copy

import pytest
import timm
import torch
from test_integrations import differentiate
from timm.layers import AttentionPool2d, AttentionPoolLatent, GlobalContext
from torch import nn

import attnkern

TINY = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 48, "num_heads": 3}


def open_clip():
    library = pytest.importorskip("open_clip.modified_resnet")
    return library.ModifiedResNet([1, 1, 1, 1], output_dim=16, heads=4, image_size=64, width=8)


def mil():
    nets = pytest.importorskip("monai.networks.nets")
    return nets.MILModel(3, mil_mode="att", pretrained=False, backbone="resnet18")


NETWORKS = {
    "resnet50_clip": (
        lambda: timm.create_model("resnet50_clip", num_classes=10),
        (2, 3, 64, 64),
        1,
    ),
    "siglip": (
        lambda: timm.create_model("vit_base_patch16_siglip_224", **TINY, num_classes=5),
        (2, 3, 32, 32),
        1,
    ),
    "gcresnext": (lambda: timm.create_model("gcresnext26ts", num_classes=10), (2, 3, 64, 64), 8),
    "open_clip": (open_clip, (2, 3, 64, 64), 1),
    "MILModel": (mil, (2, 3, 3, 32, 32), 1),
}


# the large ones in one mode: their heads have no other
@pytest.mark.parametrize(
    ("name", "train"),
    [(n, False) for n in NETWORKS if n != "gcresnext"]
    + [(n, True) for n in NETWORKS if n != "resnet50_clip"],
)
def test_float64_outputs_gradients_and_buffers_are_equal(name, train):
    make, shape, heads = NETWORKS[name]
    torch.manual_seed(0)
    model = make()
    x = torch.randn(shape, dtype=torch.float64)
    for parameter in model.parameters():
        if not parameter.any():  # a scorer, bias or last weight that starts at zero hides the pool
            nn.init.normal_(parameter, std=0.3)
    model = model.double()
    for module in model.modules():  # statistics that keep the signal alive in eval mode
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    optimized = copy.deepcopy(model)
    report = attnkern.optimize(optimized, strict=True)
    assert len(report.replaced) == heads
    want = differentiate(model, x, train)
    got = differentiate(optimized, x, train)
    assert got.keys() == want.keys()
    steepest = max(float(v.abs().max()) for key, v in want.items() if key.startswith("grad of"))
    names = [row.name for row in report.replaced]
    live = []
    for key, value in want.items():
        scale = float(value.abs().max())
        # zero but for rounding: the gradient of a bias that a softmax or a norm takes away
        floor = 1e-10 * steepest if key.startswith("grad of") else 1e-12
        torch.testing.assert_close(
            *(got[key], value),
            rtol=1e-7,
            atol=1e-7 * scale + floor,
            msg=lambda m, key=key: f"{key}: {m}",
        )
        if name != "MILModel" and key.startswith(tuple(f"grad of {n}." for n in names)):
            live.append(scale > floor)
    assert name == "MILModel" or sum(live) > len(live) / 2 > 0, "the comparison is nearly empty"


SAMPLE = """
resnet50_clip resnet101_clip resnet50x4_clip vit_base_patch16_siglip_224
vit_so150m_patch16_reg4_map_256 vit_pe_core_tiny_patch16_384 naflexvit_base_patch16_map
gcresnet33ts gcresnet50t gcresnext26ts gcresnext50ts
"""
POOLS = (AttentionPool2d, AttentionPoolLatent, GlobalContext)


def test_coverage_of_timm():
    """Every pooling head is replaced."""
    known = set(timm.list_models())
    names = [name for name in SAMPLE.split() if name in known]
    assert len(names) >= 9
    kinds = set()
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name)
        report = attnkern.optimize(model, dry_run=True)
        present = {n for n, m in model.named_modules() if isinstance(m, POOLS)}
        assert present <= {row.name for row in report.replaced}, (name, report.skipped)
        kinds |= {row.class_name for row in report.replaced}
    assert kinds >= {cls.__name__ for cls in POOLS}
