"""Softmax pooling's CUDA kernels on the emulator: every case in pieces, outputs and gradients."""

import math

import pytest
import saturated
import torch
from conftest import CALLS, calls
from emulation import DTYPES, check_schedules, emulated, needs_compiler

from attnkern import testing

pytestmark = needs_compiler
POOLING = [c for c in CALLS if c.spec.operator == "softmax_pool_fwd"]
# heads, keys, masks, bags, columns, shared and own queries; every scorer
CHOSEN = [
    *("pool_bags", "context_many", "latent_mask", "query_map", "query_keys", "query_bags"),
    *("additive_mask", "additive_bags", "gated_branches", "gated_bags"),
]
QUERY = next(c.spec for c in POOLING if c.spec.name == "query_attention_pool")

pool = emulated("softmax_pool")


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("pieces", [1, 2, 5])
@pytest.mark.parametrize("call", POOLING, ids=str)
def test_every_pool_in_pieces(pool, call, pieces, channels_last):
    # seed, dtype and tile turn with the case, so that all of them meet all counts of pieces
    index = POOLING.index(call) + pieces + channels_last
    dtype = DTYPES[index % 3]
    pool.device.configure(seed=index)
    pool.force = {"pieces": pieces, "tile": 16 * (index // 3 % 2)}
    tensors = call.case.inputs(dtype, channels_last=channels_last)
    testing.compare(call.spec, call.case, tensors, impl="native")


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("call", saturated.CALLS, ids=str)
def test_pools_near_saturation(pool, call, pieces):
    """The pool of the rest in pieces, too; types, weights and what is returned turn with the case."""
    index = saturated.CALLS.index(call) + pieces // 2
    pool.device.configure(seed=index)
    pool.force = {"pieces": pieces, "tile": 16 * (index // 2 % 2)}
    dtype = (torch.float32, torch.float32, torch.bfloat16)[index % 3]
    returns = (saturated.ALL, ())[index // 3 % 2]
    saturated.compare_all(call, dtype, first=pieces, step=5, returns=returns, impl="native")


@pytest.mark.parametrize("call", calls(*CHOSEN), ids=str)
def test_pools_are_the_same_bits_under_every_schedule(pool, call):
    pool.force = {"pieces": 3, "tile": 16}
    check_schedules(pool, call, torch.bfloat16)


@pytest.mark.parametrize("sms", [1, 3])
@pytest.mark.parametrize("call", calls(*CHOSEN), ids=str)
def test_pools_by_the_launchers_own_plan(pool, call, sms):
    """On one processor a block adds up the gradients of many units."""
    pool.device.configure(seed=sms, sms=sms, capability=80, shared=163 << 10)
    pool.force = None
    tensors = call.case.inputs(torch.float32)
    testing.compare(call.spec, call.case, tensors, impl="native")


def test_more_queries_than_the_registers_hold(pool):
    """Forward takes blocks of queries; the sums of dquery wait in global memory between tiles."""
    case = testing.Case("", {"x": (1, 9, 1300), "query": (1, 13, 1300)}, {}, scale={"query": 1.0})
    for seed, dtype in enumerate((torch.float32, torch.bfloat16)):
        pool.device.configure(seed=seed)
        pool.force = {"tile": 4}
        testing.compare(QUERY, case, case.inputs(dtype), impl="native")
        assert (pool.plans[0].query_blocks, pool.plans[0].product) == (2, False)
        assert pool.plans[1].padded_queries * pool.plans[1].key_width > 32 * pool.plans[1].threads


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("queries", "features"), [(5, 128), (16, 136), (17, 648), (33, 1150)])
def test_many_queries_share_the_tensor_cores(pool, queries, features, dtype):
    """One step a warp and several, blocks of queries that are not full."""
    shapes = {"x": (2, 37, features), "query": (1, queries, features)}
    case = testing.Case("", shapes, {}, scale={"query": features**-0.5})
    for pieces in (1, 2):
        pool.device.configure(seed=queries + pieces)
        pool.force = {"pieces": pieces, "tile": 16}
        testing.compare(QUERY, case, case.inputs(dtype), impl="native")
        assert (pool.plans[0].query_blocks, pool.plans[0].product) == (-(-queries // 16), True)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 16), (torch.float16, 21)], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 3e4, 1e30])
def test_parts_of_queries_and_weights(pool, size, dtype, bits):
    """Neither rounding to 16 bits nor float16's range touches them: lse is in float32, and z cancels."""
    torch.manual_seed(0)
    pool.force = {"tile": 16}
    for scale in (1.0, 0.01):
        x = torch.randn(1, 40, 136).to(dtype).double()
        query = torch.randn(1, 6, 136, dtype=torch.float64) * 0.7
        query[..., :6] = 0  # feature m is free for pool m, which it leaves nearly 0
        weights = (scale * query @ x.mT).softmax(-1)
        x[..., :6] -= (weights * x[..., :6].mT).sum(-1)[:, None]
        x = x.to(dtype)
        z, lse = QUERY.function(
            x=x, query=(query * size).float(), scale=scale / size, return_lse=True, impl="native"
        )
        assert pool.plans[0].product
        x, rounding = x.double(), 2.0**-bits
        terms = scale * (query.abs() @ x.mT.abs()).max().item()
        exact = scale * query @ x.mT
        torch.testing.assert_close(
            lse[0].double(), exact.logsumexp(-1)[0], atol=terms * rounding + 1e-6, rtol=0
        )
        if scale == 0.01:  # logits have next to no error then
            mean = (exact.softmax(-1) @ x)[0].diagonal()
            assert mean.abs().max() < 0.01
            torch.testing.assert_close(z[0].double().diagonal(), mean, atol=4 * rounding, rtol=0.01)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_many_weights_that_float16_rounds_away(pool, dtype):
    """Weights of 1e-7 beside one of 1 make all of a feature that the likeliest item lacks."""
    x = torch.randn(1, 40, 128)
    x[..., 0] = -16.0
    x[..., 1] = 1000.0
    x[:, 0, :2] = 0
    x = x.to(dtype)
    query = torch.zeros(1, 6, 128)
    query[..., 0] = 1
    pool.force = {"tile": 16}
    z = QUERY.function(x=x, query=query, scale=1.0, impl="native")
    assert pool.plans[0].product
    torch.testing.assert_close(
        z[0, :, 1].double(),
        torch.full((6,), 39e3 / (39 + math.exp(16))).double(),
        rtol=1e-2,
        atol=0,
    )


def test_large_items_keep_bfloat16s_range(pool):
    """The power of two that float16 needs would make an infinity of a logit of 6."""
    x, query = torch.zeros(1, 20, 128), torch.zeros(1, 6, 128)
    x[:, 3, :2], query[..., :2] = 1e36, 3e-36
    pool.force = {"tile": 16}
    lse = QUERY.function(x=x.bfloat16(), query=query, scale=1.0, return_lse=True, impl="native")[1]
    assert pool.plans[0].product
    exact = math.log(math.exp(6) + 19)
    torch.testing.assert_close(lse, torch.full_like(lse, exact), rtol=0.01, atol=0)


def test_infinite_queries_beside_large_ones(pool):
    """All logits are -inf: the power of two is that of the largest finite number."""
    x = torch.zeros(1, 20, 128, dtype=torch.float16)
    x[..., 0] = -1.0
    query = torch.zeros(1, 6, 128)
    query[..., 0], query[..., 1] = float("inf"), 1e6
    pool.force = {"tile": 16}
    z, lse = QUERY.function(x=x, query=query, scale=1.0, return_lse=True, impl="native")
    assert pool.plans[0].product
    assert (lse == float("-inf")).all()
    assert not z.any()


def test_too_many_features_are_the_operators_error(pool):
    x, scores = torch.zeros(1, 4, 40000), torch.zeros(1, 4)
    with pytest.raises(AssertionError, match="so many features do not fit"):
        POOLING[0].spec.function(values=x, scores=scores, impl="native")
