"""``attnkern.nn``: timm's arguments, keys, rounding and state dicts; what every module survives."""

import functools

import pytest
import timm
import torch
from altered_layers import ALTERED, Lora, check, check_observed, observe, outcome, replace
from nn_modules import MODULES, copies, noise
from timm.layers.squeeze_excite import SEModule
from torch import nn
from torch.nn.utils import parametrizations

import attnkern
from attnkern.nn import SqueezeExcite

ARGUMENTS = {
    "default": {},
    "ratio": {"rd_ratio": 0.25},
    "channels": {"rd_channels": 12},
    "divisor": {"rd_ratio": 0.25, "rd_divisor": 4},
    "no bias": {"bias": False},
    "class": {"act_layer": nn.SiLU, "gate_layer": nn.Hardsigmoid},
    "partial": {"act_layer": functools.partial(nn.LeakyReLU, 0.2)},
    "name": {"act_layer": "swish", "gate_layer": "hard_sigmoid"},
    "hard_swish": {"act_layer": "hard_swish", "gate_layer": "hardsigmoid"},
    "prelu": {"act_layer": nn.PReLU},
    "prelu name": {"act_layer": "prelu"},
    "timm act": {"act_layer": timm.layers.activations.Swish, "gate_layer": "tanh"},
    "stock defaults": {"add_maxpool": False, "norm_layer": None},
}


def _pair(channels=64, **options):
    torch.manual_seed(0)
    theirs = SEModule(channels, **options).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    return theirs, SqueezeExcite(channels, **options).double()


@pytest.mark.parametrize("options", ARGUMENTS.values(), ids=ARGUMENTS)
def test_timm_state_dicts_load_both_ways(options):
    theirs, ours = _pair(**options)
    ours.load_state_dict(theirs.state_dict())
    back, _ = _pair(**options)
    for parameter in back.parameters():
        nn.init.zeros_(parameter)
    back.load_state_dict(ours.state_dict())
    x = torch.randn(3, 64, 5, 4, dtype=torch.float64, requires_grad=True)
    want, got = theirs(x), ours(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(back(x), want, rtol=0, atol=0)
    assert want.std() > 0.1
    dy = torch.randn_like(want)
    inputs = lambda m: (x, *(p for _, p in sorted(m.named_parameters())))  # noqa: E731
    for a, b in zip(
        torch.autograd.grad(got, inputs(ours), dy),
        torch.autograd.grad(want, inputs(theirs), dy),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("ratio", [1 / 16, 0.25, 0.1])
def test_hidden_width_is_rounded_as_timm_does(ratio):
    for channels in (1, 7, 27, 96, 200, 360, 1052):
        theirs = SEModule(channels, rd_ratio=ratio, device="meta")
        ours = SqueezeExcite(channels, rd_ratio=ratio, device="meta")
        assert ours.fc1.weight.shape == theirs.fc1.weight.shape, channels
        unset = SqueezeExcite(channels, rd_ratio=ratio, rd_channels=0, device="meta")
        assert unset.fc1.weight.shape == theirs.fc1.weight.shape, channels


def test_positional_arguments_are_in_timms_order():
    arguments = (64, 0.25, None, 4, False, False, nn.SiLU, None, nn.Hardsigmoid, "meta", torch.half)
    theirs, ours = SEModule(*arguments), SqueezeExcite(*arguments)
    for (name, want), (same, got) in zip(
        theirs.state_dict().items(), ours.state_dict().items(), strict=True
    ):
        assert (name, want.shape, want.dtype, want.device) == (
            same,
            got.shape,
            got.dtype,
            got.device,
        )
    assert ours.options["act"] == "silu"
    assert ours.options["gate"] == "hard_sigmoid"


def test_timm_builds_with_it():
    def build(layer):
        torch.manual_seed(0)
        return timm.create_model("resnet18", block_args={"attn_layer": layer}, zero_init_last=False)

    stock, ours = build("se").double().eval(), build(SqueezeExcite).double().eval()
    assert type(ours.layer1[0].se) is SqueezeExcite
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), stock(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"act_layer": nn.ELU}, "SqueezeExcite: act_layer must be one of identity, .*, got 'ELU'"),
        ({"act_layer": "elu"}, "SqueezeExcite: act_layer must be one of identity, .*, got 'elu'"),
        ({"act": "swish"}, "SqueezeExcite: act must be one of identity, .*, got 'swish'"),
        ({"gate": "silu"}, "SqueezeExcite: gate must be one of sigmoid, .*, got 'silu'"),
        ({"gate_layer": nn.SiLU}, "SqueezeExcite: gate_layer must be one of sigmoid, .*'silu'"),
        ({"norm_layer": nn.BatchNorm2d}, "SqueezeExcite: norm_layer must be None"),
        ({"add_maxpool": True}, "SqueezeExcite: add_maxpool must be False"),
        ({"spatial_dims": 4}, "SqueezeExcite: spatial_dims must be 1, 2 or 3, got 4"),
        ({"apply": "add"}, "SqueezeExcite: apply must be one of scale, .*, got 'add'"),
        ({"out_act": "mish"}, "SqueezeExcite: out_act must be one of identity, .*, got 'mish'"),
        ({"impl": "cuda"}, "SqueezeExcite: impl must be one of auto, .*, got 'cuda'"),
    ],
    ids=str,
)
def test_bad_arguments_name_themselves(options, message):
    with pytest.raises(ValueError, match=message):
        SqueezeExcite(64, **options)


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_every_option_reaches_the_operator(spatial_dims, target):
    torch.manual_seed(0)
    options = {"gate_slope": 0.3, "gate_offset": 0.4, "apply": "scale_shift", "gain": 2.0}
    module = SqueezeExcite(
        *(8, 0.5),
        **(options | {"act": "leaky_relu", "act_slope": 0.2, "gate": "hard_sigmoid"}),
        **{"out_act": "silu", "spatial_dims": spatial_dims, "impl": target.impl},
    ).to(target.device)
    assert module.fc1.weight.dim() == 2 + spatial_dims
    x, residual = torch.randn(2, 2, 8, *(4, 3, 2)[:spatial_dims], device=target.device)
    drop_path = torch.tensor([0.0, 1.5], device=target.device)
    m = x.flatten(2).mean(2)
    h = nn.functional.leaky_relu(
        nn.functional.linear(m, module.fc1.weight.flatten(1), module.fc1.bias), 0.2
    )
    z = nn.functional.linear(h, module.fc2.weight.flatten(1), module.fc2.bias)
    ones = (2, 8, *(1,) * spatial_dims)
    s, t = (0.3 * z[:, :8] + 0.4).clamp(0, 1).view(ones), z[:, 8:].view(ones)
    u = residual + drop_path.view(2, *(1,) * (x.dim() - 1)) * 2.0 * (s * x + t)
    torch.testing.assert_close(module(x, residual, drop_path), nn.functional.silu(u))


