"""Results repeat bit for bit, and a sample's result does not depend on its neighbours."""

from __future__ import annotations

import pytest
import torch
from conftest import calls

from attnkern import testing

KINDS = (
    *("resnet", "effnet", "residual_relu_drop_path", "lc0", "one_sample_long", "3d", "prelu"),
    *(
        "pool_long",
        "pool_bags",
        "context_long",
        "latent_queries",
        "additive_mask",
        "gated_branches",
        "gate_long",
        "monai_training",
        "oktay",
        "coarse_training",
    ),
)


def _assert_same(got, want):
    for (name, g), (_, w) in zip(got.items(), want.items(), strict=True):
        assert torch.equal(g, w), name


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
def test_results_repeat_bit_for_bit(call, target, channels_last):
    tensors = call.inputs(target, channels_last=channels_last)
    want = testing.run(call.spec.function, tensors, call.case.options, impl=target.impl)
    for _ in range(5):
        noise = torch.randn(997, device=target.device)  # other memory, other alignment of scratch
        again = testing.run(call.spec.function, tensors, call.case.options, impl=target.impl)
        _assert_same(again, want)
        del noise


@pytest.mark.parametrize("call", calls(*KINDS), ids=str)
def test_many_repeats(call, target, dtype):
    tensors = call.inputs(target, dtype)
    want = testing.run(call.spec.function, tensors, call.case.options, impl=target.impl)
    for _ in range(30):
        _assert_same(
            testing.run(call.spec.function, tensors, call.case.options, impl=target.impl), want
        )


@pytest.mark.parametrize(
    "call", calls("resnet", "residual_relu", "lc0", "monai", "gate_1d"), ids=str
)
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
def test_a_sample_does_not_depend_on_its_neighbours(call, target, channels_last):
    """Within one batch size: exchanging samples exchanges results, to the bit."""
    if target.impl == "reference":
        pytest.skip("a matmul of torch promises nothing of the kind")
    tensors = call.inputs(target, channels_last=channels_last)
    per_sample = call.case.per_sample
    size = tensors["x"].shape[0]
    dy = testing.noise_like([tensors["x"]])[0]
    want = testing.run(call.spec.function, tensors, call.case.options, [dy], impl=target.impl)
    for shift in range(1, size):
        moved = {k: t.roll(shift, 0) if k in per_sample else t for k, t in tensors.items()}
        if channels_last:
            moved = {
                k: testing.to_channels_last(t) if k in call.case.maps else t
                for k, t in moved.items()
            }
        got = testing.run(
            call.spec.function, moved, call.case.options, [dy.roll(shift, 0)], impl=target.impl
        )
        assert torch.equal(got.outputs[0], want.outputs[0].roll(shift, 0))
        for name in per_sample:
            if name in tensors:
                assert torch.equal(got.grads[name], want.grads[name].roll(shift, 0)), name


@pytest.mark.parametrize("call", calls(*KINDS), ids=str)
def test_the_number_of_threads_changes_nothing_beyond_rounding(call, target):
    """Work is split by samples and channels; only sums over the batch may add in another order."""
    if target.device != "cpu":
        pytest.skip("threads of the CPU")
    tensors = call.inputs(target)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            testing.compare(call.spec, call.case, tensors, impl=target.impl)
    finally:
        torch.set_num_threads(before)
