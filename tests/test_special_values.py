"""NaN, infinities, overflow, denormals and unwritten memory.

The rule: an output or gradient is finite exactly where eager's is in float32, whatever the dtype.
A non-finite value in a sample spoils that sample and, in backward, the sums over the batch.
"""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from conftest import CALLS, calls

from attnkern import _native, testing
from attnkern.functional import squeeze_excite

NAN, INF = float("nan"), float("inf")
LOW = (torch.bfloat16, torch.float16)
# torch's hardswish_backward reads NaN as below -3; as a gate or hidden activation the NaN spreads anyway
PATTERNED = [
    c
    for c in CALLS
    if c.spec.operator.startswith("squeeze")
    and c.case.name not in ("res_out_hardswish", "wide", "one_sample_long")
]
GATES = [
    c
    for c in CALLS
    if c.spec.operator == "attention_gate_fwd"
    # a neighbour of weight 0 is NaN or nothing by the last bit of a position
    and c.case.name not in ("gate_long", "gate_wide", "align_corners")
]
# every step of which is the operator's: no convolution of torch's after it, no statistics of infinities
OWN_GATES = [
    c
    for c in GATES
    if "out_weight" not in c.case.shapes and not {"track", "batch"} & set(c.case.options.values())
]
POOLS = [c for c in CALLS if c.spec.operator == "softmax_pool_fwd" and "long" not in c.case.name]


def _element(t, where):
    """The first or last element of a tensor of any layout."""
    return t[(where,) * t.dim()]


def _finite(result):
    return {name: t.isfinite() for name, t in result.items()}


def _assert_pattern(got, eager, context):
    want = _finite(eager)
    for name, finite in _finite(got).items():
        assert torch.equal(finite, want[name]), (context, name)
    for index, (g, e) in enumerate(zip(got.outputs, eager.outputs, strict=True)):
        assert torch.equal(g.isnan(), e.isnan()), (context, f"output {index}")
        infinite = g.isinf()
        assert torch.equal(g[infinite].float(), e[infinite].float()), (context, f"output {index}")


def _comparable(call, name, value):
    """False for the two infinities at which there is no one answer to equal.

    torch's CPU gelu(inf) is NaN in its vector loop and inf in its scalar tail.  An infinite drop
    path factor d makes d (s x + t) infinite, but d s x + d t, which kernels compute, inf - inf.
    """
    options = call.case.options
    gelu = "gelu" in (options.get("act"), options.get("out_act"))
    shifts = options.get("apply") in ("shift", "scale_shift")
    return value != value or not (gelu or (name == "drop_path" and shifts))


@pytest.mark.parametrize("call", PATTERNED, ids=str)
def test_one_value_in_any_argument_spreads_as_eagers_does(call, target):
    for name in call.case.shapes:
        for value, where in ((NAN, -1), (INF, 0), (-INF, -1)):
            if not _comparable(call, name, value):
                continue
            tensors = call.inputs(target)
            tensors[name].view(-1)[where] = value
            eager = testing.run(call.spec.eager, tensors, call.case.options)
            got = testing.run(call.spec.function, tensors, call.case.options, impl=target.impl)
            _assert_pattern(got, eager, (name, value, where))


@pytest.mark.parametrize("call", PATTERNED, ids=str)
def test_one_value_in_the_gradient_of_an_output(call, target):
    tensors = call.inputs(target)
    outputs = testing.as_tuple(call.run(target, tensors))
    for value, where in ((NAN, 0), (INF, -1)):
        grads = testing.noise_like(outputs)
        grads[0].view(-1)[where] = value
        eager = testing.run(call.spec.eager, tensors, call.case.options, grads)
        got = testing.run(call.spec.function, tensors, call.case.options, grads, impl=target.impl)
        _assert_pattern(got, eager, (value, where))


@pytest.mark.parametrize("call", GATES, ids=str)
def test_nan_in_any_argument_of_a_gate_spreads_as_eagers_does(call, target):
    """Outputs, and gradients: NaN wherever eager has it."""
    for name in call.case.shapes:
        for where in (0, -1):
            tensors = call.inputs(target)
            tensors[name].view(-1)[where] = NAN
            eager = testing.run(call.spec.eager, tensors, call.case.options)
            got = testing.run(call.spec.function, tensors, call.case.options, impl=target.impl)
            for (item, g), (_, e) in zip(got.items(), eager.items(), strict=True):
                assert not (e.isnan() & ~g.isnan()).any(), (name, where, item)
            for g, e in zip(got.outputs, eager.outputs, strict=True):
                assert torch.equal(g.isnan(), e.isnan()), (name, where)


