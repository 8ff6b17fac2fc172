"""``attnkern.nn``'s gates: other libraries' state dicts, every option, norms, altered layers, errors."""

import copy

import gate_modules as copied
import pytest
import torch
from gate_blocks import close, gradients, monai, settle
from nn_modules import GATES, noise
from torch import nn
from torch.nn.utils import parametrizations, prune

from attnkern.functional import BatchNorm, attention_gate
from attnkern.nn import AttentionGate, MultiAttentionGate
from attnkern.ops.attention_gate import module as gate_module

pytestmark = pytest.mark.filterwarnings("ignore:.*upsample. is deprecated")


def maps(dims, channels=6, gating=8, coarse=False):
    sizes = (9, 8, 7)[:dims]
    return noise(2, channels, *sizes), noise(2, gating, *((4, 5, 3)[:dims] if coarse else sizes))


def by_name(model):
    return {name: p.grad for name, p in model.named_parameters()}


# ------------------------------------------------------------------ state dicts

AUTHORS = {
    "2d": (lambda: copied.GridAttentionBlock2D(6, 8), {}),
    "3d": (lambda: copied.GridAttentionBlock3D(6, 8, 5), {"hidden": 5, "spatial_dims": 3}),
    "debug": (
        lambda: copied.GridAttentionBlock2D(6, 8, 4, "concatenation_debug"),
        {"hidden": 4, "act": "softplus"},
    ),
    "residual": (
        lambda: copied.GridAttentionBlock2D(6, 8, 4, "concatenation_residual", (2, 3)),
        {"hidden": 4, "gate": "softmax", "kernel": (2, 3)},
    ),
    "corners": (lambda: copied.AlignedCorners(6, 8), {"align_corners": True}),
    "torr": (
        lambda: copied._GridAttentionBlockND_TORR(
            *(6, 8, 4, 2, "concatenation_softmax"), use_W=False
        ),
        {"hidden": 4, "kernel": 1, "phi_bias": False, "gate": "softmax", "out": False},
    ),
}


@pytest.mark.parametrize(("make", "options"), AUTHORS.values(), ids=AUTHORS)
def test_state_dicts_of_the_authors_load_both_ways(make, options):
    stock = settle(make()).double()
    dims = options.get("spatial_dims", 2)
    options = {"kernel": 2, "out": True, "upsample": ("bilinear", "trilinear")[dims - 2], **options}
    gate = AttentionGate(6, 8, return_alpha=True, **options).double()
    gate.load_state_dict(stock.state_dict())
    back = make().double()
    back.load_state_dict(gate.state_dict())
    for train in (False, True):
        x, g = maps(dims, coarse=True)
        want, got, same = (net.train(train)(x, g) for net in (stock, gate, back))
        torch.testing.assert_close((got[0], got[2]), want)
        torch.testing.assert_close(same, want, rtol=0, atol=0)
    dy = noise(*want[0].shape)
    want[0].backward(dy)
    got[0].backward(dy)
    torch.testing.assert_close(by_name(gate), by_name(stock))
    torch.testing.assert_close(dict(gate.named_buffers()), dict(stock.named_buffers()))


def test_state_dicts_of_two_gates_load_both_ways():
    make = lambda: copied.MultiAttentionBlock(6, 8, 4).double()  # noqa: E731
    stock, back = settle(make()), make()
    block = MultiAttentionGate(6, 8, 4, kernel=2, upsample="trilinear", spatial_dims=3)
    assert block(*(t.float() for t in maps(3, coarse=True))).shape == (2, 6, 9, 8, 7)
    block = MultiAttentionGate(
        *(6, 8, 4), kernel=2, upsample="trilinear", spatial_dims=3, return_alpha=True
    ).double()
    block.load_state_dict(stock.state_dict())
    back.load_state_dict(block.state_dict())
    x, g = maps(3, coarse=True)
    y, alpha, alpha_full = block(x, g)
    assert alpha.shape == (2, 2, 4, 4, 3)
    torch.testing.assert_close((y, alpha_full), stock(x, g))
    torch.testing.assert_close(back(x, g)[0], stock(x, g)[0])
    three = MultiAttentionGate(6, gates=3, out=False, norm=True, target="g")
    assert list(three._modules) == [*(f"gate_block_{n}" for n in (1, 2, 3)), "combine_gates"]
    x, g = (t.float() for t in maps(2, gating=6))
    assert three(x, g).shape == (2, 6, 9, 8)


