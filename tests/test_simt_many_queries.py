"""Many queries of 16-bit items on the tensor cores, forward and backward, on the emulator."""

import math

import pytest
import torch
from conftest import Call
from emulation import DTYPES, check_schedules, emulated, needs_compiler

from attnkern import testing
from attnkern.ops.softmax_pool.cases import ALL, SPECS, case, padding, pattern

pytestmark = needs_compiler
QUERY = next(spec for spec in SPECS if spec.name == "query_attention_pool")
CONTEXT = next(spec for spec in SPECS if spec.name == "context_attention_pool")
LATENT = {
    **{"x": (2, 25, 130), "query": (1, 1, 144), "k_weight": (144, 130), "k_bias": (144,)},
    **{"v_weight": (18, 130), "v_bias": (18,)},
}
# one query of all samples and one of each, heads, keys of their own, masks, bags, maps, gradients of scores and lse
CALLS = [
    Call(spec, case(*arguments, **options))
    for spec, arguments, options in (
        (QUERY, ("many", {"x": (3, 37, 136), "query": (1, 16, 136)}), {"returns": ALL}),
        (QUERY, ("own", {"x": (2, 21, 128), "query": (2, 6, 128)}), {}),
        (QUERY, ("heads", {"x": (2, 21, 260), "query": (1, 7, 260)}), {"heads": 2}),
        (QUERY, ("latent", LATENT), {"heads": 9, "returns": ALL}),
        (
            QUERY,
            ("mask", {"x": (2, 25, 131), "query": (1, 5, 131)}),
            {"keep": pattern, "rows": (1, 5, 25), "returns": ALL},
        ),
        (
            QUERY,
            ("keys", {"x": (2, 35, 129), "keys": (2, 35, 272), "query": (1, 5, 272)}),
            {"scale": 0.1},
        ),
        (
            QUERY,
            ("wide values", {"x": (2, 35, 400), "keys": (2, 35, 128), "query": (2, 5, 128)}),
            {"scale": 0.1},
        ),
        (
            CONTEXT,
            ("rows", {"x": (3, 19, 140), "weight": (13, 140)}),
            {"keep": padding, "rows": (1, 19), "returns": ALL},
        ),
        (
            CONTEXT,
            ("map", {"x": (2, 150, 5, 8), "weight": (6, 150), "bias": (6,)}),
            {"returns": ALL},
        ),
        (
            CONTEXT,
            ("bags", {"x": (70, 136), "weight": (11, 136), "logit_bias": (70,)}),
            {"lengths": (33, 1, 0, 36), "returns": ALL},
        ),
    )
]

pool = emulated("softmax_pool")


