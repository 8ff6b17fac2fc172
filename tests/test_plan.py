"""Launch plans of the CUDA kernels: pure functions of sizes and device, tested with no GPU."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnkern import _native

pytestmark = pytest.mark.skipif(not _native.available, reason=_native.reason)

KB = 1024


def device(capability, sms, block, sm, l2, *clusters):
    names = ("clusters_1", "clusters_2", "clusters_4", "clusters_8", "clusters_16")
    return {
        "compute_capability": capability,
        "sm_count": sms,
        "shared_per_block": block * KB,
        "shared_per_sm": sm * KB,
        "l2_bytes": l2 * KB * KB,
        **dict(zip(names, clusters, strict=True)),
    }


H200 = device(90, 132, 227, 228, 60, 132, 66, 32, 15, 8)
A100 = device(80, 108, 163, 164, 40, 108, 0, 0, 0, 0)
B200 = device(100, 148, 227, 228, 126, 148, 74, 36, 18, 8)
RTX_3090 = device(86, 82, 99, 100, 6, 82, 0, 0, 0, 0)
DEVICES = {"h200": H200, "a100": A100, "b200": B200}
DIRECTIONS = ("forward", "backward")

# Layers of ResNet-50 at 224 and 512, EfficientNet-B0 to B7, MobileNetV3 and U-Nets in 2-D and 3-D:
# channels, spatial, KB of a 16-bit sample, and where it fits on an H200 in 16 and in 32 bits: the
# blocks of a cluster (1: one block), or L2, or nowhere.
LAYERS = [
    (256, "56x56", 1568, 8, 16),
    (512, "28x28", 784, 4, 8),
    (1024, "14x14", 392, 2, 4),
    (2048, "7x7", 196, 1, 2),
    (256, "128x128", 8192, "chunked", "chunked"),
    (512, "64x64", 4096, "chunked", "chunked"),
    (1024, "32x32", 2048, 16, "chunked"),
    (2048, "16x16", 1024, 8, 16),
    (32, "112x112", 784, 4, 8),
    (96, "56x56", 588, 4, 8),
    (144, "56x56", 882, 8, 16),
    (144, "28x28", 220, 2, 4),
    (240, "28x28", 368, 2, 4),
    (240, "14x14", 92, 1, 1),
    (480, "14x14", 184, 1, 2),
    (672, "14x14", 257, 2, 4),
    (672, "7x7", 64, 1, 1),
    (1152, "7x7", 110, 1, 2),
    (40, "150x150", 1758, 8, 16),
    (144, "75x75", 1582, 8, 16),
    (192, "75x75", 2109, 16, "chunked"),
    (192, "38x38", 542, 4, 8),
    (288, "38x38", 812, 4, 8),
    (288, "19x19", 203, 1, 2),
    (576, "19x19", 406, 2, 4),
    (816, "19x19", 575, 4, 8),
    (816, "10x10", 159, 1, 2),
    (1392, "10x10", 272, 2, 4),
    (48, "228x228", 4874, "chunked", "chunked"),
    (144, "114x114", 3655, "chunked", "chunked"),
    (240, "114x114", 6092, "chunked", "chunked"),
    (240, "57x57", 1523, 8, 16),
    (384, "57x57", 2437, 16, "chunked"),
    (384, "29x29", 631, 4, 8),
    (768, "29x29", 1262, 8, 16),
    (1056, "29x29", 1735, 8, 16),
    (1056, "15x15", 464, 4, 8),
    (1824, "15x15", 802, 4, 8),
    (64, "300x300", 11250, "chunked", "streaming"),
    (192, "150x150", 8438, "chunked", "chunked"),
    (288, "150x150", 12656, "chunked", "streaming"),
    (288, "75x75", 3164, 16, "chunked"),
    (480, "75x75", 5273, "chunked", "chunked"),
    (480, "38x38", 1354, 8, 16),
    (960, "38x38", 2708, 16, "chunked"),
    (1344, "38x38", 3790, "chunked", "chunked"),
    (1344, "19x19", 948, 8, 16),
    (2304, "19x19", 1624, 8, 16),
    (72, "28x28", 110, 1, 2),
    (120, "28x28", 184, 1, 2),
    (960, "7x7", 92, 1, 1),
    (64, "128x128x128", 262144, "streaming", "streaming"),
    (64, "64x64x64", 32768, "streaming", "streaming"),
    (128, "64x64x64", 65536, "streaming", "streaming"),
    (128, "32x32x32", 8192, "chunked", "chunked"),
    (256, "32x32x32", 16384, "chunked", "streaming"),
    (256, "16x16x16", 2048, 16, "chunked"),
    (512, "16x16x16", 4096, "chunked", "chunked"),
    (512, "8x8x8", 512, 4, 8),
    (64, "512x512", 32768, "streaming", "streaming"),
    (64, "256x256", 8192, "chunked", "chunked"),
    (128, "128x128", 4096, "chunked", "chunked"),
    (256, "64x64", 2048, 16, "chunked"),
    (512, "32x32", 1024, 8, 16),
]

# Backward keeps twice the sums: these two, within 3 KB of a full cluster of 16, then go through L2.
BACKWARD_IN_L2 = {(40, "150x150", 4), (1056, "29x29", 4)}


def ask(direction, device, **query):
    answer = _native._C.plan(f"squeeze_excite_{direction}", {**device, **query})
    return {k: v if k == "strategy" else int(v) for k, v in answer.items()}


def length_of(spatial):
    return math.prod(int(n) for n in spatial.split("x"))


def check_limits(plan, device, query):
    """What must hold of any plan: it covers the sample once, and the device can run it."""
    channels, length, size = query["channels"], query["length"], query["dtype_bytes"]
    last = query.get("channels_last", 0)
    elements = channels * length
    assert plan["threads"] % 32 == 0
    assert 32 <= plan["threads"] <= 512
    assert plan["vector"] in (1, 16 // size)
    assert plan["cluster"] in (1, 2, 4, 8, 16)
    assert plan["grid"] > 0
    assert plan["grid"] % plan["cluster"] == 0
    assert 0 < plan["chunk"] < 2**31
    # shared memory: of a block, and of all that are planned for an SM (1 KB more each)
    assert plan["shared_bytes"] <= device["shared_per_block"]
    assert plan["blocks_per_sm"] * (plan["shared_bytes"] + KB) <= device["shared_per_sm"]
    assert plan["blocks_per_sm"] * plan["threads"] <= 2048
    if plan["cluster"] > 1:
        assert plan["strategy"] == "resident"
        assert device["compute_capability"] >= 90
        assert device[f"clusters_{plan['cluster']}"] > 0
    # the pieces cover the sample, and every one begins at a whole access
    blocks = -(-channels // plan["block_columns"]) if last else 1
    assert plan["pieces"] % blocks == 0
    covered = plan["pieces"] // blocks * plan["chunk"]
    assert covered >= (length * plan["block_columns"] if last else elements)
    assert plan["chunk"] % (plan["block_columns"] if last else plan["vector"]) == 0
    if plan["strategy"] == "resident":
        assert plan["pieces"] == plan["cluster"]
        assert plan["chunk"] * size <= plan["shared_bytes"]
    else:
        assert covered - plan["chunk"] < (length * plan["block_columns"] if last else elements), (
            "an empty piece"
        )
    if query.get("mask") and not last and length % 8:
        assert plan["chunk"] % length == 0, "two blocks would write bits of one byte"


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{layer[0]}@{layer[1]}")
def test_every_layer_is_kept_where_it_fits(layer, direction, batch):
    channels, spatial, kilobytes, *expected = layer
    length = length_of(spatial)
    assert round(channels * length * 2 / KB) == kilobytes
    for size, where in zip((2, 4), expected, strict=True):
        query = {
            "batch": batch,
            "channels": channels,
            "length": length,
            "dtype_bytes": size,
            "hidden": 8,  # light weights: the map alone decides
        }
        plan = ask(direction, H200, **query)
        check_limits(plan, H200, query)
        if direction == "backward" and (channels, spatial, size) in BACKWARD_IN_L2:
            where = "chunked"
        if isinstance(where, int):
            # more blocks where that takes fewer waves, or where two blocks then share an SM
            assert plan["strategy"] == "resident"
            assert plan["cluster"] >= where
        else:
            assert plan["strategy"] == where


def test_heavy_weights_are_batched():
    """2048 channels of 7x7 with R = 128: 1 MB of weights a sample against a map of 196 KB."""
    query = {"channels": 2048, "length": 49, "hidden": 128, "dtype_bytes": 2}
    for direction in DIRECTIONS:
        assert ask(direction, H200, batch=256, **query)["strategy"] == "batched"
        assert ask(direction, H200, batch=1, **query)["strategy"] == "resident"
    light = {**query, "hidden": 8}
    assert ask("forward", H200, batch=256, **light)["strategy"] == "resident"


def test_a_forward_without_squeeze_waits_for_nothing():
    query = {
        "batch": 8,
        "channels": 64,
        "length": 196,
        "hidden": 8,
        "dtype_bytes": 4,
        "squeezes": 0,
    }
    assert ask("forward", H200, **query)["strategy"] == "batched"


def test_waves_choose_the_cluster():
    """32 samples of 392 KB: clusters of 2 fit, but would leave half of the SMs idle."""
    query = {"channels": 1024, "length": 196, "hidden": 64, "dtype_bytes": 2}
    assert ask("forward", H200, batch=32, **query)["cluster"] >= 4
    few = {**H200, "clusters_4": 1, "clusters_8": 1, "clusters_16": 1}
    assert ask("forward", few, batch=32, **query)["cluster"] == 2


@pytest.mark.parametrize("sms", [66, 108, 148])
def test_a_streamed_map_fills_the_sms_that_the_device_has(sms):
    query = {"batch": 8, "channels": 64, "length": 128**3, "hidden": 8, "dtype_bytes": 4}
    for direction in DIRECTIONS:
        plan = ask(direction, {**H200, "sm_count": sms}, **query)
        assert plan["strategy"] == "streaming"
        assert plan["grid"] == sms * plan["blocks_per_sm"]


def test_clusters_that_the_device_refuses_are_not_used():
    query = {"batch": 8, "channels": 256, "length": 56 * 56, "hidden": 16, "dtype_bytes": 4}
    assert ask("forward", H200, **query)["cluster"] == 16
    assert ask("forward", {**H200, "clusters_16": 0}, **query)["strategy"] == "chunked"


def test_a_chunk_of_samples_fits_in_l2_twice():
    query = {"batch": 256, "channels": 480, "length": 75 * 75, "hidden": 20, "dtype_bytes": 2}
    for direction, maps in (("forward", 1), ("backward", 2)):
        plan = ask(direction, H200, **query)
        assert plan["strategy"] == "chunked"
        sample = maps * 480 * 75 * 75 * 2
        assert plan["chunk_samples"] == max(1, H200["l2_bytes"] // 6 // sample)


@given(
    batch=st.integers(1, 5000),
    channels=st.integers(1, 5000),
    length=st.one_of(st.integers(1, 400), st.integers(1, 3_000_000)),
    hidden=st.integers(0, 700),
    double_width=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "dtype_bytes": st.sampled_from([2, 4]),
            "channels_last": st.integers(0, 1),
            "aligned": st.integers(0, 1),
            "squeezes": st.integers(0, 1),
        }
    ),
    mask=st.integers(0, 1),
    device=st.sampled_from(sorted(DEVICES)),
    direction=st.sampled_from(DIRECTIONS),
    forced=st.integers(-1, 3),
)
@settings(max_examples=2000, deadline=None)
def test_any_size_gets_a_plan_that_runs(
    batch, channels, length, hidden, double_width, options, mask, device, direction, forced
):
    properties = DEVICES[device]
    query = {
        **options,
        "batch": batch,
        "channels": channels,
        "length": length,
        "hidden": hidden,
        "width": channels * (2 if double_width else 1),
        "mask": mask * (direction == "forward"),
        "force_strategy": forced,
    }
    if channels * length % (16 // query["dtype_bytes"]):
        query["aligned"] = 0
    check_limits(ask(direction, properties, **query), properties, query)


@given(channels=st.integers(1, 10**6), length=st.integers(1, 10**9))
@settings(max_examples=300, deadline=None)
def test_sizes_beyond_any_layer_are_not_refused(channels, length):
    query = {
        "batch": 2,
        "channels": channels,
        "length": length,
        "hidden": 16,
        "dtype_bytes": 2,
        "aligned": 0,
    }
    for last in (0, 1):
        for direction in DIRECTIONS:
            check_limits(
                ask(direction, H200, channels_last=last, **query),
                H200,
                {**query, "channels_last": last},
            )


def test_sm_80_never_gets_a_cluster():
    for channels, spatial, *_ in LAYERS:
        for direction in DIRECTIONS:
            for device in (A100, {**H200, "compute_capability": 80}):
                plan = ask(
                    direction,
                    device,
                    batch=32,
                    channels=channels,
                    length=length_of(spatial),
                    hidden=8,
                    dtype_bytes=2,
                )
                assert plan["cluster"] == 1
