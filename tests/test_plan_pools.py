"""Launch plans of the pools' CUDA kernels: pure functions of sizes and device, tested with no GPU."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import DEVICES, DIRECTIONS, H200, KB, RTX_3090

from attnkern import _native

pytestmark = pytest.mark.skipif(not _native.available, reason=_native.reason)

SCORERS = ("given", "dot", "additive", "gated")


def ask(direction, device, **query):
    query["scorer"] = SCORERS.index(query.get("scorer", "given"))
    answer = _native._C.plan(f"softmax_pool_{direction}", {**device, **query})
    return {k: int(v) for k, v in answer.items()}


def waves(plan, device):
    """Blocks over the blocks that run at once."""
    return plan["grid"] / (device["sm_count"] * plan["blocks_per_sm"])


def check_limits(plan, device, query):
    """What must hold of any plan: the device can run it, and pieces cover the items."""
    assert plan["shared_bytes"] <= device["shared_per_block"]
    assert plan["blocks_per_sm"] * (plan["shared_bytes"] + KB) <= device["shared_per_sm"]
    assert plan["blocks_per_sm"] * plan["threads"] * 128 <= 65536  # registers
    assert plan["threads"] in (256, 512)
    assert plan["stages"] in (1, 2)
    assert 4 <= plan["tile"] <= 64
    assert plan["length"] % plan["tile"] == 0
    assert plan["block_queries"] * plan["query_blocks"] >= query["queries"]
    # sums of an own query end with its unit: dot's registers hold them to the end of a block
    assert plan["block_units"] == 1 or query.get("summed")
    assert 1 <= plan["chunk_units"] <= max(plan["units"], 1)
    if query.get("ragged"):
        # a bag's end and a multiple of `length` each begin a unit
        assert plan["units"] == query["batch"] + query["items"] // plan["length"]
    else:
        assert plan["units"] == query["batch"] * plan["pieces"]
        assert (plan["pieces"] - 1) * plan["length"] < max(query["items"], 1)
        assert plan["pieces"] * plan["length"] >= query["items"]
    if plan["product"]:
        assert query["dtype_bytes"] == 2
        assert plan["tile"] % 16 == 0
        if query["scorer"] == "gated":
            assert plan["value_width"] % 32 == 0
            assert plan["threads"] == 256
        else:
            # a warp has at most 9 steps of 16 features
            assert query["scorer"] == "dot"
            assert plan["block_queries"] == 16
            for width in (plan["value_width"], plan["key_width"]):
                assert width % 16 == 0
                assert 8 * 16 <= width <= 8 * 9 * 16
            assert plan["threads"] == 256


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_one_long_bag_fills_the_device(direction, scorer):
    query = {
        **{"scorer": scorer, "batch": 1, "items": 100_000, "features": 1024, "queries": 1},
        **{"hidden": 256 if scorer == "gated" else 1024, "dtype_bytes": 2},
    }
    for ragged in (0, 1):
        plan = ask(direction, H200, ragged=ragged, **query)
        check_limits(plan, H200, {**query, "ragged": ragged})
        assert plan["grid"] >= 126
        # the last wave is nearly whole, or there are many
        assert waves(plan, H200) > 4 or waves(plan, H200) % 1 > 0.9 or waves(plan, H200) % 1 == 0


@pytest.mark.parametrize("scorer", ["given", "dot"])
def test_many_samples_are_not_split(scorer):
    query = {"scorer": scorer, "batch": 264, "items": 196, "queries": 1, "dtype_bytes": 2}
    for direction in DIRECTIONS:
        plan = ask(direction, H200, features=768, hidden=768, **query)
        assert plan["pieces"] == 1
        assert plan["grid"] == 264


def test_bags_of_all_lengths_share_the_device():
    """64 bags of 100 000 patches: a piece is the share of a block, whatever the bags."""
    query = {"batch": 64, "items": 100_000, "queries": 1, "features": 1024, "dtype_bytes": 2}
    plan = ask("forward", H200, ragged=1, **query)
    check_limits(plan, H200, {**query, "ragged": 1, "scorer": "given"})
    assert 264 <= plan["grid"] <= 264 + 64 + 1


def test_tiles_keep_two_blocks_on_a_processor():
    """105 KB on their way an SM and more: 4.3 TB/s of an H200 over 1 us of latency is 33 KB."""
    for size in (2, 4):
        plan = ask(
            "forward", H200, batch=512, items=400, queries=1, features=1024, dtype_bytes=size
        )
        assert plan["blocks_per_sm"] == 2
        assert plan["stages"] * plan["tile"] * 1024 * size * 2 >= 105 * KB


@pytest.mark.parametrize(
    ("features", "tile", "stages"), [(512, 64, 2), (1024, 64, 1), (2048, 32, 1)]
)
def test_the_tensor_cores_get_the_longest_tiles(features, tile, stages):
    """V and U pass from L2 once a tile: its length decides how often."""
    query = {"scorer": "gated", "batch": 1, "items": 60_000, "hidden": 256, "queries": 1}
    plan = ask("forward", H200, features=features, dtype_bytes=2, **query)
    assert (plan["product"], plan["tile"], plan["stages"]) == (1, tile, stages)
    assert ask("forward", H200, features=features, dtype_bytes=4, **query)["product"] == 0


@pytest.mark.parametrize(("features", "tile"), [(128, 64), (512, 64), (1152, 32)])
def test_many_queries_take_the_tensor_cores(features, tile):
    """Sixteen queries share what is read of an item; few and floats are left to multiply-adds."""
    query = {"scorer": "dot", "batch": 32, "items": 729, "hidden": features, "features": features}
    plan = ask("forward", H200, queries=16, dtype_bytes=2, **query)
    check_limits(plan, H200, {**query, "queries": 16, "dtype_bytes": 2})
    assert (plan["product"], plan["query_blocks"], plan["stages"]) == (1, 1, 2)
    assert plan["tile"] == tile
    few = {"queries": 4, "dtype_bytes": 2}, {"queries": 16, "dtype_bytes": 4}
    for other in few:
        assert ask("forward", H200, **other, **query)["product"] == 0
    narrow = {**query, "features": 112, "hidden": 112}
    assert ask("forward", H200, queries=16, dtype_bytes=2, **narrow)["product"] == 0
    plan = ask("forward", RTX_3090, queries=16, dtype_bytes=2, keyed=1, **query)
    assert plan["shared_bytes"] <= RTX_3090["shared_per_block"]


@pytest.mark.parametrize("device", ["h200", "a100", "b200"])
@pytest.mark.parametrize("keyed", [0, 1])
@pytest.mark.parametrize(("features", "queries"), [(128, 5), (768, 12), (1024, 16), (1152, 16)])
def test_backward_of_many_queries_takes_the_tensor_cores(features, queries, keyed, device):
    """An H200 holds two tiles of shared keys and values; an A100 one of 1152 features, none with keys of their own."""
    query = {"scorer": "dot", "batch": 32, "items": 729, "hidden": features, "features": features}
    query |= {"queries": queries, "dtype_bytes": 2, "keyed": keyed, "summed": 1}
    plan = ask("backward", DEVICES[device], **query)
    check_limits(plan, DEVICES[device], query)
    fits = not (device == "a100" and keyed and features >= 1024)
    assert (plan["product"], plan["query_blocks"]) == (fits, 1)
    if device != "a100" and not keyed:
        assert plan["stages"] == 2
    if fits:
        assert plan["held"] == 1


@pytest.mark.parametrize("other", [{"queries": 4}, {"queries": 17}, {"dtype_bytes": 4}], ids=str)
def test_backward_left_to_multiply_adds(other):
    """All queries' terms meet in an item's gradient: a block has them all, 16 on the tensor cores."""
    query = {"scorer": "dot", "batch": 32, "items": 729, "hidden": 768, "features": 768}
    query |= {"queries": 16, "dtype_bytes": 2, "summed": 1}
    assert ask("backward", H200, **query)["product"] == 1
    assert ask("backward", H200, **{**query, **other})["product"] == 0


def test_the_hidden_gradients_of_a_chunk_fit_in_l2():
    query = {"scorer": "gated", "batch": 1, "items": 1_000_000, "hidden": 256, "queries": 1}
    plan = ask("backward", H200, features=1024, dtype_bytes=2, summed=1, **query)
    assert plan["chunk_units"] * plan["length"] * 2 * 256 * 2 <= 32 << 20
    assert plan["chunk_units"] >= 132


@given(
    batch=st.integers(0, 3000),
    heads=st.sampled_from([1, 1, 2, 12]),
    items=st.one_of(st.integers(0, 300), st.integers(0, 1_000_000)),
    queries=st.integers(1, 130),
    features=st.integers(1, 4096),
    hidden=st.integers(1, 1024),
    options=st.fixed_dictionaries(
        {
            "dtype_bytes": st.sampled_from([2, 4]),
            "ragged": st.integers(0, 1),
            "keyed": st.integers(0, 1),
            "summed": st.integers(0, 1),
        }
    ),
    scorer=st.sampled_from(SCORERS),
    device=st.sampled_from(sorted(DEVICES)),
    direction=st.sampled_from(DIRECTIONS),
)
@settings(max_examples=1500, deadline=None)
def test_any_pool_gets_a_plan_that_runs(
    batch, heads, items, queries, features, hidden, options, scorer, device, direction
):
    if scorer in ("given", "gated"):
        options["keyed"] = 0
    if scorer == "gated" or options["ragged"]:
        heads = 1
    if scorer == "dot" and not options["keyed"]:
        hidden = features
    query = {
        **options,
        **{"batch": batch, "heads": heads, "items": items, "queries": queries},
        **{"features": features, "hidden": hidden, "scorer": scorer},
    }
    check_limits(ask(direction, DEVICES[device], **query), DEVICES[device], query)
