"""Squeeze-and-excitation's CUDA kernels on the emulator: every case with every strategy, outputs and gradients."""

import pytest
import torch
from conftest import CALLS, calls
from emulation import DTYPES, check_schedules, emulated, needs_compiler, results

from attnkern import testing

pytestmark = needs_compiler
STRATEGIES = ("resident", "chunked", "streaming", "batched")  # by number, as plan.h has them
native = emulated("squeeze_excite")


def _force(emulated, strategy, **rest):
    emulated.force = {"strategy": STRATEGIES.index(strategy), **rest}


EXCITING = [c for c in CALLS if c.spec.operator == "squeeze_excite_fwd"]


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("call", EXCITING, ids=str)
def test_every_case_with_every_strategy(native, call, strategy, channels_last):
    # seed and dtype turn with the case, so that all of them meet all strategies
    index = EXCITING.index(call) + STRATEGIES.index(strategy) + channels_last
    dtype = DTYPES[index % 3]
    native.device.configure(seed=index)
    _force(native, strategy)
    tensors = call.case.inputs(dtype, channels_last=channels_last)
    testing.compare(call.spec, call.case, tensors, impl="native")


NAMES = ("effnet", "lc0", "residual_relu_drop_path", "res_out_silu", "3d", "src")
VARIED = [c for c in calls(*NAMES) if c.spec.name == "squeeze_excite"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("call", VARIED, ids=str)
def test_results_are_the_same_bits_under_every_schedule(native, call, strategy):
    _force(native, strategy, chunk=0 if strategy == "resident" else 500)
    check_schedules(native, call, torch.float32, l2=1 << 14)


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("cluster", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("call", VARIED, ids=str)
def test_clusters_of_every_size(native, call, cluster, channels_last):
    native.device.configure(seed=cluster, sms=16)
    _force(native, "resident", cluster=cluster)
    tensors = call.case.inputs(torch.float32, channels_last=channels_last)
    testing.compare(call.spec, call.case, tensors, impl="native")
    backward = native.plans[-1]
    assert (backward["strategy"], backward["cluster"]) == (0, cluster)


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("threads", [32, 64, 288, 512])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_block_sizes(native, strategy, threads, channels_last):
    _force(native, strategy, threads=threads)
    for seed, call in enumerate(VARIED):
        native.device.configure(seed=seed)
        tensors = call.case.inputs(torch.bfloat16, channels_last=channels_last)
        testing.compare(call.spec, call.case, tensors, impl="native")
        assert native.plans[-1]["threads"] == threads


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("chunk", [72, 1000])
@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_many_pieces_and_chunks_of_one_sample(native, strategy, chunk, channels_last):
    _force(native, strategy, chunk=chunk)
    for seed, call in enumerate(calls("residual_relu_drop_path", "res_out_silu")):
        native.device.configure(seed=seed, l2=1 << 10)
        tensors = call.case.inputs(torch.float16, channels_last=channels_last)
        testing.compare(call.spec, call.case, tensors, impl="native")


@pytest.mark.parametrize("seed", range(3))
def test_a_last_chunk_of_fewer_samples(native, seed):
    call = calls("residual_relu_drop_path")[0]
    tensors = call.case.inputs(torch.float32)
    bytes_a_sample = tensors["x"][0].numel() * 4
    # a sixth of L2 is a chunk: forward 3 samples of 2 a chunk, backward (x and dy) of 1
    for samples in (2, 4):
        native.device.configure(seed=seed, l2=6 * samples * bytes_a_sample)
        _force(native, "chunked", chunk=500)
        testing.compare(call.spec, call.case, tensors, impl="native")


def test_a_cluster_of_whole_channels_without_an_mlp(native):
    """The blocks share no channel: only the drop path's gradient crosses the cluster."""
    spec = next(c.spec for c in CALLS if c.spec.name == "excite")
    shapes = {"x": (2, 32, 6, 5), "logits": (2, 32), "drop_path": (2,)}
    case = testing.Case("", shapes, {"gate": "sigmoid"})
    for seed in range(3):
        native.device.configure(seed=seed)
        _force(native, "resident", cluster=4)
        testing.compare(spec, case, case.inputs(torch.float32), impl="native")
        assert (native.plans[-1]["strategy"], native.plans[-1]["cluster"]) == (0, 4)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("call", VARIED, ids=str)
def test_the_launchers_own_plan(native, call, capability):
    native.device.configure(capability=capability, shared=(163 if capability == 80 else 227) << 10)
    native.force = None
    tensors = call.case.inputs(torch.float32)
    testing.compare(call.spec, call.case, tensors, impl="native")


def test_a_fault_of_the_device_is_the_operators_error(native):
    native.device.configure(capability=80, sms=16)
    _force(native, "resident", cluster=1)
    native.device.configure(shared=1 << 10)
    call = calls("resnet")[0]
    with pytest.raises(AssertionError, match="too much shared memory"):
        results(call)
