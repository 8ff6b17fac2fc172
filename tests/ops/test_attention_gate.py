"""What only gates promise: batch statistics as torch's, resampling as torch's, alpha, and what is saved."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from gate_blocks import check_nearest, positions
from torch import nn

from attnkern import _native
from attnkern._checks import DTYPES
from attnkern.functional import BatchNorm, attention_gate
from attnkern.ops.attention_gate import cases, functions, op, reference
from attnkern.ops.attention_gate.resample import adjoint, resize, taps
from attnkern.testing import as_tuple, noise_like, run


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ------------------------------------------------------------------ derivation


@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.name)
def test_derived_gradients_are_those_of_autograd(case, monkeypatch):
    """`reference.backward`, `sums` and the centring of statistics, against autograd in float64."""
    tensors = case.inputs(torch.float64)
    with torch.no_grad():
        outputs = as_tuple(cases.call(**tensors, **case.options, impl="reference"))
    grads = noise_like(outputs)
    want = run(cases.call, tensors, case.options, grads, impl="reference")

    def derived(i, o, norms, more):
        return op._Gate.apply("reference", o, norms, *op.readable(i), *more)

    monkeypatch.setattr(op, "_by_autograd", derived)
    got = run(cases.call, tensors, case.options, grads, impl="reference")
    for (name, a), (_, b) in zip(got.items(), want.items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("given", itertools.product([False, True], repeat=3), ids=str)
def test_every_gradient_of_a_folded_norm(given, target):
    """Those of the running statistics too, which autograd of the same formulas has."""
    if target.impl == "reference":
        pytest.skip("the reference is no operator")
    if not target.serves(torch.float64):
        pytest.skip("it has no float64")
    sizes = [(3, 4), *((3,) if present else None for present in given), (3,), (3,)]
    leaves = [None if s is None else torch.rand(s, dtype=torch.float64) + 0.1 for s in sizes]
    leaves = [None if t is None else t.requires_grad_() for t in leaves]
    present = [t for t in leaves if t is not None]

    def fold(*tensors):
        left = iter(tensors)
        return op.fold(target.impl, *(t if t is None else next(left) for t in leaves), 1e-3)

    assert torch.autograd.gradcheck(fold, present)
    assert torch.autograd.gradgradcheck(fold, present)


# ------------------------------------------------------------------ resampling

MODES = [("nearest", False), ("linear", False), ("linear", True)]


@pytest.mark.parametrize(("mode", "align_corners"), MODES)
def test_taps_are_those_of_interpolate(mode, align_corners):
    for size, out in itertools.product((*range(1, 24), 31, 57), (*range(1, 24), 37, 64, 99)):
        values = torch.randn(1, 1, size)
        corners = None if mode == "nearest" else align_corners
        want = F.interpolate(values, out, mode=mode, align_corners=corners)
        index, weight = taps((size,), (out,), mode, align_corners, values.dtype, values.device)
        index, weight = index[2:], weight[2:]  # past two dims of one position
        got = (values[0, 0, index] * weight).sum(1)
        torch.testing.assert_close(got, want[0, 0], rtol=1e-5, atol=1e-5, msg=f"{size} to {out}")
        assert index.min() >= 0
        assert index.max() < size


@pytest.mark.parametrize("align_corners", [False, True])
def test_the_gathered_gradient_of_interpolate_is_torchs(align_corners):
    """Of every two sizes, up and down; the others have dims that differ."""
    sizes = [((size,), (out,)) for size in (*range(1, 12), 31) for out in (*range(1, 14), 64, 99)]
    sizes += [((5, 4), (9, 11)), ((1, 6), (3, 13)), ((3, 2, 5), (7, 2, 9)), ((4, 4, 4), (2, 8, 12))]
    for size, out in sizes:
        mode = ("linear", "bilinear", "trilinear")[len(size) - 1]
        alpha = torch.randn(2, 1, *size, dtype=torch.float64, requires_grad=True)
        d = torch.randn(2, 1, *out, dtype=torch.float64)
        y = F.interpolate(alpha, out, mode=mode, align_corners=align_corners)
        (want,) = torch.autograd.grad(y, alpha, d)
        torch.testing.assert_close(adjoint(d, size, mode, align_corners), want, msg=f"{size} {out}")


def test_only_the_cpu_takes_torchs_gradient_of_linear_interpolation():
    """On a GPU it adds up in any order.  The meta device stands for one."""
    for device, own in (("cpu", False), ("meta", True)):
        alpha = torch.ones(2, 1, 3, 4, device=device, requires_grad=True)
        y = resize(alpha, (7, 8), "bilinear", False)
        assert (type(y.grad_fn).__name__ == "_LinearBackward") == own
        (d,) = torch.autograd.grad(y.sum(), alpha)
        assert d.shape == alpha.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_every_nearest_position_is_torchs(dims, dtype):
    """Of 1 to 64 positions to 1 to 64, each dim in turn."""
    accumulated = torch.promote_types(dtype, torch.float32)
    for size, out in itertools.product(range(1, 65), repeat=2):
        axis = (size + out) % dims
        values, grid = positions(size, out, dims, axis)
        want = F.interpolate(values.to(dtype), grid, mode="nearest").long()
        index, weight = taps(values.shape[2:], grid, "nearest", False, accumulated, values.device)
        of_dims = index[3 - dims :, 0].split(grid)
        got = values[0, 0][torch.meshgrid(*of_dims, indexing="ij")]
        assert torch.equal(got, want[0, 0]), f"{size} to {out}"
        assert torch.equal(weight[:, 0], torch.ones(len(weight), dtype=accumulated))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_gates_take_torchs_nearest_positions(dims, dtype, target):
    if target.serves(dtype):
        check_nearest(dims, dtype, target.impl, target.device)


def test_infinity_in_a_map_at_nearest_positions_spreads_as_eagers_does(target):
    """Both taps are one position: 0 times its infinity has no part in the sum."""
    x, g = torch.randn(1, 3, 9), torch.randn(1, 3, 4)
    weights = {
        "theta_weight": torch.randn(16, 3),
        "phi_weight": torch.rand(16, 3),
        "psi_weight": torch.rand(1, 16),
    }
    g[0, 1, 0] = float("inf")
    maps = {k: t.to(target.device) for k, t in {"x": x, "g": g, **weights}.items()}
    want, got = (
        run(f, maps, {"upsample": "nearest", **options})
        for f, options in ((cases.eager, {}), (cases.call, {"impl": target.impl}))
    )
    assert want.outputs[0].isfinite().all()
    for (name, a), (_, b) in zip(got.items(), want.items(), strict=True):
        assert torch.equal(a.isfinite(), b.isfinite()), name
        assert torch.equal(a.isnan(), b.isnan()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_weight_of_any_digits_meets_infinity_once(target, dtype):
    """In parts (0.1 needs two) none has another sign than the weight, none is 0."""
    x = torch.tensor([[[torch.inf, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]], dtype=dtype)
    for weight in (1.0, 1.0 + 2**-20, 1.0 - 2**-20, 0.1, -3e-4, -1.0):
        weights = (
            torch.tensor([[weight, 0.1, 1.0, 1.0]]), None, torch.zeros(1, 4), None, torch.ones(1, 1)
        )  # fmt: skip
        maps = (x.to(target.device), torch.zeros_like(x, device=target.device))
        on_device = (None if w is None else w.to(target.device) for w in weights)
        y, alpha, _ = attention_gate(
            *maps, *on_device, act="leaky_relu", return_alpha=True, impl=target.impl
        )
        assert alpha[0, 0, 0] == (weight > 0), weight
        assert y[0, 1:, 0].isfinite().all(), weight


def test_resampling_and_its_adjoint_agree():
    i = reference.Inputs(
        *(torch.empty(1, 1, 6, 4, 9), torch.randn(2, 3, 2, 5, 4, dtype=torch.float64)),
        *(torch.empty(1), None, None, torch.empty(1), None),
        *taps((2, 5, 4), (6, 4, 9), "trilinear", False, torch.float64, torch.device("cpu")),
    )
    up = torch.randn(2, 3, 6, 4, 9, dtype=torch.float64)
    forward = (reference.resample(i.g, i, (6, 4, 9)) * up).sum()
    adjoint = (i.g * reference.resample_adjoint(up, i, (6, 4, 9))).sum()
    torch.testing.assert_close(forward, adjoint)


# ------------------------------------------------------------------ batch statistics


def _norms(hidden, **options):
    return {
        f"{branch}_norm": BatchNorm(
            torch.full((size,), 0.3), torch.full((size,), 1.5), torch.rand(size), torch.rand(size),
            training=True, **options,
        )
        for branch, size in (("theta", hidden), ("phi", hidden), ("psi", 1))
    }  # fmt: skip


def _gate(channels=10, hidden=7, bias=True):
    return {
        "x": torch.randn(3, channels, 6, 5) + 2,
        "g": torch.randn(3, channels, 6, 5) - 1,
        "theta_weight": torch.randn(hidden, channels) / 3,
        "theta_bias": torch.randn(hidden) if bias else None,
        "phi_weight": torch.randn(hidden, channels) / 3,
        "phi_bias": torch.randn(hidden) if bias else None,
        "psi_weight": torch.randn(1, hidden),
        "psi_bias": torch.randn(1) if bias else None,
    }


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0])
def test_running_statistics_move_as_torch_moves_them(target, momentum):
    tensors = {k: v.to(target.device) for k, v in _gate().items()}
    norms = {
        k: BatchNorm(*(t.to(target.device) for t in n[:4]), *n[4:])
        for k, n in _norms(7, momentum=momentum).items()
    }
    copies = {k: BatchNorm(*(t.clone() for t in n[:4]), *n[4:]) for k, n in norms.items()}
    attention_gate(**tensors, **norms, impl=target.impl)

    def convolve(branch, t):
        weight = tensors[f"{branch}_weight"][..., None, None]
        return F.conv2d(t, weight, tensors[f"{branch}_bias"])

    def normalise(branch, t):
        n = copies[f"{branch}_norm"]
        return F.batch_norm(t, *n[:4], True, n.momentum, n.eps)

    theta = normalise("theta", convolve("theta", tensors["x"]))
    h = F.relu(theta + normalise("phi", convolve("phi", tensors["g"])))
    normalise("psi", convolve("psi", h))
    for name, norm in norms.items():
        for got, want in zip(norm[:2], copies[name][:2], strict=True):
            torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6, msg=name)
        assert momentum == 0 or not torch.equal(norm.running_mean, torch.full_like(got, 0.3))


@pytest.mark.parametrize("momentum", [0.1, 0.01])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_statistics_are_rounded_once(target, dtype, momentum):
    """After 200 steps no farther from float64's than twice what torch's own are."""
    norm = nn.BatchNorm2d(7, momentum=momentum).to(target.device, dtype)
    wide = nn.BatchNorm2d(7, momentum=momentum).to(target.device).double()
    got = BatchNorm(norm.running_mean.clone(), norm.running_var.clone(), training=True)
    tensors = {k: None if t is None else t.to(target.device) for k, t in _gate(bias=False).items()}
    for step in range(200):
        # exact products, so that torch's norm is given what ours is
        tensors["x"] = (
            torch.randint(-1, 2, (3, 10, 6, 5), device=target.device) * (step % 2 + 1) / 4
        )
        tensors["theta_weight"] = torch.eye(7, 10, device=target.device)
        given = {k: t if t is None else t.to(dtype) for k, t in tensors.items()}
        attention_gate(**given, theta_norm=got._replace(momentum=momentum), impl=target.impl)
        norm(given["x"][:, :7])
        wide(given["x"][:, :7].double())
    for ours, torchs, exact in zip(got[:2], norm.buffers(), wide.buffers(), strict=False):
        error, allowed = ((t.double() - exact).abs().max() for t in (ours, torchs))
        assert error <= 2 * (allowed + torch.finfo(dtype).eps * exact.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_norms_beside_maps_of_16_bits_err_as_torchs(dtype):
    """A map far from zero, whose gradients cancel: RMS of 50, which scatters by some 20 %."""
    generator = torch.Generator().manual_seed(0)
    noise = functools.partial(torch.randn, generator=generator)
    errors = torch.zeros(2, 3, dtype=torch.float64)

    def gradients(norm, dy, *leaves):
        leaves = [t.detach().requires_grad_() for t in leaves]
        return torch.autograd.grad(norm(*leaves), leaves, dy)

    def torchs(t, gamma, beta):
        return F.batch_norm(t, None, None, gamma, beta, True)

    def ours(t, gamma, beta):
        return functions._batch_norm(t, BatchNorm(None, None, gamma, beta, training=True))

    for _ in range(50):
        maps = [(noise(4, 5, 7, 9) + shift).to(dtype) for shift in (0, 5)]
        given = [*maps, noise(5), noise(5)]
        exact = gradients(torchs, *(t.double() for t in given))
        for row, norm in zip(errors, (ours, torchs), strict=True):
            got = gradients(norm, *given)
            row += torch.stack([(a - b).square().mean() for a, b in zip(got, exact, strict=True)])
    assert (errors[0] <= 1.2**2 * errors[1]).all(), (errors[0] / errors[1]).sqrt()


def test_a_batch_may_train_between_an_evaluation_and_its_backward(target):
    """With the statistics that the evaluation had."""
    tensors = {k: v.to(target.device).requires_grad_() for k, v in _gate().items()}
    norms = {k: BatchNorm(*(t.to(target.device) for t in n[:4])) for k, n in _norms(7).items()}
    leaves = [*tensors.values(), *(t.requires_grad_() for n in norms.values() for t in n[2:4])]

    def loss():
        return attention_gate(**tensors, **norms, impl=target.impl).square().sum()

    want = torch.autograd.grad(loss(), leaves)
    late, before = loss(), norms["phi_norm"].running_var.clone()
    training = {k: n._replace(training=True) for k, n in norms.items()}
    attention_gate(**tensors, **training, impl=target.impl)
    assert not torch.equal(norms["phi_norm"].running_var, before)
    assert all(map(torch.equal, torch.autograd.grad(late, leaves), want))


def test_a_bias_under_statistics_of_the_batch_has_gradient_zero(target):
    tensors = {k: v.to(target.device).requires_grad_() for k, v in _gate().items()}
    norms = {
        k: BatchNorm(None, None, *(t.to(target.device) for t in n[2:4]), training=True)
        for k, n in _norms(7).items()
    }
    y = attention_gate(**tensors, **norms, impl=target.impl)
    biases = [tensors["theta_bias"], tensors["phi_bias"], tensors["psi_bias"]]
    for grad in torch.autograd.grad(y.square().sum(), biases):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_no_running_statistics_means_those_of_the_batch(target):
    """As nn.BatchNorm2d(track_running_stats=False) does in evaluation too."""
    tensors = {k: None if v is None else v.to(target.device) for k, v in _gate(bias=False).items()}
    norm = {"theta_norm": BatchNorm(), "phi_norm": BatchNorm(), "psi_norm": BatchNorm()}
    trained = {k: BatchNorm(training=True) for k in norm}
    a = attention_gate(**tensors, **norm, impl=target.impl)
    assert torch.equal(a, attention_gate(**tensors, **trained, impl=target.impl))


def test_far_from_zero_statistics_keep_their_digits(target):
    """|mean| = 1000 std: a variance from sums of squares in float32 would have no digits left."""
    torch.manual_seed(1)
    x = torch.randn(2, 4, 40, 40, dtype=torch.float64) + 1000
    theta = torch.eye(4, dtype=torch.float64)
    zero = torch.zeros(4, 4, dtype=torch.float64)

    def call(kind, impl):
        to = {"device": target.device, "dtype": kind}
        running = torch.zeros(4, **to), torch.zeros(4, **to)
        norm = BatchNorm(*running, training=True, momentum=1.0)
        weights = theta.to(**to), None, zero.to(**to), None, torch.ones(1, 4, **to)
        attention_gate(x.to(**to), x.to(**to), *weights, theta_norm=norm, impl=impl)
        return running[1].double().cpu()

    want = x.var((0, 2, 3))
    rounded = x.float().double().var((0, 2, 3))  # what is left of x in float32
    got = call(torch.float32, target.impl)
    torch.testing.assert_close(got, rounded, rtol=2e-5, atol=0)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=0)


# ------------------------------------------------------------------ threads

OURS = [
    case
    for case in cases.CASES
    if not {"upsample", "gate", "out_norm"} & {*case.options} and "out_weight" not in case.shapes
]
"""Cases without a softmax, a resampled map or a convolution after the gate, which are torch's own."""


