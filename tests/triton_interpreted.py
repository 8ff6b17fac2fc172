"""Run by test_triton_interpret.py in a process with TRITON_INTERPRET=1.

The interpreter is wrong for some products of bfloat16 matrices; there the kernels multiply matrices
of float32 alone, so no dtype is left out.  triton_interpreted_pools.py has what only pools have.
"""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import CALLS, calls
from triton_kinds import check

from attnkern import _layout, testing
from attnkern._triton import linear, tune
from attnkern.functional import squeeze, squeeze_excite
from attnkern.ops.squeeze_excite import op, reference, triton_plan
from attnkern.ops.squeeze_excite import triton as launchers
from attnkern.ops.squeeze_excite.cases import case

SPEC = next(call.spec for call in CALLS if call.spec.name == "squeeze_excite")
KINDS = ("float32-first", "float32-last", "bfloat16-first", "float16-last")


def launch_by(strategy, monkeypatch):
    """Force small samples to take separate launches over tiles, or one; the other is taken away."""
    if strategy == "tiles":
        monkeypatch.setattr(triton_plan, "SAMPLE_ELEMENTS", 0)
        absent = ("sample_fwd_kernel", "sample_bwd_kernel")
    else:
        absent = ("pool_kernel", "rescale_kernel", "reduce_kernel", "apply_grad_kernel")
    for kernel in absent:
        monkeypatch.setattr(launchers, kernel, None)


@pytest.fixture(params=["tiles", "sample"])
def strategy(request, monkeypatch):
    launch_by(request.param, monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "call", [call for call in CALLS if call.spec.operator.startswith("squeeze")], ids=str
)
def test_every_case_within_the_budget(call, kind, monkeypatch):
    launch_by("tiles", monkeypatch)
    check(call, kind)


@pytest.mark.parametrize("kind", ["bfloat16-first", "float32-last"])
@pytest.mark.parametrize("call", [call for call in CALLS if call.spec is SPEC], ids=str)
def test_every_case_with_a_program_a_sample(call, kind, monkeypatch):
    launch_by("sample", monkeypatch)
    check(call, kind)


@pytest.mark.parametrize("fastest", [512, 1024, 2048, 4096])
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
def test_tuning_takes_the_fastest_and_moves_no_bit(channels_last, fastest, monkeypatch):
    def timer(launch, blocks):
        launch(blocks)
        timed.append(blocks)
        return abs(blocks["ROWS"] * blocks["COLS"] - fastest)

    def grid(shape, blocks):
        launched.append(blocks)
        return exact_grid(shape, blocks)

    timed, launched, exact_grid = [], [], triton_plan.grid
    monkeypatch.setattr(triton_plan, "grid", grid)
    monkeypatch.setattr(tune, "measure", timer)
    monkeypatch.setattr(tune, "_chosen", {})
    launch_by("tiles", monkeypatch)
    c = case("", 2, 60, (4, 15), 9, residual=True, out_act="relu")
    tensors = c.inputs(channels_last=channels_last)
    run = functools.partial(testing.run, squeeze_excite, tensors, c.options, impl="triton")
    plain = run()
    heuristic = list(launched)
    assert not timed

    monkeypatch.setattr(tune, "enabled", True)
    tuned = testing.compare(SPEC, c, tensors, impl="triton")
    (chosen, others), seen = tune._chosen.values(), len(timed)
    assert seen >= 6, "three candidates at least of both kernels"
    for best in (chosen, others):
        assert best in timed
    del launched[:]
    again = run()
    assert launched == [chosen, others], "the choice is launched, in both directions"
    assert len(timed) == seen, "and measured once"
    assert [blocks["ROWS"] * blocks["COLS"] for blocks in launched] == [fastest, fastest]
    assert (launched == heuristic) == (fastest == 2048)
    for (name, want), (_, one), (_, two) in zip(
        plain.items(), tuned.items(), again.items(), strict=True
    ):
        assert torch.equal(one, want), name
        assert torch.equal(two, want), name


@pytest.mark.parametrize("act", ["gelu", "prelu"])
def test_samples_that_share_tiles_of_the_weights(act, monkeypatch):
    launch_by("tiles", monkeypatch)
    monkeypatch.setattr(linear, "SHARED_WEIGHTS", 0)
    options = {"prelu": 19} if act == "prelu" else {"act": act}
    c = case("", 17, 37, (1, 2), 19, **options)
    testing.compare(SPEC, c, c.inputs(), impl="triton")


SLICES = {
    "batch": lambda make: make(7, 6, 5, 4)[1::3],
    "channels": lambda make: make(2, 9, 5, 4)[:, 2:8],
    "batch and channels": lambda make: make(4, 9, 5, 4)[::2, 1:7],
    "expanded batch": lambda make: make(1, 6, 5, 4).expand(2, 6, 5, 4),
}


