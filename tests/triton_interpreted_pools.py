"""The pooling operators in Triton's interpreter; run by test_triton_interpret.py, see triton_interpreted.py."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import saturated
import torch
import triton
import triton.language as tl
from conftest import CALLS, Call, calls
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter
from triton_kinds import FEW, check

from attnkern import testing
from attnkern._triton import tune
from attnkern.functional import gated_attention_pool, softmax_pool
from attnkern.ops.softmax_pool import op, triton_backward, triton_forward, triton_plan
from attnkern.ops.softmax_pool.cases import ALL, SPECS, bounds, case
from attnkern.ops.softmax_pool.reference import Inputs, Options
from attnkern.ops.softmax_pool.triton_items import piece_of, row_of_pieces

POOLS = [call for call in CALLS if call.spec.operator == "softmax_pool_fwd"]


def take_tiles(monkeypatch, tiles=None):
    """Tiles of 16 items and pieces of ``tiles``, or of as many as the plan wants; gives what was asked for."""
    exact, asked = triton_plan.blocks, []

    def blocks(*arguments, **options):
        asked.append(tiles)
        return {**exact(*arguments, **options), "BLOCK_N": 16}

    monkeypatch.setattr(triton_plan, "blocks", blocks)
    if tiles:
        monkeypatch.setattr(triton_plan, "piece_tiles", lambda *_: tiles)
    return asked


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("call", POOLS, ids=str)
def test_every_case_within_the_budget(call, kind):
    check(call, kind)


@pytest.mark.parametrize("call", saturated.CALLS, ids=str)
def test_near_saturation(call, monkeypatch):
    """The pool of the rest in pieces, too; types, weights and what is returned turn with the case."""
    index = saturated.CALLS.index(call)
    if index % 2:
        take_tiles(monkeypatch, 1)
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
def test_any_pieces_give_the_same_pool(call, monkeypatch):
    """Within the budget each; the scores, which no piece sums, to the bit."""
    results = []
    for tiles in (1, 2, 3, 7):
        with monkeypatch.context() as patch:
            asked = take_tiles(patch, tiles)
            results.append(testing.compare(call.spec, call.case, call.case.inputs(), impl="triton"))
        assert len(asked) == 3, "forward, backward, its pool of the rest"
    assert_same_scores(results, 1 + call.case.options["returns"].index("scores"))


LENGTHS = (0, 0, 3, 0, 0, 117, 16, 1, 32, 0, 0)
_BAGS = {
    "softmax_pool": {"values": (169, 12), "scores": (3, 169)},
    "context_attention_pool": {"x": (169, 18), "weight": (2, 18), "logit_bias": (169,)},
    "query_attention_pool": {"x": (169, 16), "query": (11, 2, 16)},
    "additive_attention_pool": {
        **{"keys": (169, 6), "values": (169, 14), "query": (11, 2, 6), "v": (6,)},
    },
    "gated_attention_pool": {"x": (169, 21), "V": (15, 21), "U": (15, 21), "w": (2, 15)},
}
BAGS = [
    Call(spec, case("long and empty bags", _BAGS[spec.name], lengths=LENGTHS, returns=ALL))
    for spec in SPECS
]


@pytest.mark.parametrize("tiles", [None, 1, 2])
@pytest.mark.parametrize("call", BAGS, ids=str)
def test_bags_in_pieces(call, tiles, monkeypatch):
    """Bags are empty at both ends and in a row, and one has most of the items."""
    take_tiles(monkeypatch, tiles)
    tensors = call.case.inputs(torch.bfloat16 if tiles == 2 else torch.float32)
    got = testing.compare(call.spec, call.case, tensors, impl="triton")
    empty = torch.tensor([length == 0 for length in LENGTHS])
    assert not got.outputs[0][empty].any()
    again = testing.run(call.spec.function, tensors, call.case.options, impl="triton")
    for (name, one), (_, two) in zip(got.items(), again.items(), strict=True):
        assert torch.equal(one, two), name


def test_a_bag_has_the_same_bits_wherever_it_stands(monkeypatch):
    take_tiles(monkeypatch, 1)
    values, scores = torch.randn(169, 12), torch.randn(3, 169)
    results = []
    for step in (1, -1):
        x, e = (
            torch.cat(values.split(LENGTHS)[::step]),
            torch.cat(scores.split(LENGTHS, 1)[::step], 1),
        )
        offsets = torch.tensor(bounds(LENGTHS[::step]))
        z = softmax_pool(e, x, offsets=offsets, impl="triton")
        results.append(z if step == 1 else z.flip(0))
    assert torch.equal(*results)


def test_no_program_has_more_than_a_piece(monkeypatch):
    """One bag has 125 of 165 tiles: 32 programs' worth of pieces have 5 each, whoever they belong to."""
    take_tiles(monkeypatch)
    lengths = (*[5] * 20, 2000, *[5] * 20)
    bags = case("", {"values": (2200, 16), "scores": (1, 2200)}, lengths=lengths)
    loaded = {module: Counter() for module in (triton_forward, triton_backward)}
    for module, programs in loaded.items():

        def load(*arguments, exact=module.load_weights, programs=programs):
            programs[tuple(interpreter.interpreter_builder.grid_idx)] += 1
            return exact(*arguments)

        monkeypatch.setattr(module, "load_weights", load)
    tensors = bags.inputs()
    tensors["scores"] *= 0.1  # no weight is a peak, whose row is pooled again
    testing.compare(SPECS[0], bags, tensors, impl="triton")
    forward, backward = (programs.values() for programs in loaded.values())
    assert (max(forward), sum(forward)) == (2 * 5, 2 * 165), "logits and sums of a piece"
    assert (max(backward), sum(backward)) == (5 + 2, 165 + 56), "and two tiles of 128 of dvalues"


