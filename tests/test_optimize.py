"""``optimize`` and ``restore``: what they serve, what they leave alone and name, and the report."""

import copy
import functools
import subprocess
import sys
import warnings

import pytest
import timm
import torch
import torch._dynamo.utils
import torch.nn.functional as F
import torch.nn.utils.prune
from timm.layers.squeeze_excite import EffectiveSEModule, SEModule
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.senet import SEResNetBlock
from torch import nn
from torchvision.models.quantization.mobilenetv3 import QuantizableSqueezeExcitation
from torchvision.ops.misc import SqueezeExcitation

import attnkern
from attnkern import _once
from attnkern.nn import SqueezeExcite

BLOCKS = {
    "basic": lambda: BasicBlock(16, 16, attn_layer="se"),
    "effective": lambda: BasicBlock(16, 16, attn_layer="ese"),
    "bottleneck": lambda: Bottleneck(16, 4, attn_layer="se"),
    "legacy": lambda: SEResNetBlock(16, 16, groups=1, reduction=4),
    "dressed": lambda: Bottleneck(
        *(16, 8),
        stride=2,
        attn_layer="se",
        aa_layer=nn.AvgPool2d,
        drop_block=lambda: nn.Dropout(0.5),
        drop_path=timm.layers.DropPath(0.3),
        downsample=nn.Conv2d(16, 32, 1, stride=2),
    ),
}
MODULES = {
    "timm": lambda: SEModule(16),
    "effective": lambda: EffectiveSEModule(16),
    "efficientnet": lambda: timm.models._efficientnet_blocks.SqueezeExcite(16),
    "legacy": lambda: timm.models.senet.SEModule(16, 4),
    "torchvision": lambda: SqueezeExcitation(16, 4),
}


def seeded(make):
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    return model


def image(*shape, **options):
    return torch.randn(*(shape or (4, 16, 6, 6)), generator=torch.Generator().manual_seed(1)).to(
        **options
    )


def outcome(model, x):
    """Output and every gradient."""
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(2)
    y = model(x)
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    return [y, *torch.autograd.grad(y, inputs, dy)]


def close(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.detach().abs().max()))


def traces(model):
    return {name: dict(vars(module)) for name, module in model.named_modules()}


# ------------------------------------------------------------------ the report


def test_report_names_what_was_done_and_what_was_not():
    model = nn.ModuleDict(
        {
            "fused": BasicBlock(16, 16, attn_layer="se"),
            "silu": BasicBlock(16, 16, attn_layer="se", act_layer=nn.SiLU),
            "bn": SEModule(16, norm_layer=nn.BatchNorm2d),
            "elu": SEModule(16, act_layer=nn.ELU),
            "other": nn.Conv2d(3, 3, 1),
        }
    )
    report = attnkern.optimize(model, impl="reference")
    assert [(row.name, row.class_name, row.op, row.implementation) for row in report.replaced] == [
        ("fused", "BasicBlock", "squeeze_excite(residual, relu)", "reference"),
        ("fused.se", "SEModule", "squeeze_excite", "reference"),
        ("silu.se", "SEModule", "squeeze_excite", "reference"),
    ]
    assert [row.reason for row in report.replaced] == [
        *("", ""),
        "not fused with silu: its last activation is SiLU, not ReLU",
    ]
    assert [(row.name, row.implementation, row.reason) for row in report.skipped] == [
        ("bn", "", "a BatchNorm2d stands between its layers"),
        ("elu", "", "its activation ELU(alpha=1.0, inplace=True) is not supported"),
    ]
    text = str(report).splitlines()
    assert text[0] == "attnkern.optimize: 3 replaced, 2 left alone"
    assert text[1].split() == ["name", "class", "op", "implementation", "reason"]
    assert len(text) == 3 + 5
    assert report._repr_html_().count("<tr>") == 6
    assert "&" not in report._repr_html_()


def test_report_escapes_html_and_can_be_empty():
    class Odd(SEModule):
        def forward(self, x):
            return x

    Odd.__name__ = "<b>"
    assert "&lt;b&gt;" in attnkern.optimize(nn.Sequential(Odd(16)))._repr_html_()
    empty = attnkern.optimize(nn.Conv2d(3, 3, 1))
    assert str(empty) == "attnkern.optimize: 0 replaced, 0 left alone"


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_the_model_itself_may_be_the_module(make):
    report = attnkern.optimize(make(), impl="reference")
    assert [row.name for row in report.replaced] == ["(model)"]


def test_a_shared_module_is_served_once():
    se = SEModule(16)
    assert len(attnkern.optimize(nn.Sequential(se, se), impl="reference").replaced) == 1


