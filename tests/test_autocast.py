"""Autocast: y has the dtype eager's has, gradients the dtype of their inputs, and sums stay in float32."""

from __future__ import annotations

import pytest
import torch
from conftest import calls

from attnkern import testing


def _dtypes(target):
    return (torch.bfloat16,) if target.device == "cpu" else (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", calls("resnet", "residual_relu", "lc0", "ese"), ids=str)
def test_dtypes_are_those_of_eager(call, target, x_dtype):
    for cast in _dtypes(target):
        tensors = call.inputs(target, x_dtype, weight_dtype=torch.float32)
        leaves = {k: t.requires_grad_() for k, t in tensors.items()}
        with torch.autocast(target.device, dtype=cast):
            y = call.run(target, leaves)
            want = call.spec.eager(**leaves, **call.case.options)
        assert y.dtype == want.dtype == x_dtype
        y.float().square().sum().backward()
        for name, t in leaves.items():
            assert t.grad.dtype == t.dtype, name


@pytest.mark.parametrize("call", calls("resnet", "residual_silu", "gate_returned"), ids=str)
def test_autocast_changes_no_bit(call, target, dtype):
    """Everything of size [B, C] is in float32 already: there is nothing to cast."""
    tensors = call.inputs(target, dtype)
    want = testing.run(call.spec.function, tensors, call.case.options, impl=target.impl)
    for cast in _dtypes(target):
        with torch.autocast(target.device, dtype=cast):
            got = testing.as_tuple(call.run(target, tensors))
        for g, w in zip(got, want.outputs, strict=True):
            assert torch.equal(g, w)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "call",
    calls(
        "pool", "context", "latent", "query_keys", "additive_tanh", "gated_branches", "gated_bags"
    ),
    ids=str,
)
def test_pools_lower_their_items_as_attention_does(call, target, x_dtype):
    for cast in _dtypes(target):
        leaves = call.inputs(target, x_dtype, weight_dtype=torch.float32, requires_grad=True)
        lowered = {k: t.detach().to(cast) if k in call.case.maps else t for k, t in leaves.items()}
        with torch.autocast(target.device, dtype=cast):
            z = testing.as_tuple(call.run(target, leaves))[0]
            eager = testing.as_tuple(call.spec.eager(**leaves, **call.case.options))[0]
        assert z.dtype == eager.dtype == cast
        assert torch.equal(z, testing.as_tuple(call.run(target, lowered))[0])
        z.float().square().sum().backward()
        for name, t in leaves.items():
            assert t.grad is None or t.grad.dtype == t.dtype, name
        assert leaves[call.case.maps[0] if call.case.maps[0] in leaves else "x"].grad is not None


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "call",
    calls("monai", "monai_training", "oktay", "out", "target_g_norm", "target_g_coarse"),
    ids=str,
)
def test_gates_keep_the_dtype_of_what_they_multiply(call, target, x_dtype):
    """Eager lowers the convolutions alone, and alpha is promoted to its target's dtype; here nothing is lowered."""
    other = "x" if call.case.options.get("target") == "g" else "g"
    for cast in _dtypes(target):
        leaves = call.inputs(target, x_dtype, weight_dtype=torch.float32, requires_grad=True)
        with torch.autocast(target.device, dtype=cast):
            y = testing.as_tuple(call.run(target, leaves))[0]
            alone = testing.as_tuple(call.run(target, {**leaves, other: leaves[other].to(cast)}))[0]
        assert y.dtype == alone.dtype == x_dtype
        assert torch.equal(y, testing.as_tuple(call.run(target, leaves))[0])
        y.float().square().sum().backward()
        for name, t in leaves.items():
            assert t.grad.dtype == t.dtype, name


def test_behind_a_layer_that_autocast_lowers(target):
    """A convolution hands over bfloat16 while the weights stay float32."""
    (call,) = calls("resnet")
    t = call.inputs(target, requires_grad=True)
    conv = torch.nn.Conv2d(64, 64, 1).to(target.device)
    with torch.autocast(target.device, dtype=torch.bfloat16):
        y = call.run(target, {**t, "x": conv(t["x"])})
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert conv.weight.grad.dtype == t["w1"].grad.dtype == torch.float32
    assert conv.weight.grad.isfinite().all()


def test_double_backward_under_autocast(target):
    (call,) = calls("resnet")
    t = call.inputs(target, requires_grad=True)

    def second(enabled):
        with torch.autocast(target.device, dtype=torch.bfloat16, enabled=enabled):
            y = call.run(target, t)
        # the reference's backward is autograd's, whose matmuls autocast lowers: ours alone runs inside
        inside = enabled and target.impl != "reference"
        with torch.autocast(target.device, dtype=torch.bfloat16, enabled=inside):
            (dx,) = torch.autograd.grad(y.sum(), t["x"], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), t["w1"])[0]

    torch.testing.assert_close(second(True), second(False))