OTHERS = {
    "monai 1d": (lambda: monai(1, 4, 8, 6), 1),
    "monai 3d": (lambda: monai(3, 4, 8, 6), 3),
    "image segmentation": (lambda: copied.Attention_block(8, 6, 4), 2),
}


@pytest.mark.parametrize(("make", "dims"), OTHERS.values(), ids=OTHERS)
def test_gates_on_one_grid_load_also_as_a_child(make, dims):
    """Their argument order is (g, x)."""
    stock = settle(make()).double()
    gate = AttentionGate(6, 8, 4, norm=True, theta_bias=True, spatial_dims=dims).double()
    net = nn.ModuleDict({"gate": gate})
    net.load_state_dict({f"gate.{name}": t for name, t in stock.state_dict().items()})
    x, g = maps(dims)
    for train in (True, False):
        torch.testing.assert_close(gate.train(train)(x, g), stock.train(train)(g, x))
    state = {"W_x": gate.theta_norm, "W_g": gate.phi_norm, "psi": gate.psi_norm}
    for branch, norm in state.items():
        buffers = stock.get_submodule(f"{branch}.1").named_buffers()
        torch.testing.assert_close(dict(norm.named_buffers()), dict(buffers))


# ------------------------------------------------------------------ options

OPTIONS = {
    "default": ({}, False),
    "1d": ({"spatial_dims": 1, "norm": True}, False),
    "3d": ({"spatial_dims": 3, "kernel": (1, 2, 3), "upsample": "nearest", "norm": True}, True),
    "biases": ({"theta_bias": True, "phi_bias": False, "hidden": 1}, False),
    "leaky": ({"act": "leaky_relu", "act_slope": 0.2, "out": True}, False),
    "softplus": ({"act": "softplus", "norm": True, "gate": "softmax"}, False),
    "target": ({"target": "g", "norm": True, "out": True}, False),
    "coarse": ({"upsample": "bilinear", "norm": True, "kernel": 2}, True),
    "coarse target": ({"upsample": "bilinear", "target": "g", "align_corners": True}, True),
    "alpha": ({"return_alpha": True, "kernel": 2, "upsample": "bilinear"}, True),
}


@pytest.mark.parametrize(("options", "coarse"), OPTIONS.values(), ids=OPTIONS)
def test_every_option_computes_what_its_layers_do(options, coarse):
    """Also what a gate with norms that share statistics over ranks computes by."""
    gate = settle(AttentionGate(6, 8, **options)).double()
    layered = copy.deepcopy(gate)
    layered.forward = layered._by_layers
    given = maps(options.get("spatial_dims", 2), coarse=coarse)
    for train in (True, True, False):
        close(gradients(gate.train(train), given), gradients(layered.train(train), given), 1e-9)


def test_synchronised_norms_run_the_layers(monkeypatch):
    gate = nn.SyncBatchNorm.convert_sync_batchnorm(AttentionGate(6, 8, norm=True))
    assert type(gate.psi_norm) is nn.SyncBatchNorm
    given = [t.float() for t in maps(2)]
    want = gate(*given)
    monkeypatch.setattr(gate_module, "synchronised", lambda norm, x: True)
    monkeypatch.setattr(gate_module, "attention_gate", None)
    torch.testing.assert_close(gate(*given), want)


NORMS = {
    "cumulative": {"momentum": None},
    "not tracked": {"track_running_stats": False},
    "frozen": {"training": False},
}


@pytest.mark.parametrize("values", NORMS.values(), ids=NORMS)
def test_norms_are_read_and_counted_as_their_forward_does(values):
    norm = settle(nn.BatchNorm2d(6)).double()
    vars(norm).update(values)
    twin, x = copy.deepcopy(norm), noise(3, 6, 4, 5)
    for step in (1, 2, 3):
        want = norm(step * x)
        given = gate_module.batch_norm(twin)
        assert isinstance(given, BatchNorm)
        got = nn.functional.batch_norm(
            *(step * x, *given[:4]), given.over_batch, given.momentum, given.eps
        )
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(dict(twin.named_buffers()), dict(norm.named_buffers()))
    assert gate_module.batch_norm(None) is None


def test_the_function_is_called_with_the_modules_parameters():
    gate = settle(AttentionGate(6, 8)).double()
    x, g = maps(2)
    weights = (gate.theta.weight, None, gate.phi.weight, gate.phi.bias, *gate.psi.parameters())
    torch.testing.assert_close(gate(x, g), attention_gate(x, g, *weights), rtol=0, atol=0)


