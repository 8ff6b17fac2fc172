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
@pytest.mark.parametrize(("queries", "features"), [(5, 24), (16, 72), (17, 648), (33, 130)])
def test_many_queries_share_the_tensor_cores(pool, queries, features, dtype):
    """Steps of features without a warp, warps with several, blocks of queries that are not full."""
    shapes = {"x": (2, 37, features), "query": (1, queries, features)}
    case = testing.Case("", shapes, {}, scale={"query": features**-0.5})
    for pieces in (1, 2):
        pool.device.configure(seed=queries + pieces)
        pool.force = {"pieces": pieces, "tile": 16}
        testing.compare(QUERY, case, case.inputs(dtype), impl="native")
        assert (pool.plans[0].query_blocks, pool.plans[0].product) == (-(-queries // 16), True)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 3e4, 1e30])
def test_parts_of_queries_and_weights(pool, size, dtype):
    """Neither rounding to 16 bits nor float16's range touches them: z cancels, lse is in float32."""
    x = torch.randn(1, 40, 72).to(dtype).double()
    query = torch.randn(1, 6, 72, dtype=torch.float64)
    query[..., :6] = 0  # feature m is free for pool m, which it leaves nearly 0
    weights = (query @ x.mT).softmax(-1)
    x[..., :6] -= (weights * x[..., :6].mT).sum(-1)[:, None]
    x = x.to(dtype)
    pool.force = {"tile": 16}
    for seed, scale in enumerate((1.0, 0.01)):
        pool.device.configure(seed=seed)
        z, lse = QUERY.function(
            x=x, query=(query * size).float(), scale=scale / size, return_lse=True, impl="native"
        )
        assert pool.plans[0].product
        logits = scale * query @ x.double().mT
        exact = (logits.softmax(-1) @ x.double())[0]
        tolerance = 1e-4 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(lse[0].double(), logits.logsumexp(-1)[0], atol=tolerance, rtol=0)
        if scale == 1.0:
            assert exact.diagonal().abs().max() < 0.01
            torch.testing.assert_close(
                z[0].double().diagonal(), exact.diagonal(), atol=tolerance, rtol=0.01
            )


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_many_weights_that_float16_rounds_away(pool, dtype):
    """Weights of 1e-7 beside one of 1 make all of a feature that the likeliest item lacks."""
    x = torch.randn(1, 40, 24)
    x[..., 0] = -16.0
    x[..., 1] = 1000.0
    x[:, 0, :2] = 0
    x = x.to(dtype)
    query = torch.zeros(1, 6, 24)
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


def test_too_many_features_are_the_operators_error(pool):
    x, scores = torch.zeros(1, 4, 40000), torch.zeros(1, 4)
    with pytest.raises(AssertionError, match="so many features do not fit"):
        POOLING[0].spec.function(values=x, scores=scores, impl="native")
