"""Bad input to the pooling functions: an error that names function, argument, what it must be, what was given."""

from __future__ import annotations

import re

import numpy
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attnkern.functional import (
    additive_attention_pool,
    context_attention_pool,
    gated_attention_pool,
    merge_pools,
    query_attention_pool,
    softmax_pool,
)

t = torch.ones
BF16, F16, F64 = torch.bfloat16, torch.float16, torch.float64
meta = {"device": "meta"}


def long(*values):
    return torch.tensor(values, dtype=torch.int64)


def given():
    return dict(scores=t(2, 3, 7), values=t(2, 7, 5))


def context():
    return dict(x=t(2, 7, 5), weight=t(3, 5), bias=t(3))


def query():
    return dict(
        x=t(2, 7, 6), query=t(1, 2, 8), heads=2, k_weight=t(8, 6), k_bias=t(8), v_weight=t(4, 6), v_bias=t(4)
    )  # fmt: skip


def additive():
    return dict(keys=t(2, 7, 4), values=t(2, 7, 5), query=t(2, 4), v=t(4), c=t(1))


def gated():
    return dict(x=t(1, 7, 5), V=t(4, 5), b_V=t(4), U=t(4, 5), b_U=t(4), w=t(2, 4), b_w=t(2))


def bags():
    return dict(scores=t(3, 7), values=t(7, 5), offsets=long(0, 3, 3, 7))


GOOD = {
    given: softmax_pool,
    bags: softmax_pool,
    context: context_attention_pool,
    query: query_attention_pool,
    additive: additive_attention_pool,
    gated: gated_attention_pool,
}