# ------------------------------------------------------------------ altered layers


class Adapted(nn.Conv2d):
    """A convolution with more than its parameters say, as LoRA's."""

    def forward(self, x):
        return super().forward(x) + x.mean(1, keepdim=True)


def shifted(norm):
    norm.register_forward_hook(lambda module, given, result: result + 1)


def replaced(name, layer):
    return lambda gate: setattr(gate, name, layer())


ALTERED = {
    "hook": lambda gate: shifted(gate.theta_norm),
    "hooked out": lambda gate: shifted(gate.W),
    "hooked end of out": lambda gate: shifted(gate.W[1]),
    "class": replaced("phi", lambda: Adapted(8, 3, 1)),
    "norm": replaced("theta_norm", lambda: nn.InstanceNorm2d(3)),
    "norm without statistics": replaced("psi_norm", lambda: nn.GroupNorm(1, 1)),
    "out": replaced("W", nn.Identity),
    "3x3": replaced("theta", lambda: nn.Conv2d(6, 3, 3, padding=1)),
    "dilated": replaced("theta", lambda: nn.Conv2d(6, 3, 1, padding=1, dilation=2)),
    "strided": replaced("theta", lambda: nn.Conv2d(6, 3, 2, stride=1)),
    "grouped": replaced("theta", lambda: nn.Conv2d(6, 3, 1, groups=3)),
    "padded phi": replaced("phi", lambda: nn.Conv2d(8, 3, 1, padding=1)),
    "patches of g": replaced("phi", lambda: nn.Conv2d(8, 3, 2, stride=2)),
    "patches of psi": replaced("psi", lambda: nn.Conv2d(3, 1, 2, stride=2)),
    "padded psi": replaced("psi", lambda: nn.Conv2d(3, 1, 1, padding=2, stride=2)),
    "3x3 out": lambda gate: gate.W.__setitem__(0, nn.Conv2d(6, 6, 3, padding=2, dilation=2)),
    "grouped out": lambda gate: gate.W.__setitem__(0, nn.Conv2d(6, 6, 1, groups=2)),
    "own forward": lambda gate: setattr(gate.psi, "forward", lambda h: h.sum(1, keepdim=True)),
}


@pytest.mark.parametrize("alter", ALTERED.values(), ids=ALTERED)
def test_altered_layers_are_called_and_it_is_said_once(alter, said):
    gate = settle(AttentionGate(6, 8, norm=True, out=True, upsample="bilinear")).double()
    given = maps(2)
    before = gate.eval()(*given)
    assert not said
    alter(gate)
    gate.double()
    for train in (False, True):
        twin = copy.deepcopy(gate.train(train))
        if "forward" in vars(gate.psi):
            twin.psi.forward = gate.psi.forward
        got = gate(*given)
        assert torch.equal(got, twin._by_layers(*given))
        assert train or not torch.allclose(got, before)
    assert len(said) == 1
    assert said[0].startswith("AttentionGate is computed layer by layer: its ")


@pytest.mark.filterwarnings("ignore:.*(weight_norm|layer by layer)")
@pytest.mark.parametrize("hook", ["weight_norm", "spectral_norm", "prune"])
def test_weights_that_hooks_compute_are_trained(hook):
    """Their attribute is what the last call of the layer's hook left."""
    gate = settle(AttentionGate(6, 8)).double()
    if hook == "prune":
        prune.l1_unstructured(gate.theta, "weight", 0.5)
    else:
        getattr(nn.utils, hook)(gate.theta)
    given, optimizer = maps(2), torch.optim.SGD(gate.parameters(), 0.1)
    before = gate(*given).detach()
    for _ in range(2):
        optimizer.zero_grad()
        gate(*given).square().sum().backward()
        optimizer.step()
    assert not torch.allclose(gate(*given), before)
    torch.testing.assert_close(gate.eval()(*given), gate._by_layers(*given))


def test_parametrized_layers_are_inlined(monkeypatch):
    monkeypatch.setattr(AttentionGate, "_by_layers", None)
    gate = settle(AttentionGate(6, 8)).double()
    x, g = maps(2)
    before = gate(x, g)
    parametrizations.weight_norm(gate.theta)
    gate.theta.parametrizations.weight.original0.data.mul_(2)
    weight = gate.theta.weight.detach()
    after = gate(x, g)
    assert not torch.allclose(after, before)
    plain = settle(AttentionGate(6, 8)).double()
    plain.theta.weight.data.copy_(weight)
    torch.testing.assert_close(after, plain(x, g))


