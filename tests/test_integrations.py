"""Real networks: outputs and gradients of the optimized model equal the untouched one's."""

import copy
import functools

import pytest
import timm
import timm.layers.activations as timm_acts
import timm.layers.activations_me as timm_acts_me
import torch
import torchvision
from timm.layers.squeeze_excite import EffectiveSEModule, SEModule
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.senet import SEModule as LegacySEModule
from torch import nn
from torchvision.ops.misc import SqueezeExcitation

import attnkern
from attnkern import _activations, testing

SE_CLASSES = (SEModule, EffectiveSEModule, SqueezeExcite, LegacySEModule, SqueezeExcitation)

TIMM = {
    "seresnet18": {"zero_init_last": False},
    "seresnet50": {"zero_init_last": False},
    "efficientnet_b0": {},
    "regnety_002": {"zero_init_last": False},
    "mobilenetv3_small_100": {},
    "ese_vovnet19b_dw": {},
    "legacy_seresnet18": {},
}
TORCHVISION = ("mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf")
MODELS = [*TIMM, *(f"torchvision.{name}" for name in TORCHVISION)]
SMALL = ["seresnet18", "mobilenetv3_small_100", "torchvision.mobilenet_v3_small"]


def build(name, **options):
    """A seeded float64 model whose gates vary, with biases on both sides of every kink."""
    torch.manual_seed(0)
    library, _, arch = name.rpartition(".")
    if library == "torchvision":
        model = torchvision.models.get_model(arch, weights=None)
    else:
        model = timm.create_model(arch, **TIMM[arch], **options)
    for module in model.modules():
        if isinstance(module, SE_CLASSES):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=1.0 if parameter.dim() == 1 else 0.3)
    model = model.double()
    for module in model.modules():  # statistics that keep the signal alive in eval mode
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(images())
    return model


@functools.cache
def prototype(name):
    return build(name)