REFUSED = {
    "add_maxpool": (lambda: SEModule(16, add_maxpool=True), "add_maxpool=True"),
    "effective add_maxpool": (lambda: EffectiveSEModule(16, add_maxpool=True), "add_maxpool=True"),
    "norm": (lambda: SEModule(16, norm_layer=nn.BatchNorm2d), "a BatchNorm2d stands between"),
    "gelu tanh": (lambda: SEModule(16, act_layer=functools.partial(nn.GELU, "tanh")), "GELU"),
    "negative slope": (lambda: SEModule(16, act_layer=lambda: nn.LeakyReLU(-0.1)), "LeakyReLU"),
    "inexact at the kinks": (
        lambda: SEModule(16, gate_layer=timm.layers.activations_me.HardSigmoidMe),
        "its gate HardSigmoidMe",
    ),
    "gate": (lambda: SEModule(16, gate_layer=nn.SiLU), "its gate SiLU"),
    "no act": (lambda: _with(SEModule(16), "act", None), "its activation NoneType is not"),
    "pooling": (
        lambda: _with(SqueezeExcitation(16, 4), "avgpool", nn.AdaptiveMaxPool2d(1)),
        "pooling",
    ),
    "kernel": (lambda: _with(SEModule(16), "fc1", nn.Conv2d(16, 8, 3, padding=1)), "plain 1x1"),
    "stride": (lambda: _with(SEModule(16), "fc1", nn.Conv2d(16, 8, 1, stride=2)), "plain 1x1"),
    "groups": (lambda: _with(SEModule(16), "fc1", nn.Conv2d(16, 8, 1, groups=2)), "2 groups"),
    "wrapped": (
        lambda: _with(SEModule(16), "fc1", nn.Sequential(nn.Conv2d(16, 8, 1))),
        "Sequential",
    ),
    "quantizable": (lambda: QuantizableSqueezeExcitation(16, 4), "has its own forward"),
    "own forward": (lambda: OwnForward(16), "OwnForward has its own forward"),
    "own scale": (lambda: OwnScale(16, 4), "OwnScale has its own _scale"),
    "instance scale": (lambda: _with(SqueezeExcitation(16, 4), "_scale", len), "its own _scale"),
    "another version": (lambda: OTHER_VERSION(16), "this version of timm.layers.squeeze_excite"),
    "replaced forward": (
        lambda: _with(SEModule(16), "forward", functools.partial(F.relu)),
        "its forward was replaced by torch.nn.functional.relu",
    ),
    "replaced child": (
        lambda: _child(SEModule(16), "gate", lambda m: _with(m, "forward", torch.tanh)),
        "its gate Sigmoid has a replaced forward",
    ),
    "parametrized": (
        lambda: _child(SEModule(16), "fc2", nn.utils.parametrizations.weight_norm),
        "ParametrizedConv2d",
    ),
    "weight_norm": (
        lambda: _child(SEModule(16), "fc1", old_weight_norm),
        "1x1 convolution has hooks",
    ),
    "pruned": (
        lambda: _child(
            SEModule(16), "fc1", lambda m: nn.utils.prune.random_unstructured(m, "weight", 0.5)
        ),
        "1x1 convolution has hooks",
    ),
}


class OwnForward(SEModule):
    def forward(self, x):
        return x


class OwnScale(SqueezeExcitation):
    def _scale(self, input):
        return input


class Renamed(SEModule):
    pass


def _another_version(self, x):
    return self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True))))) * x


OTHER_VERSION = type("SEModule", (SEModule,), {"forward": _another_version})
OTHER_VERSION.__module__ = SEModule.__module__


def old_weight_norm(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module)


def _with(module, name, value):
    setattr(module, name, value)
    return module


def _child(module, name, change):
    change(getattr(module, name))
    return module


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_served_is_named_and_left_alone(make, reason):
    model = nn.Sequential(SEModule(16), make())
    before = traces(model)
    with pytest.raises(ValueError, match=r"1 modules cannot be served:\n  1 \(.*\): .*") as error:
        attnkern.optimize(model, strict=True)
    assert reason in str(error.value)
    assert traces(model) == before
    report = attnkern.optimize(model)
    assert [row.name for row in report.replaced] == ["0"]
    assert [row.name for row in report.skipped] == ["1"]
    assert reason in report.skipped[0].reason
    after = traces(model)
    assert all(after[name] == before[name] for name in before if name.startswith("1"))


def test_a_subclass_without_its_own_forward_is_served():
    module = seeded(lambda: Renamed(16))
    want = outcome(module, image())
    assert [row.class_name for row in attnkern.optimize(module, strict=True).replaced] == [
        "Renamed"
    ]
    close(outcome(module, image()), want)


# ------------------------------------------------------------------ errors, dry run, twice, restore


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"optimize: model must be a torch.nn.Module, got str"):
        attnkern.optimize("resnet50")
    with pytest.raises(TypeError, match=r"restore: model must be a torch.nn.Module, got dict"):
        attnkern.restore({})
    with pytest.raises(ValueError, match=r"optimize: impl must be one of auto, .*, got 'cuda'"):
        attnkern.optimize(nn.Identity(), impl="cuda")


