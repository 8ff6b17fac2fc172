"""What is kept of a module's children: nothing that has changed since, and otherwise all of it."""

import copy
from collections import OrderedDict

import pytest
import torch
from altered_layers import ALTERED, replace
from monai.networks.nets.attentionunet import AttentionBlock
from test_optimize import image, seeded
from timm.layers.squeeze_excite import EffectiveSEModule, SEModule
from timm.models._efficientnet_blocks import SqueezeExcite as EfficientNetSE
from timm.models.resnet import Bottleneck
from torch import nn
from torchvision.ops.misc import SqueezeExcitation

import attnkern
from attnkern.functional import squeeze_excite
from attnkern.nn import SqueezeExcite

# the module, its first layer, its activation
STOCK = {
    "timm": (lambda: SEModule(16, act_layer=nn.LeakyReLU), "fc1", "act"),
    "effective": (lambda: EffectiveSEModule(16), "fc", "gate"),
    "efficientnet": (lambda: EfficientNetSE(16, act_layer=nn.PReLU), "conv_reduce", "act1"),
    "torchvision": (lambda: SqueezeExcitation(16, 8), "fc1", "activation"),
    "block": (lambda: Bottleneck(16, 4, attn_layer=SEModule), "se.fc1", "se.act"),
    "gate": (lambda: AttentionBlock(2, 8, 16, 16), "W_x.0.conv", "relu"),
    "block end": (lambda: Bottleneck(16, 4, attn_layer=SEModule), "se.fc2", "act3"),
}


def _rebound_hooks(module, name):
    layer = module.get_submodule(name)
    layer._forward_hooks = OrderedDict()
    layer.register_forward_hook(lambda layer, given, result: 2 * result + 0.3)


def _parameter(module, name):
    layer = module.get_submodule(name)
    layer.weight = nn.Parameter(layer.weight.detach() + 1)


def _in_place(module, name):
    with torch.no_grad():
        module.get_submodule(name).bias.add_(1)


def _data(module, name):
    for p in module.parameters():
        p.data = p.data.double()
    for b in module.buffers():
        b.data = b.data.double()


def _no_bias(module, name):
    module.get_submodule(name).bias = None


def _rebound_parameters(module, name):
    layer = module.get_submodule(name)
    layer._parameters = {**layer._parameters, "weight": nn.Parameter(layer.weight + 1)}


CHANGES = {
    **ALTERED,
    "rebound hooks": _rebound_hooks,
    "rebound parameters": _rebound_parameters,
    "parameter": _parameter,
    "in place": _in_place,
    "dtype": _data,
    "no bias": _no_bias,
    "layer": lambda m, name: replace(m, name, copy.deepcopy(m.get_submodule(name))),
}


def _same(module):
    """The module's result is its class's, in the dtype of its parameters."""
    x = image().to(next(module.parameters()).dtype)
    given = (x, x.flip(0)) if isinstance(module, AttentionBlock) else (x,)
    with torch.no_grad():
        got, want = module(*given), type(module).forward(module, *given)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    return got


def _served(name):
    make, layer, act = STOCK[name]
    module = seeded(make).eval()
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    attnkern.optimize(module, impl="reference")
    _same(module)
    return module, layer, act


@pytest.mark.filterwarnings("ignore:attnkern")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", STOCK)
def test_a_changed_layer_is_noticed_at_the_next_call(name, change):
    module, layer, _ = _served(name)
    kept = vars(module)["_reading"]
    _same(module)
    assert vars(module)["_reading"] is kept, "nothing has changed"
    with torch.no_grad():
        CHANGES[change](module, layer)
    _same(module)


@pytest.mark.filterwarnings("ignore:attnkern")
@pytest.mark.parametrize("name", [name for name in STOCK if name not in ("effective", "gate")])
def test_a_changed_activation_is_noticed_at_the_next_call(name):
    module, _, act = _served(name)
    before = _same(module)
    for layer in (nn.LeakyReLU(0.7), nn.PReLU(init=0.4), nn.ELU()):
        replace(module, act, layer)
        now = _same(module)
        assert not torch.equal(now, before)
        before = now
        if isinstance(layer, nn.LeakyReLU):
            layer.negative_slope = 0.1
        if isinstance(layer, nn.PReLU):
            layer.weight = nn.Parameter(torch.tensor([-2.0]))
        now = _same(module)
        assert torch.equal(now, before) is isinstance(layer, nn.ELU)
        before = now


def test_changed_attributes_are_noticed_at_the_next_call():
    timm, torchvision = _served("timm")[0], _served("torchvision")[0]
    timm.add_maxpool = True
    torchvision.avgpool.output_size = (6, 6)  # the map's
    with pytest.warns(UserWarning, match="runs its own forward: add_maxpool=True"):
        _same(timm)
    with pytest.warns(UserWarning, match="runs its own forward: its pooling is"):
        _same(torchvision)


@pytest.mark.filterwarnings("ignore:attnkern")
def test_a_layer_more_in_a_branch_is_noticed_at_the_next_call():
    gate, _, _ = _served("gate")
    before = _same(gate)
    gate.W_g.append(nn.Tanh())
    assert not torch.equal(_same(gate), before)
    del gate.W_g[2]
    assert torch.equal(_same(gate), before)
    del gate.W_g[1]
    assert not torch.equal(_same(gate), before)
    gate.W_x[1].running_mean.add_(1)
    gate.W_x[1].eps = 0.5
    assert not torch.equal(_same(gate), before)


@pytest.mark.parametrize("option", [("gain", 3.0), ("act", "silu"), ("impl", "reference")])
def test_changed_options_of_our_module_are_noticed_at_the_next_call(option):
    torch.manual_seed(0)
    module, x = SqueezeExcite(16), image()
    before = module(x)
    kept = vars(module)["_reading"]
    assert torch.equal(module(x), before)
    assert vars(module)["_reading"] is kept
    name, value = option
    module.options[name] = value
    fresh = SqueezeExcite(16, **{name: value})
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(module(x), fresh(x))


def test_a_verdict_is_of_one_autocast_and_of_one_class():
    module = _served("timm")[0].half()
    x = image().half()
    with torch.no_grad():
        for _ in range(2):
            assert module(x).dtype == torch.half
            with torch.autocast("cpu", torch.bfloat16):
                assert module(x).dtype == type(module).forward(module, x).dtype == torch.float32
    # the operator takes maps that the class would refuse
    weights = module.fc1.weight, module.fc1.bias, module.fc2.weight, module.fc2.bias
    y = squeeze_excite(x[..., 0], *weights, act="leaky_relu", impl="reference")
    assert y.shape == x.shape[:3]


def test_a_weight_that_is_computed_or_swapped_in_is_not_kept():
    module, x = SqueezeExcite(16), image()
    doubled = {name: 2 * p for name, p in module.named_parameters()}
    torch.func.functional_call(module, doubled, x)
    assert "_reading" not in vars(module)
    nn.utils.parametrizations.weight_norm(module.fc1)
    module(x)
    assert "_reading" not in vars(module)


@pytest.mark.parametrize("make", [lambda: SqueezeExcite(16), lambda: _served("timm")[0]])
def test_a_copy_reads_for_itself_and_nothing_is_left(make):
    module, x = make(), image()
    module(x)
    for other in (copy.deepcopy(module), module._replicate_for_data_parallel()):
        other._modules["fc1"] = copy.deepcopy(other._modules["fc1"])
        with torch.no_grad():
            other.fc1.weight.normal_()
        assert not torch.equal(other(x), module(x))
    attnkern.restore(module)
    assert isinstance(module, SqueezeExcite) or "_reading" not in vars(module)