# the good call | changes to it | the argument named | what it must be | what is given
BAD = [
    # values and scores
    (given, {"values": None}, "values", "be a Tensor", "NoneType"),
    (given, {"values": numpy.ones((2, 7, 5), "float32")}, "values", "be a Tensor", "ndarray"),
    (given, {"values": t(2, 7, 5, dtype=torch.int64)}, "values", "have dtype", "int64"),
    (given, {"values": t(2, 7, 5).to_sparse()}, "values", "be a strided tensor", "sparse"),
    (given, {"values": t(7, 5)}, "values", "have shape [B, N, D]", "[7, 5]"),
    (given, {"values": t(7)}, "values", "have shape [B, N, D]", "[7]"),
    (given, {"values": t(2, 5, 2, 2, 2, 2)}, "values", "at most 3 spatial dims", "[2, 5, 2, 2, 2, 2]"),
    (given, {"values": t(2, 7, 0)}, "values", "at least one feature", "[2, 7, 0]"),
    (given, {"scores": 1.0}, "scores", "be a Tensor", "float"),
    (given, {"scores": t(2, 3, 6)}, "scores", "have shape [B=2, N=7] or [B=2, M=3, N=7]", "[2, 3, 6]"),
    (given, {"scores": t(3, 3, 7)}, "scores", "have shape [B=2", "[3, 3, 7]"),
    (given, {"scores": t(1, 3, 7)}, "scores", "have shape [B=2", "[1, 3, 7]"),
    (given, {"scores": t(())}, "scores", "have shape", "[]"),
    (given, {"scores": t(2, 3, 7, dtype=F64)}, "scores", "have dtype torch.float32", "float64"),
    (given, {"scores": t(2, 3, 7, **meta)}, "scores", "be on the device of values (cpu)", "meta"),
    (given, {"values": t(2, 7, 5, dtype=BF16), "scores": t(2, 3, 7, dtype=F16)},
     "scores", "have dtype torch.bfloat16 or torch.float32", "float16"),
    # mask, bias, temperature, impl
    (given, {"mask": t(2, 7)}, "mask", "have dtype torch.bool", "float32"),
    (given, {"mask": t(2, 6).bool()}, "mask", "have shape [B=2, N=7]", "[2, 6]"),
    (given, {"mask": t(3, 7).bool()}, "mask", "have shape [B=2, N=7]", "[3, 7]"),
    (given, {"mask": t(2, 2, 7).bool()}, "mask", "[B=2, M=3, N=7]", "[2, 2, 7]"),
    (given, {"mask": t(7).bool()}, "mask", "have shape", "[7]"),
    (given, {"mask": [True] * 7}, "mask", "be a Tensor", "list"),
    (given, {"mask": t(2, 7, **meta).bool()}, "mask", "be on the device of values", "meta"),
    (given, {"bias": t(2, 7, dtype=torch.int32)}, "bias", "have dtype", "int32"),
    (given, {"bias": t(2, 8)}, "bias", "have shape", "[2, 8]"),
    (given, {"bias": 0.0}, "bias", "be a Tensor", "float"),
    (given, {"temperature": 0.0}, "temperature", "be greater than 0", "0.0"),
    (given, {"temperature": -1}, "temperature", "be greater than 0", "-1"),
    (given, {"temperature": float("nan")}, "temperature", "be finite", "nan"),
    (given, {"temperature": "1"}, "temperature", "be a number", "str"),
    (given, {"impl": "cuda"}, "impl", "be one of auto", "'cuda'"),
    # bags
    (bags, {"offsets": [0, 3, 7]}, "offsets", "be a Tensor", "list"),
    (bags, {"offsets": long(0, 3, 7).int()}, "offsets", "have dtype torch.int64", "int32"),
    (bags, {"offsets": long(0, 3, 7)[None]}, "offsets", "have shape [B + 1]", "[1, 3]"),
    (bags, {"offsets": long()}, "offsets", "have shape [B + 1]", "[0]"),
    (bags, {"offsets": long(0, 3, 7).to("meta")}, "offsets", "be on the device of values", "meta"),
    (bags, {"offsets": long(1, 3, 7)}, "offsets", "begin at 0 and end at N=7", "1 and 7"),
    (bags, {"offsets": long(0, 3, 8)}, "offsets", "begin at 0 and end at N=7", "0 and 8"),
    (bags, {"offsets": long(0, 3, 6)}, "offsets", "begin at 0 and end at N=7", "0 and 6"),
    (bags, {"offsets": long(0, 5, 3, 7)}, "offsets", "not decrease", "5, 3 at 1"),
    (bags, {"offsets": long(0, -1, 7)}, "offsets", "not decrease", "0, -1 at 0"),
    (bags, {"values": t(1, 7, 5)}, "values", "have shape [N, D] with offsets", "[1, 7, 5]"),
    (bags, {"scores": t(1, 3, 7)}, "scores", "have shape [N=7] or [M=3, N=7]", "[1, 3, 7]"),
    (bags, {"scores": t(6)}, "scores", "have shape [N=7]", "[6]"),
    (bags, {"channels_first": True}, "channels_first", "be False with offsets", "True"),
    (bags, {"mask": t(3, 6).bool()}, "mask", "have shape [N=7] or [M=3, N=7]", "[3, 6]"),
    # context
    (context, {"weight": t(3, 4)}, "weight", "have shape [M, 5]", "[3, 4]"),
    (context, {"weight": t(5)}, "weight", "have shape [M, 5]", "[5]"),
    (context, {"weight": t(3, 5, 2)}, "weight", "have shape [M, 5]", "[3, 5, 2]"),
    (context, {"weight": t(0, 5)}, "weight", "have shape [M, 5]", "[0, 5]"),
    (context, {"weight": None}, "weight", "be a Tensor", "NoneType"),
    (context, {"weight": t(3, 5, dtype=F64)}, "weight", "have dtype", "float64"),
    (context, {"bias": t(2)}, "bias", "have shape [3]", "[2]"),
    (context, {"logit_bias": t(2, 6)}, "logit_bias", "have shape [B=2, N=7]", "[2, 6]"),
    (context, {"logit_bias": 0.0}, "logit_bias", "be a Tensor", "float"),
    # query
    (query, {"query": t(2, 3)}, "query", "have shape [1 or B=2, 8]", "[2, 3]"),
    (query, {"query": t(3, 2, 8)}, "query", "[1 or B=2, M, 8]", "[3, 2, 8]"),
    (query, {"query": t(8)}, "query", "have shape", "[8]"),
    (query, {"query": t(1, 0, 8)}, "query", "have shape", "[1, 0, 8]"),
    (query, {"query": "q"}, "query", "be a Tensor", "str"),
    (query, {"heads": 3}, "heads", "divide the width of keys and values, E=8", "3"),
    (query, {"heads": 8}, "heads", "divide the width of keys and values, F=4", "8"),
    (query, {"heads": 0}, "heads", "be an int of at least 1", "0"),
    (query, {"heads": 2.0}, "heads", "be an int of at least 1", "2.0"),
    (query, {"k_weight": t(8, 5)}, "k_weight", "have shape [E, 6]", "[8, 5]"),
    (query, {"k_bias": t(6)}, "k_bias", "have shape [8]", "[6]"),
    (query, {"k_weight": None, "query": t(1, 2, 6)}, "k_bias", "be None when k_weight is None", "tensor"),
    (query, {"v_weight": t(4, 5)}, "v_weight", "have shape [F, 6]", "[4, 5]"),
    (query, {"v_bias": t(5)}, "v_bias", "have shape [4]", "[5]"),
    (query, {"v_weight": None}, "v_bias", "be None when v_weight is None", "tensor"),
    (query, {"keys": t(2, 7, 8)}, "k_weight", "be None when keys are given", "tensor"),
    (query, {"keys": t(2, 6, 8), "k_weight": None, "k_bias": None}, "keys", "have the items of x", "[2, 6, 8]"),
    (query, {"keys": t(2, 7, 8), "k_weight": None, "k_bias": None, "fold": True},
     "fold", "be None or False when keys are given", "True"),
    (query, {"scale": "1"}, "scale", "be a number", "str"),
    (query, {"bias": t(2, 3, 2, 7)}, "bias", "[B=2, H=2, M=2, N=7]", "[2, 3, 2, 7]"),
    # additive
    (additive, {"keys": t(2, 6, 4)}, "keys", "have the items of values [2, 7, 5]", "[2, 6, 4]"),
    (additive, {"keys": t(2, 7, 4, dtype=F16)}, "keys", "have dtype torch.float32", "float16"),
    (additive, {"keys": t(2, 7, 4, **meta)}, "keys", "be on the device of values", "meta"),
    (additive, {"query": t(2, 5)}, "query", "have shape [1 or B=2, 4]", "[2, 5]"),
    (additive, {"v": t(5)}, "v", "have shape [4]", "[5]"),
    (additive, {"v": t(2, 4)}, "v", "have shape [1, 4]", "[2, 4]"),
    (additive, {"c": t(2)}, "c", "have one element", "[2]"),
    (additive, {"act": "sigmoid"}, "act", "be one of tanh, relu, gelu", "'sigmoid'"),
    # gated
    (gated, {"x": t(7, 5)}, "x", "have shape [B, N, D]", "[7, 5]"),
    (gated, {"V": t(4, 6)}, "V", "have shape [K, 5]", "[4, 6]"),
    (gated, {"U": t(3, 5)}, "U", "have shape [4, 5]", "[3, 5]"),
    (gated, {"U": None}, "b_U", "be None when U is None", "tensor"),
    (gated, {"w": t(2, 5)}, "w", "have shape [M, 4]", "[2, 5]"),
    (gated, {"b_w": t(3)}, "b_w", "have shape [2]", "[3]"),
    (gated, {"b_V": t(4, 2)}, "b_V", "have shape [4]", "[4, 2]"),
    (gated, {"act": torch.tanh}, "act", "be one of tanh", "tanh"),
    (gated, {"x": t(1, 7, 5, dtype=BF16), "V": t(4, 5, dtype=BF16)}, "U", "have the dtype of V", "float32"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("good", "change", "argument", "expected", "got"),
    BAD,
    ids=[
        f"{good.__name__}-{argument}-{index}" for index, (good, _, argument, *_) in enumerate(BAD)
    ],
)
def test_bad_calls_say_what_is_wrong(good, change, argument, expected, got):
    function = GOOD[good]
    with pytest.raises((ValueError, TypeError)) as raised:
        function(**{**good(), **change})
    stated, _, what = str(raised.value).partition(", got ")
    assert re.match(rf"{function.__name__}: {argument} must ", stated), stated
    assert expected in stated
    assert got in what
    assert torch.isfinite(function(**good())).all(), "a refused call left something behind"


@pytest.mark.parametrize("good", GOOD, ids=lambda f: f.__name__)
def test_the_table_names_every_argument(good):
    function = GOOD[good]
    named = {argument for g, _, argument, *_ in BAD if GOOD[g] is function}
    everywhere = {argument for _, _, argument, *_ in BAD}
    common = {"mask", "bias", "offsets", "temperature", "channels_first", "impl", "logit_bias"}
    returns = {"return_weights", "return_scores", "return_lse"}
    signature = set(function.__annotations__) - {"return"}
    assert signature - named - common - returns - {"x", "values", "act"} == set()
    assert common <= everywhere


def test_offsets_changed_in_place_are_read_again():
    call = bags()
    softmax_pool(**call)
    call["offsets"][1] = 9
    with pytest.raises(ValueError, match="offsets must not decrease, got 9, 3 at 1"):
        softmax_pool(**call)


def test_offsets_that_count_no_versions_are_read_at_every_call():
    with torch.inference_mode():
        call = bags()
        for _ in range(2):
            softmax_pool(**call)
        call["offsets"][1] = 9
        with pytest.raises(ValueError, match="offsets must not decrease, got 9, 3 at 1"):
            softmax_pool(**call)


def test_offsets_without_values_are_not_read():
    with FakeTensorMode():
        z, weights = softmax_pool(**bags(), return_weights=True)
    assert (z.shape, weights.shape) == ((3, 3, 5), (3, 7))


@pytest.mark.parametrize(
    ("z", "lse", "message"),
    [
        (None, t(2, 3), "z must be a Tensor, got NoneType"),
        (t(2, 3, 5), t(2, 4), r"lse must have shape \[2, 3\], got \[2, 4\]"),
        (t(2, 3, 5, dtype=BF16), t(2, 3, dtype=BF16), "lse must have dtype torch.float32, got"),
        (t(0, 3, 5), t(0, 3), r"z must have shape \[S, ..., D\] with S of at least 1"),
        (t(5), t(()), "z must have shape"),
        (t(2, 3, 5, **meta), t(2, 3), r"lse must be on the device of z \(meta\), got cpu"),
    ],
)
def test_merge_pools_says_what_is_wrong(z, lse, message):
    with pytest.raises((ValueError, TypeError), match=f"merge_pools: {message}"):
        merge_pools(z, lse)


def test_an_implementation_that_cannot_serve_the_input_is_an_error():
    call = {k: v.double() for k, v in given().items()}
    with pytest.raises(ValueError, match=r"impl='triton' cannot serve torch\.float64"):
        softmax_pool(**call, impl="triton")


@pytest.mark.parametrize("good", GOOD, ids=lambda f: f.__name__)
def test_calls_on_the_meta_device_give_shapes(good):
    call = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in good().items()}
    z = GOOD[good](**call)
    assert z.device.type == "meta"
    assert z.shape == GOOD[good](**good()).shape
