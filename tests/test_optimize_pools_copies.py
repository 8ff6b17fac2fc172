"""Copied pools: arguments of their own, layers that are one, and layers exchanged after they were optimized."""

import copy

import pool_modules as copied
import pytest
import torch
from pool_heads import close, gradients
from torch import nn

import attnkern
from attnkern.ops.softmax_pool import call as pool_call


@pytest.fixture(autouse=True)
def served(monkeypatch):
    """How many pools the operator has computed."""
    torch.manual_seed(0)
    calls, original = [], pool_call.pool

    def counted(*arguments):
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(pool_call, "pool", counted)
    return calls


def optimized(model, replaced=1):
    twin = copy.deepcopy(model)
    assert len(attnkern.optimize(twin).replaced) == replaced
    return twin


def same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ arguments


class Renamed(copied.Attention):
    def forward(self, features, hidden):
        e = self.full_att(
            self.relu(self.encoder_att(features) + self.decoder_att(hidden).unsqueeze(1))
        )
        alpha = self.softmax(e.squeeze(2))
        return (features * alpha.unsqueeze(2)).sum(dim=1), alpha


class ScoresAlone(copied.Attn_Net):
    def forward(self, instances, with_input=True):
        return (self.module(instances), instances) if with_input else self.module(instances)


class GatedScoresAlone(copied.Attn_Net_Gated):
    def forward(self, x, with_input=True):
        scores = self.attention_c(self.attention_a(x).mul(self.attention_b(x)))
        return (scores, x) if with_input else scores


COPIES = {
    "captioning": (copied.Attention, {"encoder_out": (2, 9, 24), "decoder_hidden": (2, 12)}, {}),
    "renamed": (Renamed, {"features": (2, 9, 24), "hidden": (2, 12)}, {}),
    "clip": (lambda: copied.OpenAIAttentionPool2d(3, 32, 4), {"x": (2, 32, 3, 3)}, {}),
    "clam": (copied.Attn_Net_Gated, {"x": (9, 32)}, {}),
    "more of clam": (ScoresAlone, {"instances": (9, 32)}, {"with_input": False}),
    "more of gated clam": (GatedScoresAlone, {"x": (9, 32)}, {"with_input": False}),
}


@pytest.mark.parametrize(("make", "shapes", "option"), COPIES.values(), ids=COPIES)
def test_a_copy_is_called_as_its_class_is(make, shapes, option, served):
    """By position or by name, with its own optional arguments, and with wrong ones."""
    model = make()
    twin = optimized(model)
    inputs = {name: torch.randn(shape) for name, shape in shapes.items()}
    first = next(iter(inputs))
    rest = {name: t for name, t in inputs.items() if name != first}
    served.clear()
    calls = [(tuple(inputs.values()), {}), ((), inputs), ((inputs[first],), rest)]
    for given, named in calls:
        same(twin(*given, **named), model(*given, **named))
    assert len(served) == len(calls)
    for given, named in calls if option else ():
        same(twin(*given, **named, **option), model(*given, **named, **option))
    if option:
        given = (*inputs.values(), *option.values())
        same(twin(*given), model(*given))
    assert len(served) == len(calls)
    for given, named in ((), {}), ((), rest), (tuple(inputs.values()), {"z": 1}):
        with pytest.raises(TypeError) as stock:
            model(*given, **named)
        with pytest.raises(TypeError) as ours:
            twin(*given, **named)
        assert str(ours.value) == str(stock.value)


@pytest.mark.parametrize(
    ("make", "shapes"),
    [(copied.Attention, [(2, 9, 24), (2, 12)]), (copied.AttentionPool, [(2, 9, 24)])],
)
def test_results_may_be_changed_in_place(make, shapes):
    """As a decoder's gate may do: the stock pool does not keep them for backward."""
    model, inputs = make(), [torch.randn(shape) for shape in shapes]

    def gradient(net):
        z = net(*inputs)
        z = z[0] if isinstance(z, tuple) else z
        return torch.autograd.grad(z.mul_(2).square().sum(), [*net.parameters()])

    for got, want in zip(gradient(optimized(model)), gradient(model), strict=True):
        same(got, want)


# ------------------------------------------------------------------ layers


def _shared(model, layer, other):
    parent, _, name = layer.rpartition(".")
    setattr(model.get_submodule(parent), name, model.get_submodule(other))
    return model


SHARED = {
    "clip": lambda: _shared(copied.OpenAIAttentionPool2d(3, 32, 4), "v_proj", "k_proj"),
    "captioning": lambda: _shared(copied.Attention(16, 16, 16), "decoder_att", "encoder_att"),
    "clam": lambda: _shared(copied.Attn_Net_Gated(), "attention_b.0", "attention_a.0"),
}


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)
def test_the_trial_gives_back_a_layer_that_is_two(make, dry_run):
    model = make()
    before = dict(model.named_parameters(remove_duplicate=False))
    values = {name: p.detach().clone() for name, p in before.items()}
    assert attnkern.optimize(model, dry_run=dry_run).replaced
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    for name, p in after.items():
        assert p is before[name]
        assert torch.equal(p, values[name])


def test_a_shared_layer_and_a_shared_weight_are_served(served):
    model, x = SHARED["clip"](), torch.randn(2, 32, 3, 3)
    close(gradients(optimized(model), x), gradients(model, x))
    model = copied.OpenAIAttentionPool2d(3, 32, 4)
    model.v_proj.weight = model.k_proj.weight
    close(gradients(optimized(model), x), gradients(model, x))
    assert len(served) > 2


class Doubled(nn.Module):
    """A layer around a layer, as an adapter is."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return 2 * self.module(x)


@pytest.mark.parametrize("name", ["fc1", "fc_gated"])
@pytest.mark.parametrize(
    "wrap", [Doubled, lambda m: m.module, nn.Sequential], ids=["adapter", "linear", "sequence"]
)
def test_other_layers_in_torchmils_pool_are_called(name, wrap):
    model, x = copied.AttentionPool(gated=True), torch.randn(2, 9, 24)
    twin = optimized(model)
    for net in (model, twin):
        setattr(net, name, wrap(getattr(net, name)))
    same(twin(x), model(x))
    (row,) = attnkern.optimize(copy.deepcopy(model)).skipped
    assert "its layer is a " in row.reason


def _relocated(net):
    net.attention_net = nn.DataParallel(net.attention_net)


def _another_scorer(net):
    net.attention_net[3] = GatedScores(net.attention_net[3])


def _another_branch(net):
    net.attention_net[3].module = nn.Sequential(net.attention_net[3].module, nn.Tanh())


class GatedScores(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        scores, x = self.net(x)
        return 3 * scores, x


@pytest.mark.parametrize("change", [_relocated, _another_scorer, _another_branch])
def test_a_clam_whose_attention_was_exchanged_runs_its_own_forward(change):
    model, h = copied.CLAM_MB(gate=False).eval(), torch.randn(9, 24)
    twin = optimized(model, 2)
    for net in (model, twin):
        change(net)
    close(gradients(copied.Slide(twin), h), gradients(copied.Slide(model), h))