@pytest.mark.parametrize(("make", "shapes"), MODULES.values(), ids=MODULES)
def test_copies_compute_from_their_own_parameters(make, shapes):
    def filled(net):
        for parameter in net.parameters():
            nn.init.constant_(parameter, 0.3)
        return net(*inputs)

    module, inputs = make().double().eval(), [noise(*shape) for shape in shapes]
    want, of_filled = module(*inputs), filled(make().double().eval())
    assert not torch.allclose(of_filled, want)
    for name, other in copies(module).items():
        assert torch.equal(other(*inputs), want), name
        assert torch.equal(filled(other), of_filled), name
        assert torch.equal(module(*inputs), want), name


def test_repr_names_the_options():
    text = repr(SqueezeExcite(16, act="silu", gain=2.0))
    assert "act='silu'" in text
    assert "gain=2.0" in text


@pytest.mark.parametrize(("make", "shapes"), MODULES.values(), ids=MODULES)
def test_optimize_leaves_our_own_modules_alone(make, shapes):
    report = attnkern.optimize(nn.Sequential(make()))
    assert (report.replaced, report.skipped) == ([], [])


# ------------------------------------------------------------------ altered layers


def eager(se, x):
    m = x.mean((2, 3), keepdim=True)
    linear = se.fc1.weight.dim() == 2
    h = se.fc1(m.flatten(1) if linear else m)
    h = (se.act or nn.SiLU())(h)
    z = se.fc2(h.flatten(1) if linear else h)
    return x * z.view_as(m).sigmoid()


def excite(linear=False, act="silu"):
    torch.manual_seed(0)
    se = SqueezeExcite(8, rd_channels=4, act=act)
    if linear:
        se.fc1, se.fc2 = nn.Linear(8, 4), nn.Linear(4, 8)
    return se.double()


IMAGE = torch.linspace(-2, 3, 144, dtype=torch.float64).sin().view(2, 8, 3, 3)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("linear", [False, True], ids=["convolutions", "linear"])
@pytest.mark.parametrize("name", ["fc1", "fc2"])
@pytest.mark.parametrize("alter", ALTERED.values(), ids=ALTERED)
def test_altered_layers_are_called_and_it_is_said_once(alter, name, linear, said):
    check(excite(linear), eager, name, alter, (IMAGE,), said)


