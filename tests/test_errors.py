"""Bad input: an error that names the operator, the argument, what it must be and what was given."""

from __future__ import annotations

import re

import numpy
import pytest
import torch

from attnkern.functional import excite, squeeze, squeeze_excite
from attnkern.ops.squeeze_excite.reference import Options

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def good():
    t = torch.ones
    return dict(x=t(2, 8, 5, 5), w1=t(4, 8), b1=t(4), w2=t(8, 4), b2=t(8))


def sparse(*shape):
    return torch.ones(shape).to_sparse()


t = torch.ones
meta = {"device": "meta"}
nested = torch.nested.nested_tensor([t(3, 4), t(2, 4)], layout=torch.jagged)

# changes to the good call | the argument named | what it must be | what is given
BAD = [
    # x
    ({"x": None}, "x", "be a Tensor", "NoneType"),
    ({"x": numpy.ones((2, 8, 5, 5), "float32")}, "x", "be a Tensor", "ndarray"),
    ({"x": [[1.0]]}, "x", "be a Tensor", "list"),
    ({"x": 3.0}, "x", "be a Tensor", "float"),
    ({"x": "x"}, "x", "be a Tensor", "str"),
    ({"x": t(2, 8, 5, 5, dtype=torch.int64)}, "x", "have dtype", "int64"),
    ({"x": t(2, 8, 5, 5, dtype=torch.int8)}, "x", "have dtype", "int8"),
    ({"x": t(2, 8, 5, 5, dtype=torch.uint8)}, "x", "have dtype", "uint8"),
    ({"x": t(2, 8, 5, 5, dtype=torch.bool)}, "x", "have dtype", "bool"),
    ({"x": t(2, 8, 5, 5, dtype=torch.complex64)}, "x", "have dtype", "complex64"),
    ({"x": t(2, 8, 5, 5).to(torch.float8_e4m3fn)}, "x", "have dtype", "float8_e4m3fn"),
    ({"x": sparse(2, 8, 5, 5)}, "x", "be a strided tensor", "sparse_coo"),
    ({"x": t(8, 8).to_sparse_csr()}, "x", "be a strided tensor", "sparse_csr"),
    ({"x": nested}, "x", "be a strided tensor", "jagged"),
    ({"x": t(())}, "x", "1 to 3 spatial dims", "[]"),
    ({"x": t(8)}, "x", "1 to 3 spatial dims", "[8]"),
    ({"x": t(2, 8)}, "x", "1 to 3 spatial dims", "[2, 8]"),
    ({"x": t(2, 8, 2, 2, 2, 2)}, "x", "1 to 3 spatial dims", "[2, 8, 2, 2, 2, 2]"),
    ({"x": t(2, 0, 5, 5)}, "x", "at least one element along dim 1", "[2, 0, 5, 5]"),
    ({"x": t(2, 8, 0, 5)}, "x", "at least one element along dim 2", "[2, 8, 0, 5]"),
    ({"x": t(2, 8, 5, 0)}, "x", "at least one element along dim 3", "[2, 8, 5, 0]"),
    ({"x": t(0, 8, 0)}, "x", "at least one element along dim 2", "[0, 8, 0]"),
    ({"x": t(2, 8, 2, 2, 0)}, "x", "at least one element along dim 4", "[2, 8, 2, 2, 0]"),
    ({"x": t(2, 9, 5, 5)}, "w1", "have shape [R, C=9]", "[4, 8]"),
    ({"x": t(2, 8, 5, 5, **meta)}, "w1", "be on the device of x (meta)", "cpu"),
    ({"x": t(2, 8, 5, 5, dtype=BF16), "w1": t(4, 8, dtype=F16)}, "w1", "have dtype", "float16"),
    # weights
    ({"w1": 1.0}, "w1", "be a Tensor", "float"),
    ({"w1": numpy.ones((4, 8), "float32")}, "w1", "be a Tensor", "ndarray"),
    ({"w1": sparse(4, 8)}, "w1", "be a strided tensor", "sparse_coo"),
    ({"w1": t(4, 8, dtype=F64)}, "w1", "have dtype torch.float32", "float64"),
    ({"w1": t(4, 8, dtype=BF16)}, "w1", "have dtype torch.float32", "bfloat16"),
    ({"w1": t(4, 8, dtype=torch.int32)}, "w1", "have dtype torch.float32", "int32"),
    ({"w1": t(4, 8, **meta)}, "w1", "be on the device of x (cpu)", "meta"),
    ({"w1": t(8)}, "w1", "have shape", "[8]"),
    ({"w1": t(())}, "w1", "have shape", "[]"),
    ({"w1": t(4, 7)}, "w1", "have shape [R, C=8]", "[4, 7]"),
    ({"w1": t(0, 8)}, "w1", "have shape", "[0, 8]"),
    ({"w1": t(4, 8, 3, 3)}, "w1", "trailing ones", "[4, 8, 3, 3]"),
    ({"w1": None}, "b1", "be None when w1 is None", "tensor"),
    ({"w1": None, "b1": None}, "w2", "be None when w1 is None", "tensor"),
    ({"w1": None, "b1": None, "w2": None}, "b2", "be None when w1 is None", "tensor"),
    ({"w1": None, "b1": None, "w2": None, "b2": None}, "src", "be given when w1 is None", "None"),
    ({"w2": None, "b2": None, "b1": None}, "w1", "have shape [C=8, C=8]", "[4, 8]"),
    ({"w2": None, "b2": None, "w1": t(8, 8), "apply": "scale_shift", "b1": t(16)},
     "w1", "have shape [2C=16, C=8]", "[8, 8]"),
    ({"w2": None}, "b2", "be None when w2 is None", "tensor"),
    ({"w2": "w2"}, "w2", "be a Tensor", "str"),
    ({"w2": t(8, 5)}, "w2", "have shape [C=8, R=4]", "[8, 5]"),
    ({"w2": t(4, 8)}, "w2", "have shape [C=8, R=4]", "[4, 8]"),
    ({"w2": t(8)}, "w2", "have shape", "[8]"),
    ({"w2": t(8, 4, 1, 2)}, "w2", "trailing ones", "[8, 4, 1, 2]"),
    ({"w2": t(8, 4, dtype=F64)}, "w2", "have dtype", "float64"),
    ({"w2": t(8, 4, **meta)}, "w2", "be on the device of x", "meta"),
    ({"apply": "scale_shift"}, "w2", "have shape [2C=16, R=4]", "[8, 4]"),
    ({"b1": t(5)}, "b1", "have shape [4]", "[5]"),
    ({"b1": t(4, 1)}, "b1", "have shape [4]", "[4, 1]"),
    ({"b1": t(())}, "b1", "have shape [4]", "[]"),
    ({"b1": 0}, "b1", "be a Tensor", "int"),
    ({"b1": t(4, dtype=F64)}, "b1", "have dtype", "float64"),
    ({"b1": t(4, **meta)}, "b1", "be on the device of x", "meta"),
    ({"b2": t(4)}, "b2", "have shape [8]", "[4]"),
    ({"b2": sparse(8)}, "b2", "be a strided tensor", "sparse_coo"),
    ({"x": t(2, 8, 5, dtype=BF16), "w1": t(4, 8, dtype=BF16)},
     "b1", "have the dtype of w1 (torch.bfloat16)", "float32"),
    # act_weight
    ({"act": "prelu"}, "act_weight", 'be given exactly when act="prelu"', "NoneType"),
    ({"act_weight": t(4)}, "act_weight", 'be given exactly when act="prelu"', "relu"),
    ({"act": "prelu", "act_weight": t(3)}, "act_weight", "have shape [1] or [R=4]", "[3]"),
    ({"act": "prelu", "act_weight": t(4, 1)}, "act_weight", "have shape [1] or [R=4]", "[4, 1]"),
    ({"act": "prelu", "act_weight": 0.25}, "act_weight", "be a Tensor", "float"),
    ({"act": "prelu", "act_weight": t(4, dtype=F64)}, "act_weight", "have dtype", "float64"),
    ({"act": "prelu", "act_weight": t(8), "w1": t(8, 8), "b1": None, "w2": None, "b2": None},
     "w2", "be given when", "None"),
    # src
    ({"src": 1}, "src", "be a Tensor", "int"),
    ({"src": t(2, 7)}, "src", "have shape [B=2, 8]", "[2, 7]"),
    ({"src": t(3, 8)}, "src", "have shape [B=2, 8]", "[3, 8]"),
    ({"src": t(8)}, "src", "have shape [B=2, 8]", "[8]"),
    ({"src": t(2, 8, 5, 5)}, "src", "have shape [B=2, 8]", "[2, 8, 5, 5]"),
    ({"src": t(2, 8, dtype=F64)}, "src", "have dtype", "float64"),
    ({"src": t(2, 8, **meta)}, "src", "be on the device of x", "meta"),
    # epilogue
    ({"residual": 1.0}, "residual", "be a Tensor", "float"),
    ({"residual": t(2, 8, 5, 4)}, "residual", "have the shape of x [2, 8, 5, 5]", "[2, 8, 5, 4]"),
    ({"residual": t(8, 5, 5)}, "residual", "have the shape of x", "[8, 5, 5]"),
    ({"residual": t(2, 8, 5, 5, dtype=F16)}, "residual", "have dtype torch.float32", "float16"),
    ({"residual": t(2, 8, 5, 5, **meta)}, "residual", "be on the device of x", "meta"),
    ({"residual": sparse(2, 8, 5, 5)}, "residual", "be a strided tensor", "sparse_coo"),
    ({"drop_path": 0.5}, "drop_path", "be a Tensor", "float"),
    ({"drop_path": t(3)}, "drop_path", "have shape [B=2]", "[3]"),
    ({"drop_path": t(())}, "drop_path", "have shape [B=2]", "[]"),
    ({"drop_path": t(2, 8)}, "drop_path", "have shape [B=2]", "[2, 8]"),
    ({"drop_path": t(2, dtype=torch.bool)}, "drop_path", "have dtype", "bool"),
    # options
    ({"act": "tanh"}, "act", "be one of identity, relu", "'tanh'"),
    ({"act": None}, "act", "be one of", "None"),
    ({"act": torch.nn.ReLU()}, "act", "be one of", "ReLU()"),
    ({"act": ["relu"]}, "act", "be one of", "['relu']"),
    ({"gate": "softmax"}, "gate", "be one of sigmoid, hard_sigmoid", "'softmax'"),
    ({"gate": torch.sigmoid}, "gate", "be one of", "sigmoid"),
    ({"apply": "multiply"}, "apply", "be one of scale, scale1p", "'multiply'"),
    ({"out_act": "mish"}, "out_act", "be one of identity, relu", "'mish'"),
    ({"out_act": "ReLU"}, "out_act", "be one of", "'ReLU'"),
    ({"impl": "cuda"}, "impl", "be one of auto, native", "'cuda'"),
    ({"impl": None}, "impl", "be one of", "None"),
    ({"impl": ["native"]}, "impl", "be one of", "['native']"),
    ({"act_slope": -0.1}, "act_slope", "be at least 0", "-0.1"),
    ({"act_slope": float("nan")}, "act_slope", "be finite", "nan"),
    ({"act_slope": "0.1"}, "act_slope", "be a number", "str"),
    ({"act_slope": t(1)}, "act_slope", "be a number", "Tensor"),
    ({"gate_slope": -1 / 6}, "gate_slope", "be at least 0", "-0.16"),
    ({"gate_slope": float("inf")}, "gate_slope", "be finite", "inf"),
    ({"gate_offset": float("nan")}, "gate_offset", "be finite", "nan"),
    ({"gate_offset": None}, "gate_offset", "be a number", "NoneType"),
    ({"gain": float("-inf")}, "gain", "be finite", "-inf"),
    ({"gain": 10**400}, "gain", "be finite", "1000"),
    ({"gain": 1 + 2j}, "gain", "be a number", "complex"),
    ({"gain": "2"}, "gain", "be a number", "str"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "argument", "expected", "given"), BAD, ids=lambda v: v if isinstance(v, str) else ""
)
def test_bad_calls_say_what_is_wrong(change, argument, expected, given):
    call = {**good(), **change}
    before = {k: (v, v._version) for k, v in call.items() if isinstance(v, torch.Tensor)}
    with pytest.raises((ValueError, TypeError)) as raised:
        squeeze_excite(**call)
    message = str(raised.value)
    stated, _, got = message.partition(", got ")
    assert re.match(rf"squeeze_excite: {argument} must ", stated), message
    assert expected in stated
    assert given in got
    for tensor, version in before.values():
        assert tensor._version == version
    assert torch.isfinite(squeeze_excite(**good())).all(), "a refused call left something behind"