@pytest.mark.skipif(not _native.available, reason="the kernels are not built")
@pytest.mark.parametrize("case", OURS, ids=lambda c: c.name)
def test_any_number_of_threads_gives_the_same_bits(case):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for channels_last in (False, True):
                tensors = case.inputs(torch.float32, channels_last=channels_last)
                results.append(run(cases.call, tensors, case.options, impl="native"))
    finally:
        torch.set_num_threads(before)
    for index, got in enumerate(results[2:]):
        for (name, a), (_, b) in zip(got.items(), results[index % 2].items(), strict=True):
            assert torch.equal(a, b), name


# ------------------------------------------------------------------ alpha


def test_alpha_is_returned_on_both_grids(target):
    x, g = (
        torch.randn(2, 6, 9, 8, device=target.device),
        torch.randn(2, 5, 4, 4, device=target.device),
    )
    weights = [torch.randn(7, 6, 2, 2), None, torch.randn(7, 5), None, torch.randn(7)]
    weights = [w if w is None else w.to(target.device) for w in weights]
    y, alpha, full = attention_gate(
        x, g, *weights, upsample="bilinear", return_alpha=True, impl=target.impl
    )
    assert alpha.shape == (2, 1, 4, 4)
    assert full.shape == (2, 1, 9, 8)
    torch.testing.assert_close(y, full * x)
    want = F.interpolate(alpha, (9, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(full, want)


def test_softmax_weighs_all_positions_of_a_sample(target):
    tensors = {k: v.to(target.device) for k, v in _gate().items()}
    y, alpha, full = attention_gate(**tensors, gate="softmax", return_alpha=True, impl=target.impl)
    torch.testing.assert_close(alpha.sum((1, 2, 3)), torch.ones(3, device=target.device))
    assert alpha is full or torch.equal(alpha, full)
    torch.testing.assert_close(y, alpha * tensors["x"])


def test_modules_of_torch_give_the_same(target):
    """One level of MONAI's gate, spelled out in modules."""
    tensors = {k: v.to(target.device) for k, v in _gate().items()}
    bn = {b: nn.BatchNorm2d(s).to(target.device) for b, s in (("theta", 7), ("phi", 7), ("psi", 1))}
    for m in bn.values():
        nn.init.uniform_(m.running_mean)
        nn.init.uniform_(m.running_var, 0.5, 2)
        m.eval()

    def branch(name, t):
        weight = tensors[f"{name}_weight"][..., None, None]
        return bn[name](F.conv2d(t, weight, tensors[f"{name}_bias"]))

    h = F.relu(branch("theta", tensors["x"]) + branch("phi", tensors["g"]))
    want = torch.sigmoid(branch("psi", h)) * tensors["x"]
    norms = {
        f"{name}_norm": BatchNorm(m.running_mean, m.running_var, m.weight, m.bias)
        for name, m in bn.items()
    }
    got = attention_gate(**tensors, **norms, impl=target.impl)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
