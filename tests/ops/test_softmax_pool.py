"""What only pools promise: merging, bags, folding, empty rows, and long bags."""

from __future__ import annotations

import functools
import itertools

import pytest
import saturated
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnkern import testing
from attnkern.functional import (
    additive_attention_pool,
    context_attention_pool,
    gated_attention_pool,
    merge_pools,
    query_attention_pool,
    softmax_pool,
)
from attnkern.ops.softmax_pool.cases import SPECS

INF = float("inf")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def _spec(name):
    return next(spec for spec in SPECS if spec.name == name)


def _gradients(outputs, leaves, grads=None):
    outputs = testing.as_tuple(outputs)
    grads = [torch.ones_like(o) for o in outputs] if grads is None else grads
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    return torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs])


# ------------------------------------------------------------------ merge_pools


@pytest.mark.parametrize("sizes", [(40, 40, 20), (1, 99), (0, 100), (50, 0, 50), (100,)], ids=str)
def test_merged_parts_are_the_whole(sizes, target):
    x = torch.randn(2, 100, 8, device=target.device, requires_grad=True)
    w = torch.randn(3, 8, device=target.device, requires_grad=True)
    options = dict(return_lse=True, impl=target.impl)
    parts = [context_attention_pool(part, w, **options) for part in x.split(sizes, 1)]
    merged = merge_pools(*(torch.stack(t) for t in zip(*parts, strict=True)))
    whole = context_attention_pool(x, w, **options)
    grads = testing.noise_like(whole)
    for got, want in zip(merged, whole, strict=True):
        torch.testing.assert_close(got, want)
    for got, want in zip(
        _gradients(merged, (x, w), grads), _gradients(whole, (x, w), grads), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_merging_is_twice_differentiable_and_ignores_empty_parts():
    z = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    lse = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(merge_pools, (z, lse))
    assert torch.autograd.gradgradcheck(merge_pools, (z, lse))
    empty = torch.full((1, 3), -INF, dtype=torch.float64)
    more = merge_pools(torch.cat([z, torch.zeros(1, 3, 5)]), torch.cat([lse, empty]))
    for got, want in zip(more, merge_pools(z, lse), strict=True):
        assert torch.equal(got, want)
    nothing = merge_pools(torch.zeros(2, 3, 5), torch.full((2, 3), -INF))
    assert torch.equal(nothing[0], torch.zeros(3, 5))
    assert torch.equal(nothing[1], torch.full((3,), -INF))


# ------------------------------------------------------------------ bags


@pytest.mark.parametrize("name", ["given", "context", "query", "additive", "gated"])
@pytest.mark.parametrize("lengths", [(5, 0, 30, 1), (0,), (0, 0, 7), (17,) * 9, (600, 3)], ids=str)
def test_bags_are_calls_of_their_own(name, lengths, target):
    total, device = sum(lengths), target.device

    def r(*shape):
        return torch.randn(*shape, device=device)

    x, scores, keys = r(total, 6), r(3, total), r(total, 4)
    w, q, p, q3, v, w8 = r(2, 6), r(1, 2, 8), r(8, 6), r(1, 3, 4), r(4), r(2, 8)
    functions = {
        "given": lambda i, b, **o: softmax_pool(b(scores[:, i]), b(x[i]), **o),
        "context": lambda i, b, **o: context_attention_pool(b(x[i]), w, **o),
        "query": lambda i, b, **o: query_attention_pool(
            b(x[i]), q, heads=2, k_weight=p, v_weight=p, **o
        ),
        "additive": lambda i, b, **o: additive_attention_pool(b(keys[i]), b(x[i]), q3, v, **o),
        "gated": lambda i, b, **o: gated_attention_pool(b(x[i]), p, None, p + 1, None, w8, **o),
    }
    x.requires_grad_()
    bounds = [0, *itertools.accumulate(lengths)]
    options = dict(return_lse=True, impl=target.impl)
    offsets = torch.tensor(bounds, device=device)
    ragged = functions[name](slice(None), lambda t: t, offsets=offsets, **options)
    alone = [
        functions[name](slice(*pair), lambda t: t[None], **options)
        for pair in itertools.pairwise(bounds)
    ]
    dense = tuple(torch.cat(t) for t in zip(*alone, strict=True))
    grads = testing.noise_like(ragged)
    for got, want in zip(ragged, dense, strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(_gradients(ragged, (x,), grads), _gradients(dense, (x,), grads))


def test_an_empty_bag_gives_nothing_and_takes_nothing(target):
    x = torch.randn(9, 5, device=target.device, requires_grad=True)
    w = torch.randn(2, 5, device=target.device, requires_grad=True)
    offsets = torch.tensor([0, 0, 9, 9], device=target.device)
    z, lse = context_attention_pool(x, w, offsets=offsets, return_lse=True, impl=target.impl)
    for empty in (0, 2):
        assert torch.equal(z[empty], torch.zeros_like(z[empty]))
        assert torch.equal(lse[empty], torch.full_like(lse[empty], -INF))
    dz = torch.zeros_like(z)
    dz[0] = dz[2] = 1e3
    for grad in torch.autograd.grad((z, lse), (x, w), (dz, dz[..., 0])):
        assert not grad.any()


# ------------------------------------------------------------------ masks


@pytest.mark.parametrize("how", ["mask", "bias"])
def test_a_row_that_is_masked_throughout(how, target, dtype):
    x = torch.randn(2, 6, 5, device=target.device, dtype=dtype, requires_grad=True)
    keep = torch.ones(2, 3, 6, dtype=torch.bool, device=target.device)
    keep[1, 1] = False
    w = torch.randn(3, 5, device=target.device, dtype=dtype)
    masked = {"mask": keep}
    if how == "bias":
        masked = {"logit_bias": torch.zeros(2, 3, 6, device=target.device).masked_fill(~keep, -INF)}
    z, p, lse = context_attention_pool(
        x, w, **masked, return_weights=True, return_lse=True, impl=target.impl
    )
    assert torch.equal(z[1, 1], torch.zeros_like(z[1, 1]))
    assert torch.equal(p[1, 1], torch.zeros_like(p[1, 1]))
    assert lse[1, 1] == -INF
    torch.testing.assert_close(p.sum(-1).float(), keep.any(-1).float(), rtol=1e-2, atol=1e-2)
    dz = torch.zeros_like(z)
    dz[1, 1] = 1
    dp = torch.zeros_like(p)
    dp[1, 1] = 1
    (dx,) = torch.autograd.grad((z, p), x, (dz, dp))
    assert not dx.any()


def test_a_masked_item_has_no_weight_whatever_its_score(target):
    x = torch.randn(1, 4, 3, device=target.device)
    for value in (float("nan"), INF, -INF):
        scores = torch.tensor([[0.0, 1.0, value, 2.0]], device=target.device)
        mask = torch.tensor([[True, True, False, True]], device=target.device)
        z, p = softmax_pool(scores, x, mask=mask, return_weights=True, impl=target.impl)
        kept = mask[0]
        want = softmax_pool(scores[:, kept], x[:, kept], impl=target.impl)
        assert p[0, 2] == 0
        torch.testing.assert_close(z, want)


# ------------------------------------------------------------------ folding


@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.parametrize("projected", ["k", "v", "kv", ""])
@pytest.mark.parametrize("queries", [1, 3])
def test_folding_changes_nothing(heads, projected, queries, target):
    def r(*shape):
        return torch.randn(*shape, device=target.device)

    tensors = {"x": r(2, 11, 12), "query": r(2, queries, 12)}
    for name in projected:
        tensors |= {f"{name}_weight": r(12, 12) / 4, f"{name}_bias": r(12)}
    keep = torch.ones(2, heads, queries, 11, dtype=torch.bool, device=target.device)
    keep[0, 0, 0] = False
    options = dict(
        heads=heads, mask=keep, return_weights=True, return_scores=True, impl=target.impl
    )
    folded = testing.run(query_attention_pool, tensors, {**options, "fold": True})
    projected = testing.run(query_attention_pool, tensors, {**options, "fold": False})
    for (name, got), (_, want) in zip(folded.items(), projected.items(), strict=True):
        torch.testing.assert_close(
            got, want, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_folding_needs_no_matrix_over_the_features(target):
    """Values alone projected: queries stand in their heads' columns."""
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    x, q, w = (torch.randn(s, device=target.device) for s in ((2, 5, 96), (1, 1, 96), (8, 96)))
    with Sizes():
        query_attention_pool(x, q, heads=4, v_weight=w, impl=target.impl)
    assert 0 < max(sizes) <= x.numel()


def test_the_pool_of_a_query_is_attention(target):
    """Against torch's own attention, keys and values given."""
    x = torch.randn(3, 10, 24, device=target.device)
    q = torch.randn(3, 4, 24, device=target.device)
    keys = torch.randn(3, 10, 24, device=target.device)
    split = [t.unflatten(2, (4, 6)).transpose(1, 2) for t in (q, keys, x)]
    want = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
    got = query_attention_pool(x, q, heads=4, keys=keys, impl=target.impl)
    torch.testing.assert_close(got, want)


# ------------------------------------------------------------------ one output at a time


@pytest.mark.parametrize("name", [spec.name for spec in SPECS])
@pytest.mark.parametrize("position", [0, 1, 2, 3], ids=["z", "weights", "scores", "lse"])
def test_the_gradient_of_one_output_alone(name, position, target):
    """The regularisers of attention: on the weights, the raw scores or the log-sum-exp."""
    spec = _spec(name)
    case = next(c for c in spec.cases if "lengths" not in c.options and "keep" not in c.options)
    options = {**case.options, "returns": ("weights", "scores", "lse")}
    dtype = torch.float64 if target.serves(torch.float64) else torch.float32
    got, want = {}, {}
    for function, grads, extra in (
        (spec.function, got, {"impl": target.impl}),
        (spec.eager, want, {}),
    ):
        leaves = case.inputs(dtype, target.device, requires_grad=True)
        function(**leaves, **options, **extra)[position].square().sum().backward()
        grads.update(
            {k: torch.zeros_like(t) if t.grad is None else t.grad for k, t in leaves.items()}
        )
    for key, grad in want.items():
        torch.testing.assert_close(
            got[key], grad, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_a_bias_of_the_scores_moves_nothing_but_scores_and_lse(target):
    if target.impl == "reference":
        pytest.skip("autograd of the reference adds up rounding errors around 0")
    x, w = torch.randn(2, 300, 8, device=target.device), torch.randn(1, 8, device=target.device)
    b = torch.zeros(1, device=target.device, requires_grad=True)
    (grad,) = torch.autograd.grad(context_attention_pool(x, w, b, impl=target.impl).sum(), b)
    assert torch.equal(grad, torch.zeros_like(grad))


# ------------------------------------------------------------------ saturation

r = torch.randn


def _peak(x, item, weight):
    """x [B, N, D] whose ``item`` has a score of 1000 for weight [D], where others have about |weight|."""
    x[:, item] = 1000 * weight / weight.square().sum()
    return x


def _context(*shape):
    weight = r(1, 64)
    x = _peak(r(2, 35, 64), 7, weight[0])
    return {"x": x.mT.reshape(2, 64, *shape) if shape else x, "weight": weight}, {}


def _query():
    query = r(1, 48)
    x = _peak(r(2, 25, 48), 7, query[0])
    return {"x": x, "query": query}, {}


def _given(gap):
    scores = r(3, 5, 29)
    scores[..., 7] += gap
    return {"values": r(3, 29, 64), "scores": scores}, {}


SATURATED = {
    **{f"softmax_pool {gap}": functools.partial(_given, gap) for gap in (30, 100, 1000)},
    "context_attention_pool": _context,
    "context_attention_pool map": lambda: _context(5, 7),
    "query_attention_pool": _query,
    "additive_attention_pool": lambda: (
        {"keys": r(2, 30, 24), "values": r(2, 30, 40), "query": r(2, 24), "v": 200 * r(24)}, {},
    ),
    "gated_attention_pool": lambda: (
        {"x": r(1, 40, 24), "V": r(12, 24), "U": r(12, 24), "w": 300 * r(1, 12)}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SATURATED)
def test_gradients_of_a_saturated_softmax(name, target):
    """One weight is 1: dp and the sum of p dp leave nothing, or a rounding of dp, but none of |dz| |z|."""
    tensors, options = SATURATED[name]()
    tensors = {key: t.to(target.device) for key, t in tensors.items()}
    case = testing.Case("", {}, options)
    testing.compare(_spec(name.split()[0]), case, tensors, impl=target.impl)


@pytest.mark.parametrize("returns", [(), saturated.ALL], ids=["z", "all"])
@pytest.mark.parametrize("call", saturated.CALLS, ids=str)
def test_gradients_of_a_softmax_near_saturation(call, returns, target, dtype):
    """Weights of a half to 1 - 1e-12, every output and gradient."""
    options = {"returns": returns, "device": target.device, "impl": target.impl}
    saturated.compare_all(call, dtype, step=4, **options)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("items", [1, 40, 70_001])
def test_a_weight_of_one_has_no_gradient(items, channels_first, create_graph, target, dtype):
    values = r(2, 19, items) if channels_first else r(2, items, 19)
    values = values.to(target.device, dtype).requires_grad_()
    scores = torch.zeros(2, 3, items, device=target.device)
    scores[..., items // 2] = 1e3
    scores.requires_grad_()
    z = softmax_pool(scores, values, channels_first=channels_first, impl=target.impl)
    (grad,) = torch.autograd.grad(z, scores, r(z.shape).to(z), create_graph=create_graph)
    assert not grad.any()


# ------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("items", "features", "queries"),
    [(100_000, 3, 1), (1_000_000, 8, 2), (257, 4096, 1), (130, 33, 100), (1, 1, 1), (2, 4096, 17)],
)
def test_sizes(items, features, queries, target):
    if target.impl == "triton" and target.device == "cpu":
        pytest.skip("the interpreter is slow; its own file has long bags")
    tensors = {
        "x": torch.randn(1, items, features, device=target.device),
        "weight": torch.randn(queries, features, device=target.device) * features**-0.5,
    }
    case = testing.Case("", {}, {"returns": ("lse",)})
    testing.compare(_spec("context_attention_pool"), case, tensors, impl=target.impl)


def test_a_constant_bag_pools_to_its_constant(target, dtype):
    for items in (1, 2, 1000, 65_536):
        x = torch.full((1, items, 3), 0.5, device=target.device, dtype=dtype)
        z = softmax_pool(torch.zeros(1, items, device=target.device), x, impl=target.impl)
        torch.testing.assert_close(z, torch.full_like(z, 0.5), rtol=1e-5, atol=0)


def test_large_scores_do_not_overflow(target, dtype):
    x = torch.arange(4.0, device=target.device).to(dtype).reshape(1, 4, 1)
    scores = torch.tensor([[-6e4, 0.0, 6e4, 5e4]], device=target.device)
    z, lse = softmax_pool(scores, x, return_lse=True, impl=target.impl)
    assert torch.equal(z, x[:, 2])
    assert lse == 6e4


def test_frozen_items_get_no_gradient_and_the_scorer_does(target):
    x = torch.randn(1, 50, 8, device=target.device)
    parameters = [
        torch.randn(*s, device=target.device, requires_grad=True) for s in ((4, 8), (4, 8), (1, 4))
    ]
    V, U, w = parameters

    def z(x):
        return gated_attention_pool(x, V, None, U, None, w, impl=target.impl)

    frozen = _gradients(z(x), parameters)
    x.requires_grad_()
    *trained, dx = _gradients(z(x), [*parameters, x])
    assert dx.any()
    for got, want in zip(frozen, trained, strict=True):
        if target.impl == "reference":
            torch.testing.assert_close(got, want)
        else:
            assert torch.equal(got, want)
