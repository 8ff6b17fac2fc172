"""What the benchmark measures: no speed-up for a wrong kernel, no impossible figure."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json

import pytest
import torch
from bench_subject import CPU, SETTINGS, TINY, crash, measure, one_percent, plant

from attnkern import _select, testing
from attnkern.ops.softmax_pool.cases import case as softmax_pool_case
from bench import clock, results, rows, screen


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * 1.01


def remembered(function, memory={}, **arguments):  # noqa: B006
    """The right result of the first input, returned for any."""
    y = function(**arguments)
    return (
        y * 0 + memory.setdefault("y", y.detach().clone())
        if torch.is_grad_enabled()
        else memory["y"]
    )


def wider(function, **arguments):
    return function(**arguments).double()


def other_layout(function, **arguments):
    return testing.to_channels_last(function(**arguments))


def wrong_gradient(function, **arguments):
    return WrongGradient.apply(function(**arguments))


def one_nan(function, **arguments):
    y = function(**arguments)
    mask = torch.zeros_like(y)
    mask.view(-1)[-1] = float("nan")
    return y + mask


FAULTS = [one_percent, remembered, wider, other_layout, wrong_gradient, one_nan, crash]


# ------------------------------------------------------------------ gate


def test_right_kernel_is_timed_in_both_passes():
    forward, training = measure()
    for row in (forward, training):
        assert row["gate"]["reference"]["ok"]
        assert row["ratios"]["cold"]["eager"] > 0
        assert row["times"]["reference"]["cold"]["samples"] >= 5
        assert row["peak_bytes"]["eager"] >= row["map_bytes"]  # y at least
    assert training["minimum_bytes"] > forward["minimum_bytes"] > 2 * TINY.map_bytes


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_planted_fault_is_red_and_not_timed(monkeypatch, fault):
    plant(monkeypatch, fault)
    for row in measure():
        assert not row["gate"]["reference"]["ok"]
        assert row["gate"]["reference"]["why"]
        assert row["times"] == {}
        assert row["ratios"] == {}


def shrunk(c: testing.Case) -> testing.Case:
    """The case with every size over 16 a smaller one, equal sizes equal, multiples of 16 (heads)."""

    def less(size):
        return size if size <= 16 else 16 * (1 + size % 3)

    shapes = {name: tuple(map(less, shape)) for name, shape in c.shapes.items()}
    return dataclasses.replace(c, shapes=shapes)


def formulations():
    """Every other formulation once for each set of options that a subject gives it."""
    found = {}
    for bench in rows.benches().values():
        for s in [s for subjects in bench.subjects.values() for s in subjects]:
            rank = [len(shape) for shape in s.case.shapes.values()]
            for name in s.others:
                key = json.dumps([s.op, name, dict(s.case.options), list(s.case.shapes), rank])
                found.setdefault(key, (s, name))
    return list(found.values())


@pytest.mark.parametrize(
    ("subject", "name"), formulations(), ids=lambda v: v if isinstance(v, str) else v.case.name
)
def test_formulations_compute_the_same(subject, name):
    small = shrunk(subject.case)
    tensors = small.inputs(torch.float64)
    got = subject.others[name](**tensors, **small.options)
    expected = subject.spec().eager(**tensors, **small.options)
    torch.testing.assert_close(got, expected)


def test_every_operator_has_other_formulations():
    assert {s.op for s, _ in formulations()} >= {"squeeze_excite", "query_attention_pool"}


def test_pools_are_held_to_a_read_as_well():
    shapes = {"values": (2, 40, 16), "scores": (2, 40)}
    c = softmax_pool_case("given-2x40x16", shapes)
    trips = {rows.FORWARD: 1, rows.TRAINING: 3}
    subject = rows.Subject("softmax_pool", c, "fp32", trips, moved=("values",))
    forward, training = measure(subject)
    assert forward["layout"] == training["layout"] == "items"
    assert forward["minimum_bytes"] == 4 * (2 * 40 * 16 + 2 * 40)
    for row in (forward, training):
        assert row["gate"]["reference"]["ok"]
        fastest = {name: modes["cold"]["fastest"] for name, modes in row["times"].items()}
        rates = [2 * row["map_bytes"] / fastest["copy"], row["map_bytes"] / fastest["read"]]
        assert row["roof"]["copy_GBps"] == pytest.approx(max(rates) / 1e9)


def test_operator_without_a_kernel_is_measured_on_the_reference(monkeypatch):
    monkeypatch.setattr(
        _select, "refuse", lambda impl, *a: None if impl == "reference" else "planted"
    )
    for row in measure(TINY, dataclasses.replace(SETTINGS, impls=("native",))):
        assert row["impl"] == "reference"
        assert row["notes"] == [
            "native is left out: planted",
            "no kernel can run here, these figures are of the reference",
        ]
        assert row["gate"]["reference"]["ok"]


def test_formulation_that_cannot_run_is_left_out():
    broken = dataclasses.replace(TINY, others={"broken": functools.partial(crash, None)})
    for row in measure(broken):
        assert row["formulation"] == "plain"
        assert row["notes"] == ["broken left out: RuntimeError: launch failed"]


# ------------------------------------------------------------------ figures


def test_statistics():
    stats = clock.Stats.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (stats.q1, stats.median, stats.q3, stats.fastest, stats.samples) == (2, 3, 4, 1, 5)
    assert clock.spread(stats.dict()) == pytest.approx(2 / 3)
    assert clock.Stats.of([7.0]).median == 7
    assert results.geomean([1.0, 4.0]) == pytest.approx(2)
    assert results.geomean([]) is None


def test_competitors_are_interleaved():
    order = []

    def sampler(name):
        return lambda: order.append(name) or 1.0

    clock.interleave({name: sampler(name) for name in "abc"}, seconds=0.0, least=4)
    assert "".join(order) == "abc" * 4


def test_samples_rotate_through_every_input_set():
    seen = []
    sample = clock.sampler(seen.append, clock.Rotation(7), CPU)
    while len(seen) < 200:
        sample()
    assert set(seen) == set(range(7))


def test_competitors_take_the_input_sets_in_turn():
    """None finds in cache what another has just read: together they walk the sets as one does."""
    seen, rotation = [], clock.Rotation(7)
    samplers = [clock.sampler(seen.append, rotation, CPU) for _ in range(2)]
    del seen[:]
    start = rotation.position
    clock.interleave(dict(enumerate(samplers)), seconds=0.0, least=2, most=2)
    walked = [(start + i) % 7 for i in range(len(seen))]
    assert seen == walked


def fabricated(ours: float, copy: float, megabytes: float = 1000.0) -> dict:
    """A forward row whose call moves at least ``megabytes`` and takes ``ours`` seconds."""
    row = copy_of_row()
    row["map_bytes"], row["minimum_bytes"] = int(megabytes * 5e5), int(megabytes * 1e6)

    def stats(t):
        return {"cold": clock.Stats.of([t, t, t]).dict()}

    row["times"] = {"reference": stats(ours), "eager": stats(2 * ours), "copy": stats(copy)}
    return row


def copy_of_row() -> dict:
    return copy.deepcopy(measured_once()[0])


@functools.cache
def measured_once():
    return measure()


def test_figure_above_the_copy_roof_is_refused():
    cache = 32 << 20
    row = fabricated(ours=0.09, copy=0.1)
    results.derive(row, copy_GBps=5.0, cache=cache)
    assert "111 % of the fastest copy" in row["refused"]
    assert row["ratios"] == {}
    file = {"kernels": [row], "models": []}
    assert results.failures(file) == [f"{row['key']}: {row['refused']}"]
    assert "–" in screen.kernel_cells(row)["×eager"]

    slower = fabricated(ours=0.11, copy=0.1)
    results.derive(slower, copy_GBps=5.0, cache=cache)
    assert slower["refused"] is None
    assert slower["ratios"]["cold"]["eager"] == pytest.approx(2)
    # the whole machine's copy counts where no cache holds the data, and only there
    results.derive(slower, copy_GBps=20.0, cache=cache)
    assert slower["roof"]["percent"] == pytest.approx(100 / 0.11 / 20)
    in_cache = fabricated(ours=0.009, copy=0.01, megabytes=100)
    results.derive(in_cache, copy_GBps=5.0, cache=cache)
    assert in_cache["refused"] is None


def test_losses_are_listed_and_targets_missed():
    row = fabricated(ours=0.2, copy=0.1)
    row["times"]["eager"] = {"cold": clock.Stats.of([0.1] * 3).dict()}
    results.derive(row, copy_GBps=5.0, cache=1)
    file = {"kernels": [row], "models": [], "machine": {"device": "cpu"}}
    assert results.losses(file) == [f"{row['key']}, cold: 0.50 x eager"]
    (reached,) = results.against_targets(
        file, [rows.Target("SE", rows.FORWARD, ("fp32",), 1.6, 1.7)]
    )
    assert (reached["met"], reached["worst_key"]) == (False, row["key"])
    assert (reached["rows"], reached["of"]) == (1, 6)  # one of the table's six was run
    assert reached["reached"] == pytest.approx(0.5)