def test_an_explicit_implementation_that_cannot_serve_raises_before_anything_is_touched():
    model = nn.Sequential(SEModule(16), SEModule(16, device="meta"))
    before = traces(model)
    with pytest.raises(ValueError, match=r"impl='triton' cannot serve torch.float32 on meta"):
        attnkern.optimize(model, impl="triton")
    assert traces(model) == before


@pytest.mark.parametrize("make", [*MODULES.values(), *BLOCKS.values()], ids=[*MODULES, *BLOCKS])
def test_dry_run_optimize_twice_and_restore(make):
    model = seeded(make).eval()
    before, keys = traces(model), list(model.state_dict())
    want = outcome(model, image())
    dry = attnkern.optimize(model, impl="reference", dry_run=True)
    assert traces(model) == before
    first = attnkern.optimize(model, impl="reference")
    assert first == dry
    once = outcome(model, image())
    close(once, want)
    changed = {name for name, now in traces(model).items() if now != before[name]}
    assert changed == {"" if row.name == "(model)" else row.name for row in first.replaced}
    assert list(model.state_dict()) == keys
    assert attnkern.optimize(model, impl="reference") == first
    assert all(torch.equal(a, b) for a, b in zip(outcome(model, image()), once, strict=True))
    attnkern.restore(model)
    assert traces(model) == before
    assert all(torch.equal(a, b) for a, b in zip(outcome(model, image()), want, strict=True))
    attnkern.restore(model)


def test_a_second_optimize_may_change_the_implementation():
    model = SEModule(16)
    attnkern.optimize(model, impl="reference")
    attnkern.optimize(model, impl="auto")
    assert model.forward.keywords == {"impl": "auto"}


def test_restore_leaves_what_others_replaced():
    model = nn.Sequential(SEModule(16), SEModule(16))
    model[1].forward = theirs = functools.partial(F.relu)
    attnkern.optimize(model)
    attnkern.restore(model)
    assert "forward" not in vars(model[0])
    assert model[1].forward is theirs


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_blocks_match_in_training_and_evaluation(make, train, target):
    model = seeded(make).to(target.device).train(train)
    optimized = copy.deepcopy(model)
    report = attnkern.optimize(optimized, impl=target.impl)
    assert [row.op for row in report.replaced] == [
        "squeeze_excite(residual, relu)",
        "squeeze_excite",
    ]
    x = image(device=target.device)
    close(outcome(optimized, x), outcome(model, x))
    for a, b in zip(optimized.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------ hooks and changes


def _hooks(module, log, where):
    return {
        "forward": lambda: module.register_forward_hook(lambda *_: log.append(where)),
        "forward pre": lambda: module.register_forward_pre_hook(lambda *_: log.append(where)),
        "backward": lambda: module.register_full_backward_hook(lambda *_: log.append(where)),
        "backward pre": lambda: module.register_full_backward_pre_hook(
            lambda *_: log.append(where)
        ),
    }


@pytest.mark.parametrize("kind", ["forward", "forward pre", "backward", "backward pre"])
@pytest.mark.parametrize(
    ("make", "child"),
    [
        *((MODULES["timm"], name) for name in ("fc1", "bn", "act", "fc2", "gate")),
        *((MODULES["torchvision"], name) for name in ("avgpool", "activation", "scale_activation")),
        *(
            (BLOCKS["dressed"], name)
            for name in ("se.fc1", "se", "act3", "drop_path", "conv3", "aa")
        ),
        *((BLOCKS["legacy"], name) for name in ("se_module.sigmoid", "se_module", "relu", "bn1")),
    ],
)
def test_hooks_on_children_run_whenever_they_were_registered(make, child, kind):
    """Before: the module or block is reported; after: it falls back to its own forward."""
    model, x, log = seeded(make), image(), []
    for module in model.modules():
        if kind.startswith("backward") and hasattr(module, "inplace"):
            module.inplace = False  # which torch forbids behind a backward hook
    early, late = copy.deepcopy(model), copy.deepcopy(model)
    attnkern.optimize(late, impl="reference")
    handles = [_hooks(net.get_submodule(child), log, child)[kind]() for net in (model, early, late)]
    attnkern.optimize(early, impl="reference")
    want = _result(lambda: outcome(model, x))
    expected, log[:] = log[:], []
    for net in (early, late):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "was optimized but runs its own forward"
            got = _result(lambda net=net: outcome(net, x))
        assert log == expected
        log.clear()
        if isinstance(want, list):
            assert expected
            close(got, want)
        else:
            assert got == want, "eager refuses: the block adds its shortcut in place"
    for handle in handles:
        handle.remove()
    attnkern.optimize(early, impl="reference")
    close(outcome(late, x), outcome(model, x))
    close(outcome(early, x), outcome(model, x))
    assert not log


@pytest.mark.parametrize(
    ("make", "child", "said"),
    [
        (SEModule, "gate", "SEModule was optimized but runs its own forward: its gate Sigmoid has"),
        (SqueezeExcite, "fc1", "SqueezeExcite is computed layer by layer: its fc1 has hooks"),
    ],
    ids=["optimized", "ours"],
)
def test_a_late_hook_is_said_once_at_the_callers_line(make, child, said, monkeypatch):
    monkeypatch.setattr(_once, "_said", set())
    model = nn.Sequential(make(16))
    attnkern.optimize(model, impl="reference")
    model[0].get_submodule(child).register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=said) as warned:
        model(image())
    assert [w.filename for w in warned] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(image())


