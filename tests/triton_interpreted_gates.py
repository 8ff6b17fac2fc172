"""Attention gates in Triton's interpreter; run by test_triton_interpret.py, see triton_interpreted.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from conftest import CALLS, calls
from gate_blocks import check_nearest
from triton_kinds import FEW, check

from attnkern import testing
from attnkern._triton import tune
from attnkern._triton.product import parts_of
from attnkern.functional import attention_gate
from attnkern.ops.attention_gate import reference, schemas, triton_plan
from attnkern.ops.attention_gate.cases import case
from attnkern.ops.attention_gate.reference import Inputs, Options

GATES = [call for call in CALLS if call.spec.operator == "attention_gate_fwd"]


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("call", GATES, ids=str)
def test_every_case_within_the_budget(call, kind):
    check(call, kind)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_gates_take_torchs_nearest_positions(dims):
    check_nearest(dims, torch.float32, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize(
    "call",
    calls("gate_1d", "oktay_2d_odd", "coarse_nearest", "finer_gating", "target_g_norm"),
    ids=str,
)
def test_runs_of_the_hidden_gradients(call, most, dtype, monkeypatch):
    """Runs begin and end within a sample, and span several: what they share is added up once."""

    def runs(tiles, *_):
        counted.append(tiles)
        return [(first, min(first + most, tiles)) for first in range(0, tiles, most)]

    counted = []
    monkeypatch.setattr(triton_plan, "runs", runs)
    testing.compare(call.spec, call.case, call.case.inputs(dtype), impl="triton")
    (tiles,) = counted
    assert tiles > most


def test_runs_cover_every_tile_once_within_the_workspace():
    for tiles, tile, maps in ((1, 1 << 26, 1 << 20), (1000, 1 << 17, 1 << 30), (7, 64, 0)):
        runs = triton_plan.runs(tiles, tile, maps)
        assert [t for first, stop in runs for t in range(first, stop)] == list(range(tiles))
        for first, stop in runs:
            assert (stop - first) * tile <= max(1 << 17, maps // 8) or stop - first == 1
    assert triton_plan.runs(0, 64, 0) == []


@pytest.mark.parametrize("processors", [1, 4000], ids=["large tiles", "small tiles"])
@pytest.mark.parametrize(
    "call", calls("gate_long", "monai_training", "coarse_training", "strided_training"), ids=str
)
def test_any_number_of_processors_gives_the_same_gate(call, processors, monkeypatch):
    """Tiles of 64 positions or 16, one group of them or one a group; more than 64 rows of sums, or fewer."""
    monkeypatch.setattr(triton_plan, "processors", lambda _: processors)
    testing.compare(call.spec, call.case, call.case.inputs(), impl="triton")


SLICES = {
    "batch": lambda make: make(7, 6, 5, 4)[1::3],
    "channels": lambda make: make(2, 9, 5, 4)[:, 2:8],
    "batch and channels": lambda make: make(4, 9, 5, 4)[::2, 1:7],
    "expanded batch": lambda make: make(1, 6, 5, 4).expand(2, 6, 5, 4),
}


@pytest.mark.parametrize("name", SLICES)
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("target", ["x", "g"])
def test_slices_give_the_bits_of_their_copies(name, channels_last, target):
    def make(*shape):
        x = torch.randn(shape, generator=generator)
        return testing.to_channels_last(x) if channels_last else x

    generator = torch.Generator().manual_seed(0)
    maps = [SLICES[name](make) for _ in range(3)]
    weights = {f"{branch}_weight": make(5, 6, 1, 1).flatten(1) for branch in ("theta", "phi")}
    weights["psi_weight"] = make(1, 5, 1, 1).flatten(1)
    absent = {f"{branch}_bias": None for branch in ("theta", "phi")}
    results = []
    for copied in (False, True):
        x, g, dy = maps
        if copied:
            x, g, dy = (t.clone() for t in maps)
            if channels_last:
                x, g, dy = map(testing.to_channels_last, (x, g, dy))
        options = {**absent, "target": target}
        tensors = {"x": x, "g": g, **weights}
        results.append(testing.run(attention_gate, tensors, options, [dy], impl="triton"))
    for (what, got), (_, want) in zip(results[0].items(), results[1].items(), strict=True):
        assert torch.equal(got, want), what


@pytest.mark.parametrize(
    "call", calls("no_norm", "oktay", "monai_training", "softmax", "target_g_coarse"), ids=str
)
def test_no_samples(call):
    empty = {k: t[:0] if k in call.case.maps else t for k, t in call.case.inputs().items()}
    got = testing.run(call.spec.function, empty, call.case.options, impl="triton")
    for name, grad in got.grads.items():
        assert torch.equal(grad, torch.zeros_like(empty[name])), name


def _normal_form(resampled):
    x, g = torch.randn(2, 7, 1, 5, 6), torch.randn(2, 4, 1, 2, 3)
    theta, psi = torch.randn(4, 28), torch.randn(4)
    if resampled:
        index = torch.tensor([[0, 0], [0, 1], [0, 1], [0, 1], [1, 2], [1, 2]])
        weight = torch.rand(6, 2)
        weight[0] = torch.tensor([1.0, 0.0])
        tail = (torch.randn(4), psi, torch.randn(1), index, weight)
        return Inputs(x, g, theta, None, *tail), Options(k2=2, k3=2, apply=False)
    return Inputs(x, g, theta, torch.randn(4, 4), None, psi, None), Options(k2=2, k3=2, apply=False)


@pytest.mark.parametrize("resampled", [False, True])
def test_only_what_is_needed_is_written(resampled):
    """Outputs have the shapes of the fakes, whatever gradients are asked for, and are the reference's."""
    i, o = _normal_form(resampled)
    q, _ = torch.ops.attnkern.attention_gate_fwd.triton(*i, *o)
    d, dq = torch.randn_like(i.x), torch.randn_like(q)
    want = reference.backward(d, dq, i, q, o)
    for needs in range(8):
        flags = [bool(needs >> bit & 1) for bit in range(3)]
        arguments = (d, dq, *i, q, *(None,) * 6, *o, *flags)
        got = torch.ops.attnkern.attention_gate_bwd.triton(*arguments)
        assert len({g.untyped_storage()._cdata for g in got}) == len(got), "no two are one"
        for g, fake, w in zip(got, schemas._bwd_fake(*arguments), want, strict=True):
            assert (g.shape, g.dtype, g.stride()) == (fake.shape, fake.dtype, fake.stride())
            if g.numel():
                torch.testing.assert_close(g, w, atol=1e-4, rtol=1e-4)


