"""The pooling operators in Triton's interpreter; run by test_triton_interpret.py, see triton_interpreted.py."""

from __future__ import annotations

import pytest
import saturated
import torch
from conftest import CALLS, calls
from triton_kinds import FEW, check

from attnkern import testing
from attnkern._triton import tune
from attnkern.functional import gated_attention_pool, softmax_pool
from attnkern.ops.softmax_pool import op, triton_plan
from attnkern.ops.softmax_pool.reference import Inputs, Options

POOLS = [call for call in CALLS if call.spec.operator == "softmax_pool_fwd"]


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("call", POOLS, ids=str)
def test_every_case_within_the_budget(call, kind):
    check(call, kind)


@pytest.mark.parametrize("call", saturated.CALLS, ids=str)
def test_near_saturation(call, monkeypatch):
    """The pool of the rest in splits, too; types, weights and what is returned turn with the case."""
    index = saturated.CALLS.index(call)
    monkeypatch.setattr(triton_plan, "splits", lambda *_: 1 + index % 2)
    dtype = (torch.float32, torch.float32, torch.bfloat16)[index % 3]
    returns = (saturated.ALL, ())[index // 3 % 2]
    saturated.compare_all(call, dtype, step=5, returns=returns, impl="triton")


def assert_same_scores(results, index):
    for got in results[1:]:
        assert torch.equal(got.outputs[index], results[0].outputs[index])


@pytest.mark.parametrize(
    "call",
    calls("pool_queries", "context_queries", "query_heads", "additive_mask", "gated_branches"),
    ids=str,
)
def test_any_number_of_splits_gives_the_same_pool(call, monkeypatch):
    """Within the budget each; the scores, which no split sums, to the bit."""
    asked, results = [], []
    for splits in (1, 2, 3, 7):
        monkeypatch.setattr(triton_plan, "splits", lambda *_, k=splits: asked.append(k) or k)
        results.append(testing.compare(call.spec, call.case, call.case.inputs(), impl="triton"))
    assert [asked.count(k) for k in (1, 2, 3, 7)] == [3] * 4, (
        "forward, backward, its pool of the rest"
    )
    assert_same_scores(results, 1 + call.case.options["returns"].index("scores"))


@pytest.mark.parametrize(
    "call", calls("pool_bags", "context_bags", "query_bags", "additive_bags", "gated_bags"), ids=str
)
@pytest.mark.parametrize("splits", [2, 5])
def test_bags_in_splits(call, splits, monkeypatch):
    """Some bags are empty, and most splits of the others are."""
    assert 0 in call.case.options["lengths"]
    monkeypatch.setattr(triton_plan, "splits", lambda *_: splits)
    got = testing.compare(call.spec, call.case, call.case.inputs(torch.bfloat16), impl="triton")
    empty = [length == 0 for length in call.case.options["lengths"]]
    assert not got.outputs[0][torch.tensor(empty)].any()


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("call", calls("context_queries", "additive_classes"), ids=str)
def test_samples_that_share_a_query_take_turns(call, samples, monkeypatch):
    monkeypatch.setattr(triton_plan, "samples", lambda *_: samples)
    testing.compare(call.spec, call.case, call.case.inputs(), impl="triton")


@pytest.mark.parametrize("most", [7, 64])
@pytest.mark.parametrize(
    "call", calls("gated", "gated_branches", "gated_mask", "gated_bags", "ungated"), ids=str
)
def test_segments_of_the_hidden_layer(call, most, monkeypatch):
    def parts(shape, x):
        found = [
            (b, b + 1, n, min(n + most, shape.items))
            for b in range(x.shape[0])
            for n in range(0, shape.items, most)
        ]
        counted.append(len(found))
        return found

    counted = []
    monkeypatch.setattr(triton_plan, "segments", parts)
    testing.compare(call.spec, call.case, call.case.inputs(), impl="triton")
    assert len(counted) == 1
    assert counted[0] > 1 or most > 29


def test_segments_cover_every_item_once_within_the_workspace():
    for samples, items, features, units in (
        (1, 100_000, 1024, 256),
        (64, 700, 64, 16),
        (3, 1, 8, 4),
    ):
        x = torch.empty(samples, 1, items, features, dtype=torch.bfloat16, device="meta")
        shape = triton_plan.Shape(samples, 1, items, 1, features, units, False, x.device)
        seen = torch.zeros(samples, items, dtype=torch.int)
        for b0, b1, n0, n1 in triton_plan.segments(shape, x):
            seen[b0:b1, n0:n1] += 1
            workspace = 12 * units * (b1 - b0) * (n1 - n0)
            assert workspace <= max(1 << 17, x.numel() // 4) or (b1 - b0) * (n1 - n0) <= 64
        assert (seen == 1).all()


SLICES = {
    "batch": lambda make: make(7, 19, 10)[1::3],
    "items": lambda make: make(2, 30, 10)[:, 4:23],
    "features": lambda make: make(2, 19, 15)[:, :, 3:13],
    "columns": lambda make: make(2, 10, 30)[:, :, 5:24].transpose(1, 2),
    "expanded batch": lambda make: make(1, 19, 10).expand(2, 19, 10),
}


@pytest.mark.parametrize("name", SLICES)
@pytest.mark.parametrize("call", calls("context_queries", "gated_branches"), ids=str)
def test_slices_give_the_bits_of_their_copies(call, name):
    def make(*shape):
        return torch.randn(shape, generator=generator)

    generator = torch.Generator().manual_seed(0)
    x = SLICES[name](make)
    w, v, u = make(3, 10), make(7, 10), make(7, 10)
    tensors = {"weight": w} if "context" in str(call) else {"V": v, "U": u, "w": make(3, 7)}
    results = []
    for copied in (False, True):
        t = x.clone(memory_format=torch.preserve_format) if copied else x
        if copied:
            assert t.stride() != x.stride() or name == "batch"
        results.append(testing.run(call.spec.function, {"x": t, **tensors}, {}, impl="triton"))
    for (what, got), (_, want) in zip(results[0].items(), results[1].items(), strict=True):
        assert torch.equal(got, want), what


@pytest.mark.parametrize("queries", [2, 16, 67])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_many_queries(queries, dtype):
    """Blocks of queries share an item's gradient, whoever scored it."""
    (given,) = calls("pool_queries")
    shapes = {"values": (2, 21, 18), "scores": (2, queries, 21)}
    c = testing.Case("", shapes, {"returns": ("lse",)}, scale={"scores": 2.0})
    testing.compare(given.spec, c, c.inputs(dtype), impl="triton")
    gated = calls("gated_branches")[0].spec
    shapes = {"x": (1, 37, 18), "V": (9, 18), "U": (9, 18), "w": (queries, 9)}
    c = testing.Case("", shapes, scale=dict.fromkeys("VUw", 0.5))
    testing.compare(gated, c, c.inputs(dtype), impl="triton")


@pytest.mark.parametrize("fastest", [512, 1024, 2048, 4096])
def test_tuning_takes_the_fastest_and_moves_no_bit(fastest, monkeypatch):
    def timer(launch, block):
        launch(block)
        timed.append(block)
        return abs(block["BLOCK_N"] * block["BLOCK_F"] - fastest)

    timed = []
    monkeypatch.setattr(tune, "measure", timer)
    monkeypatch.setattr(tune, "_chosen", {})
    x, scores = torch.randn(3, 40, 50), torch.randn(3, 40)
    run = [softmax_pool, {"scores": scores, "values": x}, {}]
    plain = testing.run(*run, impl="triton")
    assert not timed
    monkeypatch.setattr(tune, "enabled", True)
    for _ in range(2):
        tuned = testing.run(*run, impl="triton")
        assert len(timed) == 4, "every candidate once"
        for (name, got), (_, want) in zip(tuned.items(), plain.items(), strict=True):
            assert torch.equal(got, want), name
    (chosen,) = tune._chosen.values()
    assert chosen["BLOCK_N"] * chosen["BLOCK_F"] == fastest


@pytest.mark.parametrize("shape", [(0, 9, 5), (2, 0, 5)], ids=["no samples", "no items"])
def test_nothing_to_pool(shape):
    weights = {"V": torch.randn(3, 5), "U": torch.randn(3, 5), "w": torch.randn(2, 3)}
    tensors = {"x": torch.randn(shape), **weights}
    got = testing.run(gated_attention_pool, tensors, {"b_V": None, "b_U": None}, impl="triton")
    assert got.outputs[0].shape == (shape[0], 2, 5)
    assert not got.outputs[0].any()
    for name, grad in got.grads.items():
        assert torch.equal(grad, torch.zeros_like(tensors[name])), name
    scores = torch.randn(shape[0], 4, shape[1])
    z, lse = softmax_pool(scores, tensors["x"], return_lse=True, impl="triton")
    assert not z.any()
    assert torch.equal(lse, torch.full((shape[0], 4), float("-inf")))


def test_only_what_is_needed_is_written():
    """Outputs have the shapes of the fakes, whatever gradients are asked for."""
    x, q = torch.randn(2, 1, 9, 5), torch.randn(1, 1, 3, 5)
    i, o = Inputs(x, query=q), Options("dot")
    z, lse, top, _ = torch.ops.attnkern.softmax_pool_fwd.triton(*i, *o, False)
    for needs in range(32):
        flags = [bool(needs >> bit & 1) for bit in range(5)]
        arguments = (torch.randn_like(z), z, lse, None, *i, top, *o, *flags)
        got = torch.ops.attnkern.softmax_pool_bwd.triton(*arguments)
        assert len({g.untyped_storage()._cdata for g in got}) == len(got), "no two are one"
        for g, fake in zip(got, op._bwd_fake(*arguments), strict=True):
            assert (g.shape, g.dtype, g.stride()) == (fake.shape, fake.dtype, fake.stride())
            assert torch.isfinite(g).all()
