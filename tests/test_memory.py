"""Memory of training: what is kept for backward, and what is allocated on the way."""

from __future__ import annotations

import gc
import weakref

import gate_modules as copied
import pytest
import torch
from conftest import calls

import attnkern
from attnkern import testing
from attnkern._verdicts import KNOWN
from attnkern.functional import gated_attention_pool, squeeze_excite
from attnkern.ops.attention_gate import cases as gates
from attnkern.ops.attention_gate import checks

B, C, L, R = 4, 64, 4096, 16
MAP = B * C * L * 4
SMALL = 2 * B * C * 4
"""Bytes of a feature map, and of the largest [B, C]-sized tensor (the 2C logits of scale_shift)."""


def _inputs(target, **more):
    shapes = {"x": (B, C, L), "w1": (R, C), "b1": (R,), "w2": (C, R), "b2": (C,), **more}
    generator = torch.Generator().manual_seed(0)
    return {
        k: torch.randn(s, generator=generator).to(target.device).requires_grad_()
        for k, s in shapes.items()
    }


def _saved_bytes(target, tensors, **options):
    """Bytes kept for backward that are not an input of the call."""
    inputs = {t.untyped_storage().data_ptr() for t in tensors.values()}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in inputs:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = squeeze_excite(**tensors, **options, impl=target.impl)
    assert y.untyped_storage().data_ptr() not in kept, "the output is saved"
    return sum(kept.values())


def _allocations(target, function):
    """Sizes of all allocations while ``function`` runs, C++ included."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if target.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = function()
    events = profile.profiler.kineto_results.events()
    sizes = [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]
    assert sizes, "the profiler saw no allocation"
    return sizes, result


@pytest.mark.parametrize("out_act", ["identity", "relu", "relu6"])
def test_training_keeps_only_small_tensors_and_a_bit_an_element(target, out_act):
    if target.impl == "reference":
        pytest.skip("the reference keeps what autograd keeps")
    bits = 0 if out_act == "identity" else B * C * L // 8
    for more in ({}, {"residual": (B, C, L)}):
        tensors = _inputs(target, **more)
        kept = _saved_bytes(target, tensors, out_act=out_act)
        assert kept <= bits + 2 * SMALL, "mean, hidden and logits, and the bits of the activation"
        assert kept >= bits


@pytest.mark.parametrize("out_act", ["identity", "relu"])
def test_nothing_larger_than_small_is_allocated_besides_y_and_dx(target, out_act):
    """A workspace holds a few partial sums a thread or block, never a map."""
    if target.impl == "reference":
        pytest.skip("the reference allocates what autograd allocates")
    tensors = _inputs(target)
    options = dict(out_act=out_act, impl=target.impl)
    sizes, y = _allocations(target, lambda: squeeze_excite(**tensors, **options))
    bits = B * C * L // 8
    assert sorted(s for s in sizes if s > MAP // 64) == ([bits] if out_act == "relu" else []) + [
        MAP
    ]
    dy = torch.randn_like(y)
    sizes, _ = _allocations(target, lambda: torch.autograd.grad(y, list(tensors.values()), dy))
    assert [s for s in sizes if s > MAP // 64] == [MAP]


def test_eager_keeps_and_allocates_more(target):
    """The yardstick is real: the same measurement sees eager's maps."""
    (call,) = calls("resnet")
    tensors = _inputs(target)
    sizes, y = _allocations(target, lambda: call.spec.eager(**tensors, out_act="relu"))
    assert sum(s >= MAP for s in sizes) >= 2
    sizes, _ = _allocations(target, lambda: y.sum().backward())
    assert sum(s >= MAP for s in sizes) >= 2


def _bag(target, items=20_000, features=64, hidden=16):
    shapes = {
        "x": (1, items, features),
        "V": (hidden, features),
        "U": (hidden, features),
        "w": (1, hidden),
    }
    generator = torch.Generator().manual_seed(0)
    return {
        k: torch.randn(s, generator=generator).to(target.device).requires_grad_()
        for k, s in shapes.items()
    }