@pytest.mark.usefixtures("strategy")
@pytest.mark.parametrize(
    ("name", "out_act"), [*((name, "relu") for name in SLICES), ("batch and channels", "silu")]
)
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
def test_slices_give_the_bits_of_their_copies(name, channels_last, out_act):
    def make(*shape):
        x = torch.randn(shape, generator=generator)
        return testing.to_channels_last(x) if channels_last else x

    generator = torch.Generator().manual_seed(0)
    maps = [SLICES[name](make) for _ in range(3)]
    w1, w2 = make(3, 6, 1, 1).flatten(1), make(6, 3, 1, 1).flatten(1)
    results = []
    for copied in (False, True):
        x, residual, dy = (t.clone() if copied else t for t in maps)
        if channels_last:
            x, residual, dy = map(testing.to_channels_last, (x, residual, dy)) if copied else maps
        tensors = {"x": x, "w1": w1, "w2": w2, "residual": residual}
        results.append(
            testing.run(
                squeeze_excite, tensors, {"b1": None, "out_act": out_act}, [dy], impl="triton"
            )
        )
    for (what, got), (_, want) in zip(results[0].items(), results[1].items(), strict=True):
        assert torch.equal(got, want), what


@pytest.mark.usefixtures("strategy")
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
def test_an_expanded_gradient(channels_last):
    call = calls("residual_relu_drop_path")[0]
    tensors = call.case.inputs(channels_last=channels_last)
    shape = tensors["x"].shape
    grads = [torch.ones(()).expand(shape), torch.ones(shape)]
    got, want = (
        testing.run(squeeze_excite, tensors, call.case.options, [dy], impl="triton") for dy in grads
    )
    for name, grad in got.grads.items():
        assert torch.equal(grad, want.grads[name]), name


@pytest.mark.usefixtures("strategy")
@pytest.mark.parametrize("name", ["resnet", "prelu", "residual_relu_drop_path", "src_shift"])
def test_no_samples(name):
    call = calls(name)[0]
    empty = {
        k: t[:0] if k in (*call.case.maps, "src", "drop_path") else t
        for k, t in call.case.inputs().items()
    }
    got = testing.run(call.spec.function, empty, call.case.options, impl="triton")
    for name, grad in got.grads.items():
        assert grad.shape == empty[name].shape
        assert torch.equal(grad, torch.zeros_like(grad)), name


def test_no_samples_to_squeeze():
    assert squeeze(torch.empty(0, 5, 3, 3), impl="triton").shape == (0, 5)


@pytest.mark.parametrize("out_act", ["relu", "relu6"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
def test_the_mask_is_the_derivative_bit_by_bit(channels_last, out_act):
    """Bytes of the layout's rows, least significant bit first, zeros past the end of a row."""
    x, logits = torch.randn(2, 13, 3, 7) * 4, torch.randn(2, 13)
    if channels_last:
        x = testing.to_channels_last(x)
    options = reference.Options(gate="identity", out_act=out_act)
    absent = (None,) * 7
    arguments = (x, logits, *absent, *options, True)
    saved = torch.ops.attnkern.squeeze_excite_fwd.triton(*arguments)
    for got, fake in zip(saved, op._fwd_fake(*arguments), strict=True):
        assert (got.shape, got.dtype, got.stride()) == (fake.shape, fake.dtype, fake.stride())
    u = x * logits[:, :, None, None]
    bits = (u > 0) & (u < (6 if out_act == "relu6" else float("inf")))
    mask = saved[-1]
    assert torch.equal(reference.unpack_mask(mask, x, _layout.is_channels_last(x)).bool(), bits)
    assert sum(int(byte).bit_count() for byte in mask.flatten()) == int(bits.sum())


@pytest.mark.parametrize("function", ["sigmoid", "tanh", "mish", "silu"])
def test_activations_are_accurate_everywhere(function):
    """Relative to the value: a cancellation would show as 1e-3."""
    x = torch.cat([s * torch.logspace(-6, 2, 400, dtype=torch.float64) for s in (-1, 1)])
    logits = x.float()[None]
    ones = torch.ones(1, x.numel(), 1)
    if function in ("sigmoid", "tanh"):
        got = squeeze_excite(ones, None, src=logits, gate=function, impl="triton").flatten()
        want = getattr(torch, function)(logits.double()).flatten()
    else:
        weight = torch.eye(x.numel())
        got = squeeze_excite(
            ones, weight, None, weight, src=logits, act=function, gate="identity", impl="triton"
        ).flatten()
        want = reference.activation(logits.double(), function).flatten()
    error = (got.double() - want).abs() / want.abs().clamp_min(1e-30)
    meaningful = want.abs() > 1e-6
    assert float(error[meaningful].max()) < 2e-6
    assert torch.isfinite(got).all()