CONVOLUTIONS = {
    "padding and a kernel that takes it in": ((1, {"padding": 1}), (3, {})),
    "kernel": ((3, {"padding": 1}), (1, {})),
    "padding of the same size": ((3, {"padding": "same"}), (3, {"padding": "same"})),
    "circular padding": ((3, {"padding": 1, "padding_mode": "circular"}), (1, {})),
    "dilation": ((1, {}), (3, {"padding": 2, "dilation": 2})),
    "stride": ((1, {"stride": 2}), (1, {"stride": 3, "dilation": 2})),
    "padding and stride": ((1, {"padding": 1, "stride": 2}), (2, {"stride": 2})),
    "groups": ((1, {"groups": 2}), (1, {"groups": 4})),
    "groups of one": ((1, {}), (1, {"groups": 4})),
}


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("layers", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_other_convolutions_are_called(layers, dims, said):
    torch.manual_seed(0)
    se = SqueezeExcite(8, rd_channels=4, act="silu", spatial_dims=dims)
    conv = type(se.fc1)
    (kernel1, options1), (kernel2, options2) = layers
    se.fc1, se.fc2 = conv(8, 4, kernel1, **options1), conv(4, 8, kernel2, **options2)
    se.double()
    for p in se.parameters():
        nn.init.normal_(p)
    x = torch.randn(2, 8, *(3,) * dims, dtype=torch.float64)

    def layered(x):
        m = x.mean([*range(2, x.dim())], keepdim=True)
        return x * se.fc2(nn.functional.silu(se.fc1(m))).sigmoid()

    for got, want in zip(outcome(se, se, x), outcome(layered, se, x), strict=True):
        torch.testing.assert_close(got, want)
    assert len(said) == 1
    assert said[0].startswith("SqueezeExcite is computed layer by layer: its fc")


@pytest.mark.filterwarnings("ignore:.*layer by layer")
@pytest.mark.parametrize(
    ("options1", "second", "message"),
    [
        ({"padding": 1}, nn.Conv2d(4, 8, 1), r"fc2 must give one position, got \[2, 8, 3, 3\]"),
        ({}, nn.Conv2d(4, 8, 1, padding=2), r"fc2 must give one position, got \[2, 8, 5, 5\]"),
        ({"padding": 1}, nn.Linear(4, 8), r"fc1 must give one position, got \[2, 4, 3, 3\]"),
    ],
    ids=["fc1", "fc2", "linear"],
)
def test_padding_that_leaves_more_than_one_position_is_named(options1, second, message):
    """Also where the map has as many positions, which eager multiplies one by one."""
    se = SqueezeExcite(8, rd_channels=4)
    se.fc1, se.fc2 = nn.Conv2d(8, 4, 1, **options1), second
    with pytest.raises(ValueError, match=f"SqueezeExcite: {message}"):
        se(IMAGE.float())


@pytest.mark.parametrize("act", ["silu", "prelu"])
def test_another_activation_is_called(act, said):
    se = excite(act=act)
    replace(se, "act", nn.ELU())
    torch.testing.assert_close(se(IMAGE), eager(se, IMAGE))
    assert said == ["SqueezeExcite is computed layer by layer: its act is ELU(alpha=1.0)"]


def test_a_slope_of_an_activation_without_one_is_called(said):
    se = excite()
    se.act = nn.PReLU().double()
    torch.testing.assert_close(se(IMAGE), eager(se, IMAGE))
    assert len(said) == 1


@pytest.mark.parametrize("apply", ["scale", "scale1p", "scale_shift", "shift"])
@pytest.mark.parametrize("name", ["fc1", "fc2", "act"])
def test_observed_layers_change_nothing(apply, name, said, target):
    torch.manual_seed(0)
    options = {"act": "prelu", "gate": "hard_sigmoid", "gate_slope": 0.3, "gain": 2.0}
    se = SqueezeExcite(
        8, 0.5, apply=apply, out_act="relu6", spatial_dims=1, impl=target.impl, **options
    ).to(target.device)
    x, residual = torch.randn(2, 2, 8, 5, device=target.device)
    call = {"residual": residual, "drop_path": torch.tensor([0.0, 1.5], device=target.device)}
    check_observed(se, name, (x,), said, **call)


def test_observed_layers_under_autocast_and_in_low_precision(said):
    se = excite().float()
    want, x = se(IMAGE.float()), IMAGE.float()
    observe(se, "fc1")
    with torch.autocast("cpu", torch.bfloat16):
        low = se(x)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, want, rtol=0.02, atol=0.02)
    half = se.bfloat16()(x.bfloat16())
    torch.testing.assert_close(half.float(), want, rtol=0.02, atol=0.02)


def test_parametrized_layers_are_inlined(said):
    se = excite()
    parametrizations.weight_norm(se.fc1)
    parametrizations.spectral_norm(se.eval().fc2)
    torch.testing.assert_close(se(IMAGE), eager(se, IMAGE))
    assert not said


def test_plain_and_altered_modules_compile_whole():
    se = excite()
    for _ in range(2):
        compiled = torch.compile(se, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(IMAGE), eager(se, IMAGE))
        se.fc1 = Lora(se.fc1)