def test_a_gated_pool_keeps_and_allocates_nothing_of_the_size_of_its_hidden_layer(target):
    """[N, K] here is a quarter of x; scores are a number an item."""
    if target.impl == "reference":
        pytest.skip("the reference keeps what autograd keeps")
    tensors = _bag(target)
    inputs = {t.untyped_storage().data_ptr() for t in tensors.values()}
    kept = []
    bag, scores = 20_000 * 64 * 4, 20_000 * 4

    def pack(t):
        if t.untyped_storage().data_ptr() not in inputs:
            kept.append(t.untyped_storage().nbytes())
        return t

    def pool():
        return gated_attention_pool(
            **tensors, b_V=None, b_U=None, return_scores=True, impl=target.impl
        )

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = pool()
    assert sum(kept) <= 4096, "z and lse"
    sizes, outputs = _allocations(target, pool)
    assert max(sizes) <= 2 * scores, "scores and workspace"
    grads = testing.noise_like(outputs)
    sizes, _ = _allocations(
        target, lambda: torch.autograd.grad(outputs, list(tensors.values()), grads)
    )
    large = sorted(sizes)[-2:]
    assert large[1] == bag
    # partial sums of the parameters' gradients, and a thread's tiles
    workspace = bag // 8 + (1 << 18)
    assert large[0] <= workspace
    tensors["x"].requires_grad_(False)
    frozen = [tensors["V"], tensors["w"]]
    sizes, _ = _allocations(target, lambda: torch.autograd.grad(pool(), frozen, grads))
    assert max(sizes) <= workspace, "frozen items"


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("norms", [None, "track"])
def test_a_gate_keeps_and_allocates_nothing_of_the_size_of_its_hidden_layer(
    target, norms, channels_last
):
    """[B, F, L] here is half of x; logits and alpha are a number a position."""
    if target.impl == "reference":
        pytest.skip("the reference keeps what autograd keeps")
    c = gates.case("", 2, 64, (96, 96), 32, norms=norms)
    tensors = c.inputs(device=target.device, channels_last=channels_last, requires_grad=True)
    positions, size = 2 * 96 * 96 * 4, 2 * 64 * 96 * 96 * 4
    inputs = {t.untyped_storage().data_ptr() for t in tensors.values()}
    kept = []

    def pack(t):
        if t.untyped_storage().data_ptr() not in inputs:
            kept.append(t.untyped_storage().nbytes())
        return t

    def gate():
        return gates.call(**tensors, **c.options, impl=target.impl)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        gate()
    small = 16 * 64 * 32 * 4  # folded weights
    assert sum(kept) <= (1 if norms is None else 6) * positions + small, "logits, alpha, q_hat"
    sizes, y = _allocations(target, gate)
    assert [s for s in sizes if s > size // 8] == [size], "y"
    dy = torch.randn_like(y)
    sizes, _ = _allocations(target, lambda: torch.autograd.grad(y, list(tensors.values()), dy))
    maps = [s for s in sizes if s > size // 4]  # partial sums of the weights' gradients are below
    # dx and dg; with statistics over the batch the gradient of the multiply is written first
    assert maps == [size] * (2 if norms is None else 3)


def test_nothing_is_kept_alive(target):
    """No cycle holds the maps: they go with the last reference, collector off."""
    gc.collect()
    gc.disable()
    try:
        tensors = _inputs(target)
        y = squeeze_excite(**tensors, out_act="relu", impl=target.impl)
        seen = [weakref.ref(y), weakref.ref(tensors["x"])]
        y.sum().backward()
        del y, tensors
        assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()


def test_the_memory_of_admitted_calls_is_bounded(target):
    from attnkern.ops.squeeze_excite import op

    w = torch.ones(1, 1, device=target.device)
    for length in range(1, 1200):
        squeeze_excite(torch.ones(1, 1, length, device=target.device), w, impl=target.impl)
        squeeze_excite(torch.ones(1, 1, 1), w.cpu(), gain=float(length), impl="reference")
    assert len(op._calls) <= KNOWN
    assert max(len(call.verdicts) for call in op._calls.values()) <= KNOWN


def test_the_memory_of_admitted_gates_is_bounded(target):
    gate = copied.Attention_block(2, 2, 1).to(target.device).eval()
    attnkern.optimize(gate, impl=target.impl, strict=True)
    with torch.no_grad():
        for length in range(1, 300):
            x = torch.ones(1, 2, 1, length, device=target.device)
            gate(x, x)
    verdicts = gate.__dict__["_reading"].value.verdicts
    assert len(verdicts) <= KNOWN
    assert len(checks._admitted) <= KNOWN


def test_inference_allocates_no_bits(target):
    if target.impl == "reference":
        pytest.skip("the reference has no bits")
    tensors = _inputs(target)
    with torch.no_grad():
        sizes, y = _allocations(
            target, lambda: squeeze_excite(**tensors, out_act="relu", impl=target.impl)
        )
    assert [s for s in sizes if s > MAP // 64] == [MAP]
    assert testing.as_tuple(y)[0].grad_fn is None