@triton.jit
def list_pieces(out, offsets, batch, skipped, items, length):
    piece = tl.program_id(0).to(tl.int64)
    b, first, last, start, stop = piece_of(piece, offsets, batch, skipped, items, length)
    _, _, first_piece = row_of_pieces(b, offsets, skipped, items, length)
    tl.store(out + 6 * piece, b)
    tl.store(out + 6 * piece + 1, first)
    tl.store(out + 6 * piece + 2, last)
    tl.store(out + 6 * piece + 3, start)
    tl.store(out + 6 * piece + 4, stop)
    tl.store(out + 6 * piece + 5, first_piece)


@given(
    lengths=st.lists(st.one_of(st.just(0), st.integers(0, 90)), min_size=1, max_size=9),
    cut=st.tuples(st.integers(0, 500), st.integers(0, 500)),
    length=st.integers(1, 40),
    ragged=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_pieces_cover_every_item_once(lengths, cut, length, ragged):
    """Of all items of bags, or of a segment of them; of samples that are alike."""
    batch = len(lengths)
    skipped, end = sorted(min(n, sum(lengths)) for n in cut) if ragged else (0, lengths[0])
    items = end - skipped
    edges = torch.tensor(bounds(tuple(lengths)))
    shape = triton_plan.Shape(batch, 1, items, 1, 1, 0, ragged, torch.device("cpu"))
    pieces = triton_plan.pieces(shape, length)
    out = torch.full((pieces, 6), -1)
    list_pieces[pieces,](out, edges if ragged else None, batch, skipped, items, length)
    wanted = []
    for b in range(batch):
        start, stop = (
            (edges[b : b + 2] - skipped).clamp(0, items).tolist() if ragged else (0, items)
        )
        own = out[out[:, 0] == b].tolist()
        count = max(1, -(-(stop - start) // length))
        assert count <= len(own) <= count + ragged
        assert [row[3:5] for row in own] == [[start, stop]] * len(own)
        assert out[own[0][5], 0] == b
        assert own[0][5] == 0 or out[own[0][5] - 1, 0] == b - 1
        edge = [min(start + k * length, stop) for k in range(len(own) + 1)]
        assert [row[1:3] for row in own] == [[*pair] for pair in pairwise(edge)]
        wanted += [b] * len(own)
    assert out[:, 0].tolist() == wanted


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("call", [*calls("context_queries", "additive_classes"), BAGS[1]], ids=str)
def test_pieces_that_share_a_query_take_turns(call, groups, monkeypatch):
    take_tiles(monkeypatch, 1)
    monkeypatch.setattr(triton_plan, "groups", lambda *_: groups)
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
