"""The reference's formulas: its backward against autograd of its forward, over the product of the options."""

from __future__ import annotations

import itertools

import pytest
import torch

from attnkern.ops.softmax_pool import reference as pool_reference
from attnkern.ops.squeeze_excite import reference as R

BATCH, CHANNELS, LENGTH, HIDDEN = 2, 3, 5, 4


def _arguments(layers, act, apply, residual, drop_path):
    make = dict(dtype=torch.float64, requires_grad=True)
    width = 2 * CHANNELS if apply == "scale_shift" else CHANNELS
    first = HIDDEN if layers == 2 else width
    return (
        torch.randn(BATCH, CHANNELS, LENGTH, **make),
        torch.randn(BATCH, width, **make) if layers == 0 else None,
        torch.randn(first, CHANNELS, **make) if layers else None,
        torch.randn(first, **make) if layers else None,
        torch.randn(width, HIDDEN, **make) if layers == 2 else None,
        torch.randn(width, **make) if layers == 2 else None,
        torch.rand(HIDDEN, **make) if act == "prelu" and layers == 2 else None,
        torch.randn(BATCH, CHANNELS, LENGTH, **make) if residual else None,
        torch.rand(BATCH, **make) if drop_path else None,
    )


@pytest.mark.parametrize("out_act", R.OUT_ACTS)
@pytest.mark.parametrize("apply", R.APPLIES)
@pytest.mark.parametrize("gate", R.GATES)
def test_backward_equals_autograd_of_forward(gate, apply, out_act):
    for act, layers, residual, drop_path in itertools.product(
        R.ACTS, (0, 1, 2), (False, True), (False, True)
    ):
        if layers < 2 and act != "relu":
            continue  # no hidden layer to act on
        torch.manual_seed(0)
        options = R.Options(act, 0.1, gate, 0.2, 0.5, apply, 1.5, out_act)
        tensors = _arguments(layers, act, apply, residual, drop_path)
        y, logits = R.forward(*tensors, options)
        dy, dlogits = torch.randn_like(y), torch.randn_like(logits)
        given = [t for t in tensors if t is not None]
        want = torch.autograd.grad((y, logits), given, (dy, dlogits))
        got = [
            g
            for g, t in zip(R.backward(dy, dlogits, *tensors, options), tensors, strict=True)
            if t is not None
        ]
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-11, msg=f"{options} {layers}")


@pytest.mark.parametrize("act", R.ACTS)
def test_activation_gradients_match_torch_at_the_kinks(act):
    h = torch.tensor(
        [-6.0, -3.0, -1.0, -0.0, 0.0, 1.0, 3.0, 6.0, 7.0], dtype=torch.float64, requires_grad=True
    )
    weight = torch.tensor([0.25], dtype=torch.float64)
    torch_act = {
        "identity": lambda h: h,
        "leaky_relu": lambda h: torch.nn.functional.leaky_relu(h, 0.1),
        "prelu": lambda h: torch.nn.functional.prelu(h, weight),
    }.get(act) or getattr(torch.nn.functional, act)
    (want,) = torch.autograd.grad(torch_act(h).sum(), h)
    torch.testing.assert_close(R.activation(h, act, 0.1, weight), torch_act(h), rtol=0, atol=0)
    torch.testing.assert_close(
        R.activation_grad(h.detach(), act, 0.1, weight), want, rtol=1e-15, atol=1e-15
    )


