"""Softmax pooling's CUDA kernels on the emulator: every case in pieces, outputs and gradients."""

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


def test_too_many_features_are_the_operators_error(pool):
    x, scores = torch.zeros(1, 4, 40000), torch.zeros(1, 4)
    with pytest.raises(AssertionError, match="so many features do not fit"):
        POOLING[0].spec.function(values=x, scores=scores, impl="native")