@functools.cache
def images():
    return torch.randn(
        2, 3, 40, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


def differentiate(model, x, train, device="cpu", channels_last=False):
    """Output, input gradient, parameter gradients and buffers, all from the same seeds."""
    dtype = next(model.parameters()).dtype
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(device, memory_format=layout).train(train)
    model.zero_grad()  # a second call would add to the gradients of the first, in place
    x = x.to(device, dtype, memory_format=layout).detach().requires_grad_()
    torch.manual_seed(2)  # drop path, dropout
    y = model(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y.backward(dy.to(y))
    result = {"output": y.detach(), "grad of x": x.grad}
    result |= {f"grad of {name}": p.grad for name, p in model.named_parameters()}
    return result | {name: b.clone() for name, b in model.named_buffers()}


@functools.cache
def oracle(name, train):
    return differentiate(without_dropout(copy.deepcopy(prototype(name))), images(), train)


def without_dropout(model):
    """Random draws of different dtypes need not agree: none where dtypes are compared."""
    for module in model.modules():
        if hasattr(module, "p") and isinstance(
            module, (nn.Dropout, torchvision.ops.StochasticDepth)
        ):
            module.p = 0.0
    return model


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_float64_outputs_gradients_and_buffers_are_equal(name, train):
    options = {} if "." in name or name.startswith(("ese", "legacy")) else {"drop_path_rate": 0.3}
    model = build(name, **options)
    optimized = copy.deepcopy(model)
    report = attnkern.optimize(optimized, strict=True)
    names = [n for n, m in model.named_modules() if isinstance(m, SE_CLASSES)]
    assert len(names) == sum(row.op == "squeeze_excite" for row in report.replaced) > 0
    want = differentiate(model, images(), train)
    got = differentiate(optimized, images(), train)
    assert got.keys() == want.keys()
    live = []
    steepest = max(float(v.abs().max()) for key, v in want.items() if key.startswith("grad of"))
    for key, value in want.items():
        scale = float(value.abs().max())
        # zero but for rounding: a mean of normalised maps, the gradient of a bias before one
        floor = 1e-10 * steepest if key.startswith("grad of") else 1e-12
        torch.testing.assert_close(
            *(got[key], value),
            rtol=1e-7,
            atol=1e-7 * scale + floor,
            msg=lambda m, key=key: f"{key}: {m}",
        )
        if key.startswith(tuple(f"grad of {name}." for name in names)):
            live.append(scale > floor)
    assert sum(live) > len(live) / 2 > 0, "the comparison is nearly empty"


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", SMALL)
def test_float32_errors_are_within_the_budget(name, train, channels_last, target):
    model = without_dropout(copy.deepcopy(prototype(name)).float())
    optimized = copy.deepcopy(model)
    attnkern.optimize(optimized, impl=target.impl)
    place = {"device": target.device, "channels_last": channels_last}
    eager = differentiate(model, images(), train, **place)
    # a network's rounding moves by up to ten times with the layout alone: eager's error is the larger
    other = differentiate(
        model, images(), train, device=target.device, channels_last=not channels_last
    )
    got = differentiate(optimized, images(), train, **place)
    want = oracle(name, train)

    def parameters(result):
        return torch.cat([v.flatten() for k, v in result.items() if k.startswith("grad of")])

    for key in ("output", "grad of x"):
        assert got[key].stride() == eager[key].stride()
        ratios = [testing.error_ratio(got[key], e[key], want[key]) for e in (eager, other)]
        assert min(ratios) <= 2, key
    ratios = [testing.error_ratio(*map(parameters, (got, e, want))) for e in (eager, other)]
    assert min(ratios) <= 2, "parameter gradients"


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("Block", [BasicBlock, Bottleneck])
def test_drop_path_drops_the_same_samples(Block, kind, target):
    torch.manual_seed(0)
    drop_path = timm.layers.DropPath(0.5)
    block = Block(64, 64 // Block.expansion, attn_layer="se", drop_path=drop_path)
    block = block.to(target.device, kind)
    optimized = copy.deepcopy(block)
    assert len(attnkern.optimize(optimized, impl=target.impl).replaced) == 2
    x = torch.randn(16, 64, 6, 6).to(target.device, kind)
    torch.manual_seed(1)
    want = block(x)
    after = torch.rand(1)
    torch.manual_seed(1)
    got = optimized(x)
    assert torch.equal(torch.rand(1), after), "the generator moved differently"
    dropped = (want == x.relu()).flatten(1).all(1)
    assert 0 < dropped.sum() < len(x)
    assert torch.equal(got[dropped], want[dropped])
    # eager rounds the gate, the product, the drop-path product and the sum
    bound = 4 * torch.finfo(kind).eps
    torch.testing.assert_close(got, want, rtol=bound, atol=bound * float(want.abs().max()))


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", SMALL)
def test_autocast_keeps_the_dtypes_and_the_budget(name, low, target):
    """Maps in low precision, weights float32, which only eager rounds."""
    model = copy.deepcopy(prototype(name)).float().to(target.device).eval()
    optimized = copy.deepcopy(model)
    attnkern.optimize(optimized, impl=target.impl)
    x = images().float().to(target.device)
    seen = {}

    def note(kind):
        return lambda module, args, out: seen.setdefault(kind, []).append(
            (args[0].dtype, out.dtype)
        )

    for kind, net in (("eager", model), ("ours", optimized)):
        for module in net.modules():
            if isinstance(module, SE_CLASSES) and kind not in seen:
                module.register_forward_hook(note(kind))
    with torch.no_grad(), torch.autocast(target.device, low):
        eager, got = model(x), optimized(x)
    assert seen["eager"] == seen["ours"]
    assert got.dtype == eager.dtype
    assert testing.error_ratio(got, eager, oracle(name, False)["output"]) <= 2


# ------------------------------------------------------------------ activations


def _instances():
    plain = [
        nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU, nn.Mish, nn.PReLU,
        nn.LeakyReLU,
        timm_acts.Swish, timm_acts.Mish, timm_acts.HardSwish, timm_acts.GELU, timm_acts.PReLU,
        timm_acts_me.SwishMe, timm_acts_me.MishMe,
    ]  # fmt: skip
    acts = [cls() for cls in plain] + [nn.LeakyReLU(0.3), nn.PReLU(8)]
    gates = [
        nn.Sigmoid(), nn.Hardsigmoid(), nn.ReLU(), nn.Tanh(), nn.Identity(),
        timm_acts.Sigmoid(), timm_acts.HardSigmoid(), timm_acts.Tanh(),
    ]  # fmt: skip
    return acts, gates


def test_every_mapped_class_is_tried():
    acts, gates = _instances()
    tried = {type(module) for module in (*acts, *gates)}
    names = {_activations.qualified_name(cls) for cls in tried}
    assert tried >= set(_activations._TORCH)
    assert names >= set(_activations._QUALIFIED)


@pytest.mark.parametrize("act", _instances()[0], ids=lambda m: f"{type(m).__module__}.{m}")
def test_activations_mean_what_they_are_mapped_to(act):
    _check_pair(act, nn.Sigmoid())


@pytest.mark.parametrize("gate", _instances()[1], ids=lambda m: f"{type(m).__module__}.{m}")
def test_gates_mean_what_they_are_mapped_to(gate):
    _check_pair(nn.ReLU(), gate)


def _check_pair(act, gate):
    torch.manual_seed(0)
    se = SEModule(16, rd_channels=8)
    se.act, se.gate = act, gate
    for parameter in (*se.fc1.parameters(), *se.fc2.parameters()):
        nn.init.normal_(parameter, std=3.0)  # past ±3 and ±6 on both sides
    se = copy.deepcopy(se).double()
    x = torch.randn(64, 16, 3, 3, dtype=torch.float64)
    optimized = copy.deepcopy(se)
    attnkern.optimize(optimized, strict=True)
    want = differentiate(se, x, True)
    for key, value in differentiate(optimized, x, True).items():
        torch.testing.assert_close(value, want[key], msg=lambda m, key=key: f"{key}: {m}")


# ------------------------------------------------------------------ coverage

# every family that has squeeze-and-excitation, and some that have none
SAMPLE = """
cs3sedarknet_l efficientnet_b1_pruned efficientnet_es efficientnetv2_rw_t efficientvit_m0
ese_vovnet39b fastvit_t8 fbnetv3_b gcresnet33ts gcvit_xxtiny ghostnet_100 hardcorenas_a
lcnet_050 legacy_senet154 legacy_seresnext26_32x4d maxvit_rmlp_pico_rw_256 mixnet_s mnasnet_100
mobilenetv3_large_100 mobilenetv3_rw mobileone_s4 nfnet_l0 nf_seresnet26 rdnet_tiny regnety_004
regnetz_b16 regnetv_040 repghostnet_050 repvit_m1 rexnet_100 rexnetr_100 resnest14d sedarknet21
semnasnet_075 seresnet33ts seresnet34 seresnext26d_32x4d seresnextaa101d_32x8d skresnet18
spnasnet_100 tf_efficientnet_lite0 tf_efficientnetv2_b0 tf_mobilenetv3_small_minimal_100
tinynet_e tresnet_m xcit_nano_12_p8_224 vovnet39a convnextv2_atto cspresnet50 dla34 densenet121
eca_nfnet_l0 ecaresnet26t eca_botnext26ts_256 halonet26t hgnet_tiny hrnet_w18 inception_v4
levit_128s mobilevitv2_050 resnet10t resnetblur50 shvit_s1 selecsls42 seresnet152d
"""


def test_coverage_of_timm():
    """Every SE module is replaced, or named with a reason: a BatchNorm between its layers."""
    known = set(timm.list_models())
    names = [name for name in SAMPLE.split() if name in known]
    assert len(names) >= 60
    counts = {"replaced": 0, "skipped": 0, "fused": 0}
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name)
        report = attnkern.optimize(model, dry_run=True)
        replaced = {row.name for row in report.replaced if row.op == "squeeze_excite"}
        skipped = {row.name: row.reason for row in report.skipped}
        present = {n for n, m in model.named_modules() if isinstance(m, SE_CLASSES)}
        assert replaced | set(skipped) == present, name
        assert not replaced & set(skipped), name
        for reason in skipped.values():
            assert name.startswith("rexnet"), (name, reason)
            assert reason.endswith("BatchNorm2d stands between its layers"), (name, reason)
        assert not any("forward" in m.__dict__ for m in model.modules()), (
            "dry_run touched the model"
        )
        counts["replaced"] += len(replaced)
        counts["skipped"] += len(skipped)
        counts["fused"] += len(report.replaced) - len(replaced)
    assert counts["replaced"] > 500, counts
    assert counts["fused"] > 50, counts
    assert 0 < counts["skipped"] < 50, counts