def _single(tensors):
    return {name: t.float() for name, t in tensors.items()}


def _assert_infinity_stays(call, target, dtype, value, where, channels_last=False):
    for name in call.case.maps:
        tensors = call.inputs(target, dtype, channels_last=channels_last)
        _element(tensors[name], where).fill_(value)
        eager = testing.as_tuple(call.spec.eager(**_single(tensors), **call.case.options))
        got = testing.as_tuple(call.run(target, tensors))
        for g, e in zip(got, eager, strict=True):
            assert torch.equal(g.isnan(), e.isnan()), (name, value, where)
            assert torch.equal(g.isinf(), e.isinf()), (name, value, where)


@pytest.mark.parametrize("call", GATES, ids=str)
def test_infinity_in_a_map_of_a_gate(call, target):
    """As eager: it stays at its position, and hidden units that do not exist make no 0 times infinity of it."""
    for value, where in itertools.product((INF, -INF), (0, -1)):
        _assert_infinity_stays(call, target, torch.float32, value, where)


@pytest.mark.parametrize("call", OWN_GATES, ids=str)
def test_infinity_in_a_bfloat16_map_of_a_gate(call, target):
    """Nor does the second part of a weight, 0 or of another sign than the first."""
    _assert_infinity_stays(call, target, torch.bfloat16, INF, 0)
    _assert_infinity_stays(call, target, torch.bfloat16, -INF, -1, channels_last=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", OWN_GATES, ids=str)
def test_infinity_in_the_gradient_of_a_gate(call, target, dtype):
    """No NaN in a map's gradient where eager has none."""
    for channels_last, where in ((False, 0), (True, -1)):
        tensors = call.inputs(target, dtype, channels_last=channels_last)
        grads = testing.noise_like(testing.as_tuple(call.run(target, tensors)))
        _element(grads[0], where).fill_(INF)
        single = [g.float() for g in grads]
        eager = testing.run(call.spec.eager, _single(tensors), call.case.options, single)
        got = testing.run(call.spec.function, tensors, call.case.options, grads, impl=target.impl)
        for name in call.case.maps:
            extra = got.grads[name].isnan() & ~eager.grads[name].isnan()
            assert not extra.any(), (name, channels_last)


def _pool(call, target, tensors):
    """Outputs of a pool and of eager, and where they may differ: rows without a logit above -inf are 0.

    Eager gives them NaN when it is the scores that are -inf, and 0 * inf when the values are not finite.
    """
    eager = testing.as_tuple(call.spec.eager(**tensors, **call.case.options))
    got = testing.as_tuple(call.run(target, tensors))
    returns = {k: v for k, v in call.case.options.items() if k != "returns"}
    lse = call.spec.function(**tensors, **returns, returns=("lse",), impl=target.impl)[1]
    none = (lse == -INF).unsqueeze(-1)
    if none.dim() > got[0].dim():  # z has its heads side by side
        none = none.squeeze(-1).movedim(1, -1)
        none = none.repeat_interleave(got[0].shape[-1] // none.shape[-1], -1)
    assert not got[0][none.expand_as(got[0])].any()
    return got, eager, none


@pytest.mark.parametrize("call", POOLS, ids=str)
def test_nan_in_any_argument_of_a_pool_spreads_as_eagers_does(call, target):
    for name in call.case.shapes:
        for where in (0, -1):
            tensors = call.inputs(target)
            tensors[name].view(-1)[where] = NAN
            got, eager, none = _pool(call, target, tensors)
            assert torch.equal(got[0].isnan(), eager[0].isnan() & ~none), (name, where)
            for index, (g, e) in enumerate(zip(got[1:], eager[1:], strict=True), 1):
                assert torch.equal(g.isnan(), e.isnan()), (name, where, index)


@pytest.mark.parametrize(
    "call", [c for c in POOLS if c.spec.name != "query_attention_pool"], ids=str
)
def test_infinity_in_any_argument_of_a_pool(call, target):
    """As eager.  (A folded projection adds infinities in another order, so inf - inf need not meet.)"""
    for name in call.case.shapes:
        for value in (INF, -INF):
            if not _comparable(call, name, value):
                continue
            tensors = call.inputs(target)
            tensors[name].view(-1)[0] = value
            got, eager, none = _pool(call, target, tensors)
            assert torch.equal(got[0].isfinite(), eager[0].isfinite() | none), (name, value)
            assert torch.equal(got[0].isnan(), eager[0].isnan() & ~none), (name, value)


@pytest.mark.parametrize("call", POOLS, ids=str)
def test_a_nan_stays_in_its_sample(call, target):
    """Other samples and bags keep their bits, forward and backward."""
    names = [n for n in call.case.maps if n in call.case.shapes]
    clean = testing.run(
        call.spec.function, call.inputs(target), call.case.options, impl=target.impl
    )
    lengths = call.case.options.get("lengths")
    for name in names:
        tensors = call.inputs(target)
        spoilt = tensors[name]
        spoilt.view(-1)[-1] = NAN  # the last feature of the last item
        got = testing.run(call.spec.function, tensors, call.case.options, impl=target.impl)
        kept = sum(lengths[:-1]) if lengths else spoilt.shape[0] - 1
        if kept == 0:
            continue
        rows = len(lengths) - 1 if lengths else kept
        assert torch.equal(got.outputs[0][:rows], clean.outputs[0][:rows]), name
        assert got.outputs[0][rows:].isnan().any(), name
        for other in names:
            assert torch.equal(got.grads[other][:kept], clean.grads[other][:kept]), (name, other)


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("call", calls("residual_relu"), ids=str)
def test_a_value_at_every_position_stays_in_its_sample(call, target, channels_last):
    """Every lane and every edge of a vector or tile, in turn."""
    tensors = call.inputs(target, channels_last=channels_last)
    clean = call.run(target, tensors)
    _batch, channels, height, width = tensors["x"].shape
    for index in range(0, channels * height * width, 7):
        c, at = divmod(index, height * width)
        for name in ("x", "residual"):
            spoilt = {k: t.clone(memory_format=torch.preserve_format) for k, t in tensors.items()}
            spoilt[name][1, c, at // width, at % width] = NAN
            y = call.run(target, spoilt)
            assert torch.equal(y[[0, 2]], clean[[0, 2]])
            want = torch.zeros_like(y[1], dtype=torch.bool)
            if name == "x":
                want[:] = True
            else:
                want[c, at // width, at % width] = True
            assert torch.equal(y[1].isnan(), want), (name, index)


@pytest.mark.parametrize("call", calls("resnet", "residual_silu", "lc0", "mobilenet"), ids=str)
def test_low_precision_follows_eager_in_float32(call, target, dtype):
    for value in (NAN, INF, -INF):
        for name in ("x", "w1", "b2"):
            tensors = call.inputs(target, dtype)
            tensors[name].view(-1)[0] = value
            single = {k: t.float() for k, t in tensors.items()}
            eager = testing.as_tuple(call.spec.eager(**single, **call.case.options))[0]
            y = testing.as_tuple(call.run(target, tensors))[0]
            assert torch.equal(y.isnan(), eager.isnan()), (name, value)
            assert torch.equal(y.isinf(), eager.isinf()), (name, value)


@pytest.mark.parametrize("length", [64, 1000, 10**5])
def test_sums_do_not_overflow_in_16_bits(target, length):
    """The mean of 65504s is 65504, forward and backward: sums are in float32."""
    big = torch.finfo(torch.float16).max
    x = torch.full((1, 3, length), big, dtype=torch.float16, device=target.device)
    x[:, 1] = -big
    x[:, 2, ::2] = -big
    x.requires_grad_()
    w = torch.eye(3, dtype=torch.float16, device=target.device)
    y, mean = squeeze_excite(
        x, w, gate="identity", apply="shift", gain=0.5, return_gate=True, impl=target.impl
    )
    assert torch.equal(mean[0, :2].cpu(), torch.tensor([big, -big], dtype=torch.float16))
    assert abs(mean[0, 2]) <= big / length
    assert torch.equal(y[:, :2], x[:, :2])
    (dx,) = torch.autograd.grad(y, x, torch.full_like(y, 100))
    # d gain dy + the mean of it over the positions: 50 + 50
    assert torch.equal(dx, torch.full_like(dx, 100))


def test_constant_maps_are_exact(target, dtype):
    """Sums of one power of two are exact in any order, so the gate is eager's and y one rounding."""
    for length in (1, 7, 49, 1023):
        x = torch.full((2, 5, length), 0.5, dtype=dtype, device=target.device)
        w = torch.eye(5, dtype=dtype, device=target.device)
        _, gate = squeeze_excite(x, w, gate="identity", return_gate=True, impl=target.impl)
        assert torch.equal(gate, torch.full_like(gate, 0.5)), length


def test_denormals_and_negative_zero_survive(target, dtype):
    tiny = torch.finfo(dtype).smallest_normal / 4
    x = torch.tensor([tiny, -tiny, 0.0, -0.0], dtype=dtype, device=target.device)
    x = x.repeat(2, 3, 5)
    if target.device == "cuda" and dtype == torch.float32:
        assert x.abs().max() > 0
    one = torch.ones(2, 3, dtype=dtype, device=target.device)
    y = squeeze_excite(x, None, src=one, gate="identity", impl=target.impl)
    assert torch.equal(y, x)
    assert torch.equal(y.signbit(), x.signbit())
    again = squeeze_excite(x, None, src=one, gate="identity", residual=x, impl=target.impl)
    assert torch.equal(again, x + x)


def test_largest_values_pass_through(target, dtype):
    big = torch.finfo(dtype).max
    x = torch.tensor([big, -big], dtype=dtype, device=target.device).repeat(1, 2, 9)
    one = torch.ones(1, 2, dtype=dtype, device=target.device)
    y = squeeze_excite(x, None, src=one, gate="identity", impl=target.impl)
    assert torch.equal(y, x)
    doubled = squeeze_excite(x, None, src=one, gate="identity", gain=2.0, impl=target.impl)
    assert doubled.isinf().all()


# ------------------------------------------------------------------ the control register


def _mxcsr():
    """The SSE control and status register, through a few bytes of machine code."""
    import mmap

    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(b"\x0f\xae\x1f\xc3")  # stmxcsr [rdi]; ret
    value = ctypes.c_uint32()
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)(ctypes.addressof(value))
    return value.value


def test_a_call_leaves_flush_to_zero_and_rounding_alone(target):
    import platform

    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("MXCSR is x86's")
    control = ~0x3F  # the six low bits are sticky exception flags
    (call,) = calls("residual_silu")
    before = _mxcsr() & control
    assert not before & 0x8040, "flush-to-zero or denormals-are-zero is on already"
    testing.run(call.spec.function, call.inputs(target), call.case.options, impl=target.impl)
    assert _mxcsr() & control == before


# ------------------------------------------------------------------ unwritten memory


def test_fresh_memory_is_poisoned(target):
    """The fixture that makes an unwritten element show: from Python and from C++ alike."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x = torch.ones(3, 5, 7, dtype=dtype, device=target.device)
        assert torch.empty_like(x).isnan().all()
        assert x.new_empty(4).isnan().all()
        assert torch.empty_strided((2, 3), (1, 2), dtype=dtype, device=target.device).isnan().all()
    assert (torch.empty(9, dtype=torch.uint8, device=target.device) == 255).all()
    if target.impl == "native":
        assert _native._C.poison_fresh_memory(True), "the fixture had not turned it on"


def test_an_unwritten_element_of_an_operator_is_seen():
    """An operator that leaves its last element unwritten: its memory comes from empty_like, as in C++."""
    library = torch.library.Library("attnkern_planted_fault", "FRAGMENT")
    library.define("careless(Tensor x) -> Tensor")

    def careless(x):
        y = torch.empty_like(x)
        y.view(-1)[:-1] = x.view(-1)[:-1]
        return y

    library.impl("careless", careless, "CPU")
    (call,) = calls("resnet")

    def faulty(x, **weights):
        y = squeeze_excite(x, **weights, impl="reference")
        return torch.ops.attnkern_planted_fault.careless(y.detach()) + (y - y.detach())

    spec = testing.OpSpec("faulty", faulty, call.spec.eager, [call.case], call.spec.operator)
    with pytest.raises(AssertionError, match="inf"):
        testing.compare(spec, call.case, call.case.inputs())