def test_altered_grids_that_do_not_meet_are_named(said):
    gate = AttentionGate(6, 8)
    gate.theta = nn.Conv2d(6, 3, 3)
    with pytest.raises(ValueError, match="AttentionGate: upsample must be given, got maps on"):
        gate(*(t.float() for t in maps(2)))
    (text,) = said
    assert text.startswith(
        "AttentionGate is computed layer by layer: its theta is Conv2d(6, 3, ker"
    )


# ------------------------------------------------------------------ dtypes


@pytest.mark.parametrize(("make", "shapes"), GATES.values(), ids=GATES)
def test_modules_run_under_autocast_and_in_low_precision(make, shapes):
    gate = settle(make())
    given = [noise(*shape).float() for shape in shapes]
    with torch.autocast("cpu", torch.bfloat16):
        low = gate(*given)
    torch.testing.assert_close(low.float(), gate(*given), rtol=0.1, atol=0.1)
    half = gate.bfloat16()(*(t.bfloat16() for t in given))
    assert half.dtype == torch.bfloat16


def test_tensor_subclasses_wrap_the_result():
    MetaTensor = pytest.importorskip("monai.data").MetaTensor
    gate = AttentionGate(6, 8, return_alpha=True)
    x, g = (t.float() for t in maps(2))
    got, want = gate(MetaTensor(x, meta={"subject": "one"}), g), gate(x, g)
    for a, b in zip(got, want, strict=True):
        assert type(a) is MetaTensor
        assert torch.equal(a.as_tensor(), b)
    assert got[0].meta["subject"] == "one"


def test_repr_names_sizes_and_options():
    text = repr(AttentionGate(6, 8, 4, kernel=2, upsample="bilinear", gate="softmax"))
    for part in ("channels=6", "gating_channels=8", "hidden=4", "upsample='bilinear'", "'softmax'"):
        assert part in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spatial_dims": 4}, "AttentionGate: spatial_dims must be 1, 2 or 3, got 4"),
        ({"kernel": (2, 2, 2)}, "kernel must be an int or 2 of them"),
        ({"kernel": 0}, "kernel must be an int of at least 1, got 0"),
        ({"hidden": 0}, "hidden must be an int of at least 1, got 0"),
        ({"hidden": True}, "hidden must be an int of at least 1, got True"),
        ({"kernel": None}, "kernel must be an int of at least 1, got None"),
        ({"spatial_dims": 2.0}, "spatial_dims must be 1, 2 or 3, got 2.0"),
        ({"gating_channels": 1.5}, "gating_channels must be an int of at least 1, got 1.5"),
        ({"act": "gelu"}, "act must be one of relu, leaky_relu, softplus, got 'gelu'"),
        ({"act_slope": -1}, "act_slope must be at least 0, got -1"),
        ({"gate": "tanh"}, "gate must be one of sigmoid, softmax"),
        ({"upsample": "trilinear"}, "upsample must be one of None, nearest, bilinear, got 'tri"),
        ({"target": "y"}, "target must be one of x, g"),
        ({"impl": "cuda"}, "impl must be one of auto, .*'cuda'"),
    ],
)
def test_bad_arguments_name_themselves(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionGate(6, **options)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_gradients_lie_as_parameters_in_channels_last_do(norm, train):
    """DDP compares the strides of dims of size 1 too."""
    gate = AttentionGate(6, 8, norm=norm, out=True).to(memory_format=torch.channels_last)
    gate.train(train)(*(t.float() for t in maps(2))).sum().backward()
    for name, p in gate.named_parameters():
        assert p.grad.stride() == p.stride(), name


def test_a_gate_may_stand_twice():
    block = MultiAttentionGate(6, 8).eval()
    block.gate_block_2 = block.gate_block_1
    x, g = (t.float() for t in maps(2))
    twice = torch.cat([block.gate_block_1(x, g)] * 2, 1)
    torch.testing.assert_close(block(x, g), block.combine_gates(twice))


def test_two_gates_name_their_number():
    with pytest.raises(ValueError, match="MultiAttentionGate: gates must be an int of at least 1"):
        MultiAttentionGate(6, gates=0)