@pytest.mark.parametrize("gate", R.GATES)
def test_gate_gradients_match_torch_at_the_kinks(gate):
    z = torch.tensor(
        [-4.0, -3.0, -1.0, -0.0, 0.0, 1.0, 3.0, 4.0], dtype=torch.float64, requires_grad=True
    )
    torch_gate = {"identity": lambda z: z, "hard_sigmoid": torch.nn.functional.hardsigmoid}.get(
        gate
    )
    torch_gate = torch_gate or getattr(torch, gate)
    (want,) = torch.autograd.grad(torch_gate(z).sum(), z)
    torch.testing.assert_close(R.gate_value(z, gate), torch_gate(z), rtol=1e-15, atol=1e-15)
    # torch's hardsigmoid multiplies by 1/6 rounded to float32
    torch.testing.assert_close(R.gate_grad(z.detach(), gate), want, rtol=2**-24, atol=1e-15)


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize(
    "shape", [(2, 3, 5), (1, 8, 3, 3), (2, 9, 2, 2, 4), (3, 1, 17), (2, 17, 1, 1)]
)
def test_unpack_mask_inverts_packing(shape, channels_last):
    """Rows of bits, least significant first, padded to whole bytes."""
    batch, channels, *_ = shape
    bits = torch.randint(0, 2, shape, dtype=torch.uint8)
    rows = bits.flatten(2)
    rows = (
        rows.transpose(1, 2).reshape(-1, channels)
        if channels_last
        else rows.reshape(batch * channels, -1)
    )
    mask = torch.zeros(rows.shape[0], -(-rows.shape[1] // 8), dtype=torch.uint8)
    for column in range(rows.shape[1]):
        mask[:, column // 8] |= rows[:, column] << (column % 8)
    assert torch.equal(R.unpack_mask(mask, torch.empty(shape), channels_last), bits)


def test_the_mean_of_a_constant_map_is_exact_and_does_not_overflow():
    for value, dtype in ((65504.0, torch.float16), (1e36, torch.bfloat16), (0.75, torch.float32)):
        x = torch.full((1, 2, 64), value, dtype=dtype)
        assert torch.equal(R.squeeze(x).to(dtype), x[:, :, 0])


# ------------------------------------------------------------------ softmax_pool


def _pool_inputs(scorer, ragged, heads, own_query, masked, gate):
    """Normal form: B = 3 samples or bags (one empty), N = 7 items."""

    def make(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    batch, items, features, queries, hidden = 3, 7, 4, 2, 5
    rows = (1 if ragged else batch, heads)
    per_sample = batch if own_query else 1
    t = {"values": make(*rows, items, features)}
    if scorer == "given":
        t["scores"] = make(*rows, queries, items)
    elif scorer == "dot":
        t["query"] = make(per_sample, heads, queries, features)
    elif scorer == "additive":
        t |= {"keys": make(*rows, items, hidden), "w": make(1, hidden)}
        t["query"] = make(per_sample, heads, queries, hidden)
    else:
        t |= {"V": make(hidden, features), "b_V": make(hidden), "w": make(queries, hidden)}
        if gate:
            t |= {"U": make(hidden, features), "b_U": make(hidden)}
    if scorer != "given":
        t["c"] = make(per_sample, heads, queries)
    if masked:
        bias = torch.randn(rows[0], 1, queries, items, dtype=torch.float64)
        bias[0, 0, 0] = float("-inf")
        t["bias"] = bias.requires_grad_()
    if ragged:
        t["offsets"] = torch.tensor([0, 3, 3, 7])
    return pool_reference.Inputs(**t)


@pytest.mark.parametrize("act", pool_reference.ACTS)
@pytest.mark.parametrize("scorer", pool_reference.SCORERS)
def test_pool_backward_equals_autograd_of_forward(scorer, act):
    switches = itertools.product((False, True), (1, 2), (False, True), (False, True), (False, True))
    for ragged, heads, own_query, masked, gate in switches:
        if (scorer == "gated" and heads > 1) or (scorer != "gated" and gate):
            continue
        torch.manual_seed(0)
        i = _pool_inputs(scorer, ragged, heads, own_query, masked, gate)
        o = pool_reference.Options(scorer, act, 0.7)
        z, lse, e = pool_reference.forward(i, o)
        dz, dlse, dscores = torch.randn_like(z), torch.randn_like(lse), torch.randn_like(e)
        names = [n for n, t in zip(i._fields, i, strict=True) if t is not None and n != "offsets"]
        leaves = [getattr(i, n) for n in names]
        want = dict(
            zip(names, torch.autograd.grad((z, lse, e), leaves, (dz, dlse, dscores)), strict=True)
        )
        got = pool_reference.backward(dz, dlse, dscores, i, o)._asdict()
        dl = got.pop("logits")
        if scorer == "given":
            got["scores"] = o.scale * dl + dscores
        if masked:
            got["bias"] = dl.sum_to_size(i.bias.shape)
        for name in names:
            if name != "c":  # known without the kernels: tests/ops/test_softmax_pool.py
                torch.testing.assert_close(
                    got[name],
                    want[name],
                    rtol=1e-10,
                    atol=1e-11,
                    msg=f"{name}: {o} {ragged} {heads}",
                )


@pytest.mark.parametrize("act", pool_reference.ACTS)
def test_pool_activation_gradients_match_torch_at_the_kinks(act):
    h = torch.tensor([-9.0, -1.0, -0.0, 0.0, 1.0, 9.0], dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad(pool_reference.activation(h, act).sum(), h)
    got = pool_reference.activation_grad(h.detach(), act)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-15)