@triton.jit
def parts_kernel(weights, high, low, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    parts = parts_of(tl.load(weights + at), high.dtype.element_ty)
    tl.store(high + at, parts[0])
    tl.store(low + at, parts[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_two_parts(dtype):
    """Exact to 2^-16 (2^-15 here, as the interpreter truncates to bfloat16), both parts of w's sign and not 0.

    So an infinite x meets infinities of one sign.
    """
    magnitudes = torch.logspace(-3, 3, 1000).float()
    powers = 2.0 ** torch.arange(-8, 16)
    weights = torch.cat(
        [s * w for s in (-1, 1) for w in (magnitudes, powers, magnitudes.to(dtype).float())]
    )
    special = torch.tensor([0.0, float("inf"), float("-inf"), float("nan")])
    weights = torch.cat([special, weights[:4092]])
    high, low = torch.empty(2, 4096, dtype=dtype)
    parts_kernel[1,](weights.contiguous(), high, low, BLOCK=4096)
    high, low = high[: len(weights)].double(), low[: len(weights)].double()
    torch.testing.assert_close(high[:4] + low[:4], special.double(), equal_nan=True)
    w, high, low = weights[4:].double(), high[4:], low[4:]
    assert float(((high + low) / w - 1).abs().max()) <= 2.0**-15
    assert torch.equal(high.sign(), w.sign())
    assert torch.equal(low.sign(), w.sign())


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(
    "call", calls("no_norm", "oktay_2d_odd", "target_g", "coarse_nearest"), ids=str
)
def test_one_value_that_is_not_finite_spreads_as_eagers_does(call, value):
    for name in ("x", "g"):
        tensors = call.case.inputs()
        tensors[name].view(-1)[5] = value
        got = call.spec.function(**tensors, **call.case.options, impl="triton")
        want = call.spec.eager(**tensors, **call.case.options)
        for g, w in zip(testing.as_tuple(got), testing.as_tuple(want), strict=True):
            assert torch.equal(g.isnan(), w.isnan()), name
            assert torch.equal(g.isinf(), w.isinf()), name


def test_softplus_is_accurate_everywhere():
    """Relative to the value: a cancellation would show as 1e-3."""
    h = torch.cat([s * torch.logspace(-6, 2, 400, dtype=torch.float64) for s in (-1, 1)])
    x = h.float().view(1, 1, 1, 1, -1)
    one = torch.ones(1, 1)
    i = Inputs(x, torch.zeros_like(x), one, one, None, torch.ones(1), None)
    q, _ = torch.ops.attnkern.attention_gate_fwd.triton(*i, *Options("softplus", apply=False))
    want = F.softplus(x.double()).flatten()
    error = (q.flatten().double() - want).abs() / want
    assert float(error[want > 1e-6].max()) < 2e-6


@pytest.mark.parametrize("fastest", [1024, 2048, 4096])
def test_tuning_takes_the_fastest_and_moves_no_bit(fastest, monkeypatch):
    def timer(launch, block):
        launch(block)
        timed.append(block)
        return abs(block["BLOCK_P"] * block["BLOCK_C"] - fastest)

    timed = []
    monkeypatch.setattr(tune, "measure", timer)
    monkeypatch.setattr(tune, "_chosen", {})
    spec = GATES[0].spec
    c = case("", 1, 40, (15, 20), 3, gate="softmax")
    plain = testing.run(spec.function, c.inputs(), c.options, impl="triton")
    assert not timed
    monkeypatch.setattr(tune, "enabled", True)
    for _ in range(2):
        tuned = testing.run(spec.function, c.inputs(), c.options, impl="triton")
        assert len(timed) == 3, "every candidate once"
        for (name, got), (_, want) in zip(tuned.items(), plain.items(), strict=True):
            assert torch.equal(got, want), name
    (chosen,) = tune._chosen.values()
    assert chosen["BLOCK_P"] * chosen["BLOCK_C"] == fastest
