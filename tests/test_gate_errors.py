"""Bad input to attention_gate: an error that names the argument, what it must be, what was given."""

from __future__ import annotations

import inspect
import re

import numpy
import pytest
import torch

from attnkern.functional import BatchNorm, attention_gate

t = torch.ones
BF16, F64 = torch.bfloat16, torch.float64
meta = {"device": "meta"}


def plain():
    return dict(
        x=t(2, 6, 8, 9), g=t(2, 5, 8, 9), theta_weight=t(4, 6), theta_bias=t(4), phi_weight=t(4, 5),
        phi_bias=t(4), psi_weight=t(1, 4), psi_bias=t(1),
    )  # fmt: skip


def strided():
    return dict(plain(), g=t(2, 5, 4, 4), theta_weight=t(4, 6, 2, 2), upsample="bilinear")


def norm(size=4, **changes):
    fields = dict(running_mean=t(size), running_var=t(size), weight=t(size), bias=t(size))
    return BatchNorm(**{**fields, **changes})


# the good call | changes to it | the argument named | what it must be | what is given
BAD = [
    (plain, {"x": None}, "x", "be a Tensor", "NoneType"),
    (plain, {"x": numpy.ones((2, 6, 8, 9), "float32")}, "x", "be a Tensor", "ndarray"),
    (plain, {"x": t(2, 6)}, "x", "1 to 3 spatial dims", "[2, 6]"),
    (plain, {"x": t(2, 6, 8, 9, 1, 1)}, "x", "1 to 3 spatial dims", "[2, 6, 8, 9, 1, 1]"),
    (plain, {"x": t(2, 6, 8, 9).to_sparse()}, "x", "be a strided tensor", "sparse"),
    (plain, {"x": t(2, 6, 8, 9, dtype=torch.int32)}, "x", "have dtype", "int32"),
    (plain, {"x": t(2, 0, 8, 9)}, "x", "at least one element along dim 1", "[2, 0, 8, 9]"),
    (plain, {"x": t(2, 6, 8, 0)}, "x", "at least one element along dim 3", "[2, 6, 8, 0]"),
    (plain, {"g": 1.0}, "g", "be a Tensor", "float"),
    (plain, {"g": t(2, 5, 8, 9, dtype=F64)}, "g", "have dtype torch.float32", "float64"),
    (plain, {"g": t(2, 5, 8, 9, **meta)}, "g", "be on the device of x (cpu)", "meta"),
    (plain, {"g": t(3, 5, 8, 9)}, "g", "[B=2, G, *2 spatial]", "[3, 5, 8, 9]"),
    (plain, {"g": t(2, 5, 72)}, "g", "[B=2, G, *2 spatial]", "[2, 5, 72]"),
    (plain, {"g": t(2, 5, 8, 0)}, "g", "at least one element along dim 3", "[2, 5, 8, 0]"),
    # grids
    (plain, {"g": t(2, 5, 4, 4)}, "g", "lie on theta's grid [8, 9] or be upsampled to it", "upsample=None"),
    (strided, {"g": t(2, 5, 8, 9), "upsample": None}, "g", "lie on theta's grid [4, 4]", "[2, 5, 8, 9]"),
    (strided, {"upsample": None}, "upsample", "be given: the gate on theta's grid [4, 4]", "None"),
    (strided, {"upsample": "trilinear"}, "upsample", "be one of nearest, bilinear", "'trilinear'"),
    (strided, {"upsample": "bicubic"}, "upsample", "be one of nearest, bilinear", "'bicubic'"),
    (strided, {"theta_weight": t(4, 6, 9, 2)}, "theta_weight", "fit into x", "[4, 6, 9, 2]"),
    # weights
    (plain, {"theta_weight": None}, "theta_weight", "be a Tensor", "NoneType"),
    (plain, {"theta_weight": t(4, 7)}, "theta_weight", "have shape [F, C=6]", "[4, 7]"),
    (plain, {"theta_weight": t(4, 6, 1)}, "theta_weight", "*2 kernel sizes", "[4, 6, 1]"),
    (plain, {"theta_weight": t(0, 6)}, "theta_weight", "have shape [F, C=6]", "[0, 6]"),
    (plain, {"theta_weight": t(4, 6, dtype=BF16)}, "theta_weight", "have dtype", "bfloat16"),
    (plain, {"theta_weight": t(4, 6, **meta)}, "theta_weight", "be on the device of x", "meta"),
    (plain, {"theta_bias": t(5)}, "theta_bias", "have shape [F=4]", "[5]"),
    (plain, {"phi_weight": None}, "phi_weight", "be a Tensor", "NoneType"),
    (plain, {"phi_weight": t(4, 6)}, "phi_weight", "have shape [F=4, G=5]", "[4, 6]"),
    (plain, {"phi_weight": t(4, 5, 2, 2)}, "phi_weight", "have shape [F=4, G=5]", "[4, 5, 2, 2]"),
    (plain, {"phi_bias": t(4, 2)}, "phi_bias", "have shape [F=4]", "[4, 2]"),
    (plain, {"psi_weight": t(2, 4)}, "psi_weight", "have shape [1, F=4]", "[2, 4]"),
    (plain, {"psi_weight": t(5)}, "psi_weight", "have shape [F=4]", "[5]"),
    (plain, {"psi_bias": t(2)}, "psi_bias", "have shape [1]", "[2]"),
    (plain, {"psi_bias": "no"}, "psi_bias", "be a Tensor", "str"),
    (plain, {"out_bias": t(3)}, "out_bias", "be None when out_weight is None", "tensor"),
    (plain, {"out_weight": t(3, 7)}, "out_weight", "have shape [O, C=6]", "[3, 7]"),
    (plain, {"out_weight": t(3, 6), "out_bias": t(4)}, "out_bias", "have shape [3]", "[4]"),
    # norms
    (plain, {"theta_norm": torch.nn.BatchNorm2d(4)}, "theta_norm", "be a BatchNorm or None", "BatchNorm2d"),
    (plain, {"phi_norm": norm(5)}, "phi_norm.running_mean", "have shape [4]", "[5]"),
    (plain, {"phi_norm": norm(weight=t(3))}, "phi_norm.weight", "have shape [4]", "[3]"),
    (plain, {"psi_norm": norm(4)}, "psi_norm.running_mean", "have shape [1]", "[4]"),
    (plain, {"theta_norm": norm(running_var=None)}, "theta_norm.running_var", "given exactly with", "alone"),
    (plain, {"theta_norm": norm(eps=-1)}, "theta_norm.eps", "be at least 0", "-1"),
    (plain, {"theta_norm": norm(momentum="x")}, "theta_norm.momentum", "be a number", "str"),
    (plain, {"theta_norm": norm(bias=t(4, **meta))}, "theta_norm.bias", "be on the device of x", "meta"),
    (plain, {"out_norm": norm()}, "out_norm", "be None when out_weight is None", "BatchNorm"),
    (plain, {"out_weight": t(3, 6), "out_norm": norm()}, "out_norm.running_mean", "have shape [3]", "[4]"),
    # options
    (plain, {"act": "tanh"}, "act", "be one of relu, leaky_relu, softplus", "'tanh'"),
    (plain, {"act_slope": -0.1}, "act_slope", "be at least 0", "-0.1"),
    (plain, {"act_slope": float("nan")}, "act_slope", "be finite", "nan"),
    (plain, {"gate": "tanh"}, "gate", "be one of sigmoid, softmax", "'tanh'"),
    (plain, {"target": "y"}, "target", "be one of x, g", "'y'"),
    (plain, {"impl": "fast"}, "impl", "be one of", "'fast'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("good", "change", "argument", "expected", "got"),
    BAD,
    ids=[f"{good.__name__}-{argument}-{i}" for i, (good, _, argument, *_) in enumerate(BAD)],
)
def test_bad_calls_say_what_is_wrong(good, change, argument, expected, got):
    with pytest.raises((ValueError, TypeError)) as raised:
        attention_gate(**{**good(), **change})
    stated, _, what = str(raised.value).partition(", got ")
    assert re.match(rf"attention_gate: {re.escape(argument)} must ", stated), stated
    assert expected in stated
    assert got in what
    assert torch.isfinite(attention_gate(**good())).all(), "a refused call left something behind"


def test_the_table_names_every_argument():
    named = {argument.split(".")[0] for _, _, argument, *_ in BAD}
    free = {"align_corners", "return_alpha"}  # truth values
    assert set(inspect.signature(attention_gate).parameters) - named - free == set()


@pytest.mark.parametrize("name", ["theta_norm", "phi_norm", "psi_norm"])
def test_one_value_per_channel_has_no_statistics(name):
    call = dict(plain(), x=t(1, 6, 1, 1), g=t(1, 5, 1, 1))
    size = 1 if name == "psi_norm" else 4
    with pytest.raises(ValueError, match=f"{name}: Expected more than 1 value per channel"):
        attention_gate(**call, **{name: norm(size, training=True)})
    assert torch.isfinite(attention_gate(**call, **{name: norm(size)})).all()


def test_a_refused_call_leaves_the_running_statistics():
    n = norm(training=True)
    with pytest.raises(ValueError, match="psi_norm"):
        attention_gate(**plain(), theta_norm=n, psi_norm=norm(3))
    assert torch.equal(n.running_mean, t(4))
    assert torch.equal(n.running_var, t(4))


@pytest.mark.parametrize("good", [plain, strided], ids=lambda f: f.__name__)
def test_calls_on_the_meta_device_give_shapes(good):
    call = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in good().items()}
    y = attention_gate(**call)
    assert y.device.type == "meta"
    assert y.shape == call["x"].shape


def test_an_implementation_that_cannot_serve_the_input_is_an_error():
    call = {k: v.double() for k, v in plain().items()}
    with pytest.raises(ValueError, match=r"impl='triton' cannot serve torch\.float64"):
        attention_gate(**call, impl="triton")
