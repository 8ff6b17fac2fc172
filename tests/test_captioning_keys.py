"""The keys that the captioning rule keeps from step to step: one projection a decode, never a stale one."""

import copy
import gc
import types
import weakref

import pool_modules as copied
import pytest
import torch
import torch.nn.functional as F
from pool_heads import close, gradients, head
from torch import nn
from torch.utils.checkpoint import checkpoint

import attnkern
from attnkern.integrations import _keys


@pytest.fixture
def projections(monkeypatch):
    calls = []

    def linear(*arguments):
        calls.append(arguments)
        return F.linear(*arguments)

    monkeypatch.setattr(_keys, "F", types.SimpleNamespace(linear=linear))
    return calls


@pytest.fixture
def pair():
    model, x = head("captioning")
    optimized = copy.deepcopy(model)
    attnkern.optimize(optimized, impl="reference")
    return model, optimized, x


def attention():
    torch.manual_seed(0)
    model = copied.Attention()
    optimized = copy.deepcopy(model)
    attnkern.optimize(optimized, impl="reference")
    return model, optimized, torch.randn(4, 9, 24), torch.randn(4, 12)


def same(model, optimized, *inputs):
    for a, b in zip(optimized(*inputs), model(*inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("grad", [True, False])
def test_a_decode_projects_once(pair, projections, grad):
    model, optimized, x = pair
    projections.clear()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(optimized(x), model(x))
    assert len(projections) == 1
    torch.testing.assert_close(optimized(x), model(x))  # other items: the decoder sorts them anew
    assert len(projections) == 2


def test_gradients_accumulate_as_eager_does(pair):
    model, optimized, x = pair
    for _ in range(2):
        for net in (model, optimized):
            net(x).square().sum().backward()
    for a, b in zip(optimized.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("frozen", ["encoder_att", "items", "bias"])
def test_frozen_parts_get_no_gradient(frozen):
    model, optimized, x, h = attention()
    if frozen == "bias":
        for net in (model, optimized):
            net.encoder_att.bias = None
    for net in (model, optimized):
        net.encoder_att.requires_grad_(frozen != "encoder_att")
    leaves = [x.clone().requires_grad_(frozen != "items") for _ in range(2)]
    for net, leaf in zip((model, optimized), leaves, strict=True):
        z, alpha = net(leaf, h)
        (z.square().sum() + alpha.square().sum()).backward()
    grads = [
        [leaf.grad, *(p.grad for p in net.parameters())]
        for net, leaf in zip((model, optimized), leaves, strict=True)
    ]
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_backward_twice_retained_freed_and_of_second_order():
    model, optimized, x, h = attention()
    for net in (model, optimized):
        net.double()
    x, h = x.double(), h.double()
    results = []
    for net in (model, optimized):
        first, second = (net(x, h)[0].square().sum() for _ in range(2))
        (g,) = torch.autograd.grad(first, net.encoder_att.weight, create_graph=True)
        (gg,) = torch.autograd.grad(g.square().sum(), net.encoder_att.weight, retain_graph=True)
        second.backward()  # after the first graph was partly freed
        results.append((g, gg, net.encoder_att.weight.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_steps(pair, reentrant):
    model, optimized, x = pair

    def run(net):
        def call(x):
            return checkpoint(net, x, use_reentrant=reentrant)

        call.parameters = net.parameters
        return call

    if reentrant:  # which differentiates by backward alone
        for net in (model, optimized):
            run(net)(x.clone().requires_grad_()).square().sum().backward()
        for a, b in zip(optimized.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    else:
        close(gradients(run(optimized), x), gradients(model, x))


def _optimizer_step(model, x):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)


def _new_layer(model, x):
    torch.manual_seed(1)
    model.encoder_att = nn.Linear(24, 16)


def _new_weight(model, x):
    model.encoder_att.weight = nn.Parameter(model.encoder_att.weight.detach() * 2)


def _data(model, x):
    model.encoder_att.weight.data = model.encoder_att.weight.data * 2


def _no_bias(model, x):
    model.encoder_att.bias = None


def _load(model, x):
    model.load_state_dict({name: t * 2 for name, t in model.state_dict().items()})


CHANGES = [_optimizer_step, _new_layer, _new_weight, _data, _no_bias, _load]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changed_weights_are_seen(change):
    model, optimized, x, h = attention()
    with torch.no_grad():
        same(model, optimized, x, h)
        for net in (model, optimized):
            change(net, x)
        same(model, optimized, x, h)


def test_weights_written_past_their_versions_after_backward_are_seen():
    """As fused optimizers do."""
    model, optimized, x, h = attention()
    for net in (model, optimized):
        net(x, h)[0].sum().backward()
        for p in net.parameters():
            p.data.add_(0.5)
    same(model, optimized, x, h)


def test_changed_and_other_items_are_seen(projections):
    model, optimized, x, h = attention()
    projections.clear()
    with torch.no_grad():
        same(model, optimized, x, h)
        x.mul_(2)
        same(model, optimized, x, h)
        x[1].zero_()
        same(model, optimized, x, h)
        same(model, optimized, x.clone(), h)
        assert len(projections) == 4
        same(model, optimized, x[:2], h[:2])  # of x, while a copy of it was the last
        assert len(projections) == 5
        same(model, optimized, x, h)  # more rows than are kept
        assert len(projections) == 6
        for rows in (slice(1, 3), slice(0, 4, 2)):  # another start, another stride
            same(model, optimized, x[rows], h[rows])
        same(model, optimized, x.flip(2).flip(2), h)
        same(model, optimized, x.double()[:0].float(), h[:0])
        same(model, optimized, x.view(4, 9, 24)[:, :5], h)
        same(model, optimized, x.as_strided((4, 9, 24), (216, 24, 1)), h)


def test_memory_handed_to_other_items_is_no_hit():
    """A freed tensor's address is soon another's."""
    model, optimized, _, h = attention()
    for seed in range(20):
        x = torch.randn(4, 9, 24, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            same(model, optimized, x, h)
        del x


def test_kept_keys_die_with_the_items_and_with_the_module():
    _, optimized, x, h = attention()
    with torch.no_grad():
        optimized(x, h)
    entry = _keys._kept[optimized][x]
    keys = weakref.ref(entry.keys)
    del entry, x
    gc.collect()
    assert keys() is None
    x = torch.randn(4, 9, 24)
    optimized(x, h)
    before = len(_keys._kept)
    del optimized
    gc.collect()
    assert len(_keys._kept) < before


def test_nothing_is_kept_or_found_while_a_cuda_graph_is_captured(monkeypatch):
    """Keys from before the capture would be those of every replay."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not _keys._countable(types.SimpleNamespace(is_cuda=True))


@pytest.mark.parametrize("mode", ["inference", "autocast", "vmap", "functional"])
def test_nothing_is_kept_where_changes_cannot_be_seen(mode, projections):
    model, optimized, x, h = attention()
    projections.clear()
    kept = len(_keys._kept)
    if mode == "inference":
        with torch.inference_mode():
            x = x.clone()
            same(model, optimized, x, h)
            x.mul_(2)
            same(model, optimized, x, h)
    elif mode == "autocast":
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            for a, b in zip(optimized(x, h), model(x, h), strict=True):
                assert a.dtype == b.dtype
                torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    elif mode == "vmap":
        attnkern.optimize(optimized)  # an explicit implementation is not transformed
        run = lambda net: torch.func.vmap(lambda h: net(x, h[None].expand(4, -1)))(h)  # noqa: E731
        for a, b in zip(run(optimized), run(model), strict=True):
            torch.testing.assert_close(a, b)
    else:
        doubled = {name: 2 * p.detach() for name, p in model.named_parameters()}
        for _ in range(2):
            for a, b in zip(
                torch.func.functional_call(optimized, doubled, (x, h)),
                torch.func.functional_call(model, doubled, (x, h)),
                strict=True,
            ):
                torch.testing.assert_close(a, b)
        same(model, optimized, x, h)
        return
    assert len(_keys._kept) == kept