def test_the_table_is_complete():
    assert len(BAD) >= 100
    named = {argument for _, argument, *_ in BAD}
    signature = set(squeeze_excite.__kwdefaults__) | set(good())
    assert signature - named == {"return_gate"}


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (squeeze, (None,), r"squeeze: x must be a Tensor, got NoneType"),
        (squeeze, (t(2, 3),), r"squeeze: x must have shape .* got \[2, 3\]"),
        (squeeze, (t(2, 3, 0),), r"squeeze: x must have at least one element along dim 2"),
        (
            squeeze,
            (t(2, 3, 4, dtype=torch.int32),),
            r"squeeze: x must have dtype .* got torch.int32",
        ),
        (
            excite,
            (t(2, 3, 4), None),
            r"excite: logits must be given when w1 is None|excite: logits must be a Tensor",
        ),
        (excite, (t(2, 3, 4), t(2, 4)), r"excite: logits must have shape \[B=2, 3\], got \[2, 4\]"),
        (excite, (t(2, 3, 4), t(2, 3, dtype=F64)), r"excite: logits must have dtype"),
        (excite, (t(2, 3), t(2, 3)), r"excite: x must have shape"),
    ],
)
def test_the_halves_name_themselves(function, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        function(*arguments)


def test_an_implementation_that_cannot_serve_the_input_is_an_error(target):
    x = torch.ones(1, 2, 3, device=target.device)
    with pytest.raises(ValueError, match=r"impl='triton' cannot serve torch\.float64") as raised:
        squeeze(x.double(), impl="triton")
    assert "native: " in str(raised.value)
    assert "reference: can serve it" in str(raised.value)


def test_mixed_devices():
    if not torch.cuda.is_available():
        pytest.skip("one device: the meta rows of the table stand in")
    for name in ("x", "w1", "b2"):
        call = good()
        call[name] = call[name].cuda()
        with pytest.raises(ValueError, match="must be on the device of x"):
            squeeze_excite(**call)


def test_calls_on_the_meta_device_give_shapes():
    call = {name: value.to("meta") for name, value in good().items()}
    y = squeeze_excite(**call)
    assert y.device.type == "meta"
    assert y.shape == call["x"].shape


def test_the_memory_of_good_calls_does_not_admit_bad_ones():
    squeeze_excite(**good(), gain=1.0)
    for change in (
        {"x": t(2, 9, 5, 5)},
        {"w1": t(4, 8, dtype=F64)},
        {"act": "prelu"},
        {"gain": t(1)},
    ):
        with pytest.raises((ValueError, TypeError)):
            squeeze_excite(**{**good(), **change})


def test_more_than_2_31_elements():
    """Shapes and strides past 32 bits, on memory that is never touched."""
    length = 2**31 + 16
    x = torch.empty(1, 1, length, dtype=BF16, device="meta")
    w = torch.empty(1, 1, dtype=BF16, device="meta")
    assert squeeze_excite(x, w).shape == x.shape
    for impl in ("native", "triton"):
        forward = getattr(torch.ops.attnkern.squeeze_excite_fwd, impl)
        y, mean, *_, mask = forward(x, None, w, *[None] * 6, *Options(out_act="relu"), True)
        assert y.shape == x.shape
        assert mean.shape == (1, 1)
        assert mask.shape == (1, length // 8)