def products(pool):
    """Whether the last forward and backward ran on the tensor cores."""
    return [plan.product for plan in pool.plans[-2:]]


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_every_kind_of_pool(pool, call, dtype, pieces):
    """Tiles of 16 and of 32, both layouts and every schedule turn with the case."""
    index = CALLS.index(call) + pieces // 2
    pool.device.configure(seed=index)
    pool.force = {"pieces": pieces, "tile": 16 << index // 2 % 2}
    tensors = call.case.inputs(dtype, channels_last=bool(index // 3 % 2))
    testing.compare(call.spec, call.case, tensors, impl="native")
    assert products(pool) == [True, True]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_the_same_bits_under_every_schedule(pool, call):
    pool.force = {"pieces": 2, "tile": 16}
    check_schedules(pool, call, torch.bfloat16)


@pytest.mark.parametrize("kilobytes", [64, 227])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_by_the_launchers_own_plan(pool, call, kilobytes):
    """On one processor a block adds up the gradients of many units; little shared memory holds one tile at a time."""
    index = CALLS.index(call)
    pool.device.configure(seed=index, sms=1, shared=kilobytes << 10)
    pool.force = None
    testing.compare(call.spec, call.case, call.case.inputs(DTYPES[1 + index % 2]), impl="native")


@pytest.mark.parametrize(
    "call", [c for c in CALLS if c.case.name in ("many", "keys", "bags")], ids=str
)
def test_a_gradient_alone_has_the_same_bits(pool, call):
    pool.force = {"tile": 16}
    tensors = call.case.inputs(torch.bfloat16)
    every = testing.run(call.spec.function, tensors, call.case.options, impl="native")
    for name, tensor in tensors.items():
        others = {k: t for k, t in tensors.items() if k != name}
        alone = testing.run(
            call.spec.function, {name: tensor}, {**call.case.options, **others}, impl="native"
        )
        assert torch.equal(alone.grads[name], every.grads[name]), name
        assert products(pool) == [True, True]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("queries", "units"), [(1, 6), (6, 1)], ids=["shared", "own"])
def test_units_of_a_block_share_their_query(pool, queries, units, dtype):
    """Registers hold the sums of dquery to the end of a block: one processor must not give it two own queries."""
    pool.device.configure(sms=1)
    pool.force = None
    small = case("", {"x": (6, 9, 136), "query": (queries, 5, 136)})
    testing.compare(QUERY, small, small.inputs(dtype), impl="native")
    assert pool.plans[-1].block_units == units
    assert products(pool) == [dtype != torch.float32] * 2


def test_one_tile_at_a_time(pool):
    """Where shared memory holds no two, the next comes after the gradients of this one have left."""
    shapes = {"x": (2, 37, 136), "query": (1, 5, 136)}
    many = case("", shapes)
    for pieces in (1, 2):
        pool.device.configure(seed=pieces, shared=38 << 10)
        pool.force = {"pieces": pieces}
        testing.compare(QUERY, many, many.inputs(torch.bfloat16), impl="native")
        assert products(pool) == [True, True]
        assert pool.plans[-1].stages == 1


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
        assert pool.plans[-2].query_blocks == -(-queries // 16)
        assert products(pool) == [True, queries <= 16]


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


# ------------------------------------------------------------------ parts and ranges of backward


def pairs(dtype, size=1.0, dz_size=1.0, keyed=False):
    """Queries 3 to 5 are 0 to 2 but for 2^-8, and their dz has the other sign: what two parts are for remains.

    Gives the gradients of items, keys (where they are apart) and queries, float64's, and the sizes of their terms.
    """
    torch.manual_seed(1)
    x, keys = torch.randn(2, 40, 136).to(dtype)
    query = torch.randn(3, 136)
    query = torch.cat([query, query * (1 + 2**-8)])
    dz = (torch.randn(3, 136) * dz_size).to(dtype)
    dz = torch.cat([dz, -dz])
    scale = 0.05
    v = x.double()
    k = keys.double() if keyed else v
    p = (scale * query.double() @ k.mT).softmax(-1)
    dp = dz.double() @ v.mT
    de = scale * p * (dp - (p * dp).sum(-1, keepdim=True))
    of_values, of_keys = p.mT @ dz.double(), de.mT @ query.double()
    sizes = p.mT @ dz.double().abs(), de.mT.abs() @ query.double().abs()
    dquery, dquery_size = de @ k, de.abs() @ k.abs()
    leaves = {"x": x[None], "query": (query * size)[None]} | ({"keys": keys[None]} if keyed else {})
    leaves = {name: t.requires_grad_() for name, t in leaves.items()}
    z = QUERY.function(**leaves, scale=scale / size, impl="native")
    found = dict(
        zip(
            leaves, torch.autograd.grad(z, list(leaves.values()), dz[None].to(z.dtype)), strict=True
        )
    )
    want = {"query": (dquery / size, dquery_size / size)}
    if keyed:
        want |= {"x": (of_values, sizes[0]), "keys": (of_keys, sizes[1])}
    else:
        want |= {"x": (of_values + of_keys, sizes[0] + sizes[1])}
    return {name: (found[name][0].double(), *want[name]) for name in found}


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 15), (torch.float16, 19)], ids=str)
@pytest.mark.parametrize("keyed", [False, True], ids=["joint", "keyed"])
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 3e4, 1e30])
def test_parts_of_weights_and_score_gradients(pool, size, keyed, dtype, bits):
    pool.force = {"tile": 16}
    for name, (got, want, terms) in pairs(dtype, size, keyed=keyed).items():
        rounding = torch.finfo(dtype).eps / 2 if name != "query" else 2.0**-24
        atol = terms.max().item() * 2.0**-bits
        assert want.abs().max() > 16 * atol, name
        torch.testing.assert_close(
            got, want, atol=atol, rtol=2 * rounding, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert products(pool) == [True, True]


@pytest.mark.parametrize("dz_size", [2.0**-20, 2.0**-10, 2.0**12])
def test_gradients_of_all_sizes_in_float16(pool, dz_size):
    """dq is float32: neither dz's nor de's range touches it."""
    pool.force = {"tile": 16}
    got, want, terms = pairs(torch.float16, dz_size=dz_size)["query"]
    torch.testing.assert_close(got, want, atol=terms.max().item() * 2.0**-19, rtol=0)
