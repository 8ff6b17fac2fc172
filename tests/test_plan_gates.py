"""Launch plans of the attention gate's CUDA kernels: pure functions of sizes and device, tested with no GPU."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import A100, B200, DEVICES, H200, KB, RTX_3090

from attnkern import _native

pytestmark = pytest.mark.skipif(not _native.available, reason=_native.reason)

TASKS = ("forward", "moments", "sums", "backward")


def ask(task, device, **query):
    answer = _native._C.plan(f"attention_gate_{task}", {**device, **query})
    return {k: int(v) for k, v in answer.items()}


def check_limits(plan, device, query):
    """What must hold of any plan: it covers the call once, and the device can run it."""
    assert plan["tile"] in (32, 64, 128, 256)
    assert plan["hidden"] % 32 == 0
    rows, columns = plan["tile"] // plan["warp_tile"], plan["hidden"] // 32
    assert plan["threads"] == 32 * (1 + plan["alone"]) * rows * columns <= 256
    assert plan["warp_tile"] == 32 or not plan["whole"]
    assert plan["warp_tile"] in (32, 64 if query["dtype_bytes"] == 2 else 32)
    assert plan["passes"] * plan["hidden"] >= query["hidden"]
    assert (plan["passes"] - 1) * plan["hidden"] < query["hidden"]
    assert plan["shared_bytes"] <= device["shared_per_block"]
    assert plan["blocks_per_sm"] * (plan["shared_bytes"] + KB) <= device["shared_per_sm"]
    assert plan["blocks_per_sm"] * plan["threads"] * 128 <= 65536  # registers
    length = query["length"] // query.get("kernel", 1)
    assert (plan["tiles"] - 1) * plan["tile"] < length <= plan["tiles"] * plan["tile"]
    assert plan["units"] == query["batch"] * plan["tiles"]
    assert 1 <= plan["chunk_units"] <= max(plan["units"], 1)
    assert 1 <= plan["blocks"] <= max(plan["units"], 1)
    assert plan["slots"] == plan["blocks"] * rows
    assert 1 <= plan["splits"] <= 64
    assert (plan["passes"] * plan["hidden"]) % plan["rows"] == 0
    width = 64 if query["dtype_bytes"] == 2 else 32
    for rows, columns in (("tile", "map_columns"), ("rows", "weight_columns")):
        assert plan[columns] % width == 0, "whole warps"
        assert 128 <= plan[rows] * plan[columns] // width <= 256, "threads of a gradient's product"
    if plan["fused"]:
        assert plan["whole"]
        if not plan["alone"]:
            assert plan["shared_bytes"] <= device["shared_per_sm"] // 2, (
                "one block loads as another multiplies"
            )
        # a warp keeps two blocks of 32 x 32 sums of the weights' gradients
        maps = query["channels"], query.get("gating", query["channels"])
        assert plan["hidden"] // 32 * sum((c + 31) // 32 for c in maps) <= plan["threads"] // 16
        assert (2 - plan["alone"]) * 255 * plan["threads"] <= 65536, "registers of two blocks"
    if plan["whole"]:
        assert plan["passes"] == 1
    else:
        assert plan["chunk"] % 32 == 0
    if query.get("resampled") and plan["units"]:
        assert plan["chunk_units"] % plan["tiles"] == 0, "the way back to g takes whole samples"


# A U-Net's skips at 256 x 256: channels and positions, gated by as many channels, with half of them hidden.
SKIPS = [(64, 256 * 256), (128, 128 * 128), (256, 64 * 64), (512, 32 * 32)]


@pytest.mark.parametrize("channels_last", [0, 1], ids=["first", "last"])
@pytest.mark.parametrize(("channels", "length"), SKIPS)
def test_maps_and_weights_stay_where_they_fit(channels, length, channels_last):
    """x is read once where its tile waits for the gate: 16-bit maps of up to 128 channels."""
    query = {
        **{"batch": 16, "channels": channels, "hidden": channels // 2, "length": length},
        **{"dtype_bytes": 2, "channels_last": channels_last},
    }
    for task in TASKS:
        plan = ask(task, H200, **query)
        check_limits(plan, H200, query)
        assert plan["whole"] == (channels <= 128)


@pytest.mark.parametrize(("channels", "length"), SKIPS[2:])
def test_chunks_read_little_from_l2(channels, length):
    """A tile reads both weights in two parts, a pass both maps: 512 channels took 34 KB a position, 32 a pass."""
    query = {"batch": 16, "channels": channels, "hidden": channels // 2, "length": length}
    plan = ask("forward", H200, dtype_bytes=2, **query)
    weights = 2 * 2 * channels * channels // 2 * 2 / plan["tile"]
    assert weights + plan["passes"] * 2 * channels * 2 == (3 if channels == 256 else 12) * KB
    assert plan["blocks"] >= 100, "all passes of a tile are one block's"
    assert plan["tile"] == plan["hidden"] == 128, "eight warps of 64 x 32"


@pytest.mark.parametrize("channels_last", [0, 1], ids=["first", "last"])
def test_backward_is_one_kernel_where_most_bytes_are(channels_last):
    """The upper skips of a U-Net: x, g and dy are read once.  Below, weights take the room of maps."""
    for channels, length in [(16, 512**2), (32, 512**2), (64, 512**2), (64, 128**3), (64, 1024)]:
        query = {"batch": 8, "channels": channels, "hidden": channels // 2, "length": length}
        for dtype_bytes in (2, 4):
            form = {"dtype_bytes": dtype_bytes, "channels_last": channels_last}
            plan = ask("backward", H200, **query, **form)
            assert plan["fused"], (channels, dtype_bytes)
            assert plan["blocks_per_sm"] >= 2
    for other in ({"resampled": 1}, {"kernel": 2}, {"channels": 256, "hidden": 128}):
        assert not ask("backward", H200, dtype_bytes=2, **{**query, **other})["fused"]


@pytest.mark.parametrize("channels_last", [0, 1], ids=["first", "last"])
@pytest.mark.parametrize("length", [256**2, 64**3, 1024])
def test_backward_of_128_channels_has_an_sm_alone(length, channels_last):
    """Both weights in three parts take half of its shared memory; what is left holds x and g of two tiles."""
    query = {"batch": 8, "channels": 128, "length": length, "channels_last": channels_last}
    for device in (H200, B200):
        plan = ask("backward", device, dtype_bytes=2, hidden=64, **query)
        assert plan["fused"]
        assert plan["alone"]
        assert plan["threads"] == 256, "two warps a scheduler"
        assert plan["blocks"] <= device["sm_count"]
    assert not ask("backward", H200, dtype_bytes=4, hidden=64, **query)["fused"], "floats"
    assert not ask("backward", A100, dtype_bytes=2, hidden=64, **query)["fused"], "163 KB"
    assert not ask("backward", H200, dtype_bytes=2, hidden=32, **query)["fused"], "four warps"


def test_a_processor_has_enough_on_its_way():
    """4.3 TB/s of an H200 over 1 us of latency is 33 KB an SM; two chunks are ahead."""
    for channels, length in SKIPS[:2]:
        query = {"batch": 16, "channels": channels, "hidden": channels // 2, "length": length}
        plan = ask("forward", H200, dtype_bytes=2, **query)
        assert plan["blocks_per_sm"] * 2 * plan["tile"] * channels * 2 >= 64 * KB
        assert plan["blocks_per_sm"] * plan["threads"] >= 256


def test_small_maps_are_spread_over_the_device():
    """One sample of 32 x 32: tiles of 32 positions, not of 128."""
    query = {"batch": 1, "channels": 64, "hidden": 32, "length": 1024, "dtype_bytes": 2}
    assert ask("forward", H200, **query)["blocks"] == 32
    assert ask("forward", H200, **{**query, "batch": 64})["tile"] == 128


def test_the_hidden_gradients_of_a_range_fit_in_l2():
    for channels, length in SKIPS:
        query = {"batch": 64, "channels": channels, "hidden": channels // 2, "length": length}
        plan = ask("backward", H200, dtype_bytes=2, **query)
        assert plan["chunk_units"] * plan["tile"] * channels // 2 * 2 <= 24 << 20
        assert plan["chunk_units"] >= 132


@given(
    batch=st.integers(0, 3000),
    channels=st.integers(1, 3000),
    gating=st.integers(1, 3000),
    hidden=st.one_of(st.integers(1, 64), st.integers(1, 1500)),
    length=st.one_of(st.integers(1, 400), st.integers(1, 3_000_000)),
    options=st.fixed_dictionaries(
        {
            "dtype_bytes": st.sampled_from([2, 4]),
            "channels_last": st.integers(0, 1),
            "resampled": st.integers(0, 1),
            "kernel": st.sampled_from([1, 1, 2, 8]),
        }
    ),
    name=st.sampled_from([*sorted(DEVICES), "rtx3090"]),
    task=st.sampled_from(TASKS),
)
@settings(max_examples=1500, deadline=None)
def test_any_size_gets_a_plan_that_runs(
    batch, channels, gating, hidden, length, options, name, task
):
    properties = {**DEVICES, "rtx3090": RTX_3090}[name]
    query = {
        **options,
        **{"batch": batch, "channels": channels, "gating": gating, "hidden": hidden},
        "length": max(length, options["kernel"]),
    }
    if task == "moments":
        query["resampled"] = 0
    check_limits(ask(task, properties, **query), properties, query)