@pytest.mark.parametrize("kind", ["forward", "forward pre", "backward", "backward pre"])
def test_hooks_on_the_module_itself_keep_working(kind):
    model, log = SEModule(16), []
    _hooks(model, log, "se")[kind]()
    assert len(attnkern.optimize(model, strict=True).replaced) == 1
    outcome(model, image())
    assert log == ["se"]


def test_global_hooks_see_the_children():
    model, seen = seeded(BLOCKS["bottleneck"]), []
    attnkern.optimize(model, impl="reference")
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        model(image())
    finally:
        handle.remove()
    leaves = [m for m in model.modules() if not list(m.children())]
    assert {id(m) for m in leaves} <= {id(m) for m in seen}


def test_changes_after_optimize_are_honoured():
    model = seeded(MODULES["timm"])
    optimized = copy.deepcopy(model)
    attnkern.optimize(optimized, impl="reference")
    changes = [
        lambda m: _with(m, "act", nn.SiLU()),
        lambda m: _with(m, "gate", nn.Tanh()),
        lambda m: _with(m.fc1, "bias", None),
        lambda m: _with(m, "fc1", nn.utils.parametrizations.spectral_norm(m.fc1)),
        lambda m: _with(m, "act", nn.ELU()),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for change in changes:
            for net in (model, optimized):
                torch.manual_seed(4)
                change(net)
            close(outcome(optimized, image()), outcome(model, image()))


# ------------------------------------------------------------------ inputs: eager's results, errors


def _result(function):
    try:
        return function()
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize(
    "x",
    [
        image(dtype=torch.bfloat16),
        image(dtype=torch.float64),
        image(4, 8, 6, 6),
        image(16, 6, 6),
        image(4, 16, 6),
        image(2, 16, 3, 3, 3),
        image(4, 16, 0, 6),
        image(0, 16, 6, 6),
        image(device="meta"),
        "text",
    ],
    ids=lambda x: f"{x.dtype} {list(x.shape)} {x.device}" if isinstance(x, torch.Tensor) else x,
)
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_unusual_inputs_give_what_eager_gives(make, x):
    model = seeded(make)
    optimized = copy.deepcopy(model)
    attnkern.optimize(optimized)
    want, got = _result(lambda: model(x)), _result(lambda: optimized(x))
    if isinstance(want, torch.Tensor):
        assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
        if not want.is_meta:
            torch.testing.assert_close(got, want)
    else:
        assert got == want


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("maps", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("make", [*MODULES.values(), BLOCKS["basic"]], ids=[*MODULES, "block"])
def test_autocast_gives_the_dtype_or_the_error_of_eager(make, maps, weights, low):
    model = seeded(make).to(weights).eval()
    optimized = copy.deepcopy(model)
    attnkern.optimize(optimized, impl="reference")
    x = image(dtype=maps)
    with torch.no_grad(), torch.autocast("cpu", low):
        want, got = _result(lambda: model(x)), _result(lambda: optimized(x))
    if isinstance(want, torch.Tensor):
        assert got.dtype == want.dtype
        eps = max(torch.finfo(kind).eps for kind in (maps, weights, low))
        torch.testing.assert_close(got.double(), want.double(), rtol=8 * eps, atol=8 * eps)
    else:
        assert got == want


def test_a_shortcut_of_another_dtype_is_added_as_eager_adds_it():
    """Autocast: the first block's shortcut is float32 beside bfloat16 maps."""
    model = seeded(BLOCKS["bottleneck"]).train()
    optimized = copy.deepcopy(model)
    attnkern.optimize(optimized, impl="reference")
    with torch.autocast("cpu", torch.bfloat16):
        want, got = model(image()), optimized(image())
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_importing_attnkern_or_optimizing_a_plain_model_imports_no_library():
    code = """
import sys, torch, attnkern
attnkern.optimize(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1)))
print([name for name in ("timm", "torchvision", "triton.language") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("[]", "['triton.language']"), done.stdout
