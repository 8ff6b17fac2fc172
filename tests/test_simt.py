"""The CUDA kernels' source, compiled by g++ and executed by the emulator of tests/simt.

First the emulator itself: every primitive computes what it should, and every planted fault is
reported.  Then the operators' kernels: every case with every strategy, outputs and gradients.
"""

import ctypes
import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CALLS, calls

from attnkern import _select, testing
from attnkern.ops.attention_gate import cases as gate_cases
from attnkern.ops.squeeze_excite import reference

sys.path.insert(0, str(Path(__file__).parent / "simt"))
import attention_gate
import run as simt
import softmax_pool
import squeeze_excite
from squeeze_excite import STRATEGIES

pytestmark = pytest.mark.skipif(simt.compiler() is None, reason="no g++ in CXX or on PATH")

SEEDS = range(9)  # schedules: depth first, breadth first and random order, three of each


@pytest.fixture(scope="module")
def primitives():
    library = simt.build("primitives", "tests/simt/primitives.cpp")
    for name in ("case_name", "case_expected", "case_run"):
        getattr(library, name).restype = ctypes.c_char_p
    for name in ("activation_of", "gate_of", "from_half", "from_bfloat"):
        getattr(library, name).restype = ctypes.c_float
    for name in ("to_half", "to_bfloat"):
        getattr(library, name).restype = ctypes.c_uint16
    return library


CASES = (
    *(
        "block_barrier",
        "warp_barrier",
        "scratch_reuse",
        "shared_bounds",
        "shared_slice",
        "shared_size",
    ),
    *("global_bounds", "global_below", "shared_uninitialised", "global_uninitialised", "alignment"),
    *("global_race", "cluster_sum", "cluster_rounds", "cluster_first", "cluster_split_barrier"),
    *(
        "async_copy",
        "async_exit",
        "bulk_copy",
        "shuffle_exit",
        "warp_divergence",
        "barrier_divergence",
    ),
    *("barrier_exit", "ticket", "chain", "cooperative", "livelock", "tensor_core", "values"),
)


def test_every_primitive_case_is_listed(primitives):
    assert [primitives.case_name(i).decode() for i in range(primitives.case_count())] == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_clean_kernels_pass_and_planted_faults_are_reported(primitives, name):
    case = CASES.index(name)
    for seed in SEEDS:
        report = primitives.case_run(case, 0, ctypes.c_uint64(seed)).decode()
        assert report == "", f"seed {seed}: the clean kernel is reported: {report}"
        for fault in range(1, primitives.case_faults(case) + 1):
            report = primitives.case_run(case, fault, ctypes.c_uint64(seed)).decode()
            assert primitives.case_expected(case, fault).decode() in report, (
                f"seed {seed}, fault {fault}: {report!r}"
            )


KINKS = (-6.0, -3.0, -1.0, -0.0, 0.0, 1.0, 3.0, 6.0, 20.0, 88.0, -88.0, -104.0, 1e30, -1e30)
POINTS = [
    *KINKS,
    *(math.nextafter(k, s * math.inf) for k in KINKS[1:8] for s in (1, -1)),
    *torch.linspace(-12, 12, 481).tolist(),
    *(math.nan, math.inf, -math.inf),
]
# reference.py's order is the user's; csrc/core/activation.h has the enumerators
GATES = ("identity", "sigmoid", "hard_sigmoid", "relu", "tanh")


def _check_values(compute, formula):
    """Each point within twice eager's error nearby (its own may be luck) plus a rounding.

    No large value excuses a small one.
    """
    x = torch.tensor(POINTS).sort().values  # NaN last
    got = torch.tensor([compute(ctypes.c_float(v)) for v in x.tolist()])
    eager, oracle = formula(x), formula(x.double())
    finite = oracle.isfinite()  # eager's gelu is NaN at infinity on the CPU
    assert torch.equal(got[~finite].double().nan_to_num(0.5), oracle[~finite].nan_to_num(0.5))
    got, eager, oracle, x = got[finite].double(), eager[finite].double(), oracle[finite], x[finite]
    nearby = F.max_pool1d((eager - oracle).abs()[None], 21, 1, 10)[0]
    band = (
        torch.finfo(torch.float32).eps * oracle.abs() + torch.finfo(torch.float32).smallest_normal
    )
    worse = (got - oracle).abs() > 2 * (nearby + band)
    assert not worse.any(), [
        *zip(x[worse].tolist(), got[worse].tolist(), oracle[worse].tolist(), strict=True)
    ]


@pytest.mark.parametrize("derivative", [0, 1], ids=("value", "derivative"))
@pytest.mark.parametrize("act", reference.ACTS)
def test_activations_are_torchs(primitives, act, derivative):
    slope = 0.25
    weight = torch.tensor([slope])
    function = reference.activation_grad if derivative else reference.activation

    def compute(x):
        return primitives.activation_of(
            reference.ACTS.index(act), derivative, x, ctypes.c_float(slope)
        )

    _check_values(compute, lambda x: function(x, act, slope, weight))


@pytest.mark.parametrize("derivative", [0, 1], ids=("value", "derivative"))
@pytest.mark.parametrize("gate", GATES)
def test_gates_are_torchs(primitives, gate, derivative):
    slope, offset = 0.25, 0.5
    function = reference.gate_grad if derivative else reference.gate_value

    def compute(x):
        return primitives.gate_of(
            GATES.index(gate), derivative, x, ctypes.c_float(slope), ctypes.c_float(offset)
        )

    _check_values(compute, lambda x: function(x, gate, slope, offset))


@pytest.mark.parametrize("act", reference.MASKED_OUT_ACTS)
def test_the_mask_bit_is_the_derivative_and_true_at_nan(primitives, act):
    for x in POINTS:
        want = reference.activation_grad(torch.tensor(x), act) != 0
        assert primitives.mask_of(reference.ACTS.index(act), ctypes.c_float(x)) == int(want), x


@pytest.mark.parametrize("kind", ["half", "bfloat"])
def test_software_half_precision_rounds_as_torch(primitives, kind):
    dtype = {"half": torch.float16, "bfloat": torch.bfloat16}[kind]
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype).float()
    widened = [getattr(primitives, f"from_{kind}")(b & 0xFFFF) for b in bits.tolist()]
    assert torch.equal(torch.tensor(widened).nan_to_num(7.0), values.nan_to_num(7.0))
    # each value, the midpoint to its neighbour (a tie) and both sides of the midpoint
    finite = values[values.isfinite()].sort().values.unique()
    middle = ((finite[1:].double() + finite[:-1].double()) / 2).float()
    probes = torch.cat(
        [finite, middle, middle.nextafter(middle + 1e30), middle.nextafter(middle - 1e30)]
    )
    largest = torch.finfo(dtype).max
    probes = torch.cat(
        [probes, torch.tensor([largest * 1.0005, largest, math.inf, -math.inf, 1e-30])]
    )[::3]
    narrowed = torch.tensor(
        [getattr(primitives, f"to_{kind}")(ctypes.c_float(x)) for x in probes.tolist()]
    )
    assert torch.equal(
        narrowed.to(torch.int32), probes.to(dtype).view(torch.int16).to(torch.int32) & 0xFFFF
    )


# ------------------------------------------------------------------ the operators' kernels


@pytest.fixture(scope="module")
def built():
    """The emulated operator of a module of tests/simt, built once."""
    return functools.cache(lambda module: module.Emulated.build())


@pytest.fixture
def emulate(built, monkeypatch):
    """``impl="native"`` of an operator on the CPU is its CUDA kernels on the emulator."""
    monkeypatch.setattr(_select, "refuse", lambda *_: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # eager on these sizes: 2 threads take 5 times as long as one

    def serve(module):
        emulated = built(module)
        for table, operator in emulated.operators():
            monkeypatch.setitem(table, "native", operator)
        emulated.force, emulated.plans = {}, []
        emulated.device.configure()
        return emulated

    yield serve
    torch.set_num_threads(threads)


# ------------------------------------------------------------------ squeeze-and-excitation


@pytest.fixture
def native(emulate):
    return emulate(squeeze_excite)


def _force(emulated, strategy, **rest):
    emulated.force = {"strategy": STRATEGIES.index(strategy), **rest}


EXCITING = [c for c in CALLS if c.spec.operator == "squeeze_excite_fwd"]


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("call", EXCITING, ids=str)
def test_every_case_with_every_strategy(native, call, strategy, channels_last):
    # seed and dtype turn with the case, so that all of them meet all strategies
    index = EXCITING.index(call) + STRATEGIES.index(strategy) + channels_last
    dtype = (torch.float32, torch.bfloat16, torch.float16)[index % 3]
    native.device.configure(seed=index)
    _force(native, strategy)
    tensors = call.case.inputs(dtype, channels_last=channels_last)
    testing.compare(call.spec, call.case, tensors, impl="native")


NAMES = ("effnet", "lc0", "residual_relu_drop_path", "res_out_silu", "3d", "src")
VARIED = [c for c in calls(*NAMES) if c.spec.name == "squeeze_excite"]


def _results(call, channels_last=False, dtype=torch.float32):
    tensors = call.case.inputs(dtype, channels_last=channels_last)
    return testing.run(call.spec.function, tensors, call.case.options, impl="native")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("call", VARIED, ids=str)
def test_results_are_the_same_bits_under_every_schedule(native, call, strategy):
    _force(native, strategy, chunk=0 if strategy == "resident" else 500)
    results = []
    for seed in range(6):
        native.device.configure(seed=seed, l2=1 << 14)
        results.append(_results(call))
    for other in results[1:]:
        for (name, value), (_, same) in zip(results[0].items(), other.items(), strict=True):
            assert torch.equal(value, same), name


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
        _results(call)


# ------------------------------------------------------------------ softmax pooling

POOLING = [c for c in CALLS if c.spec.operator == "softmax_pool_fwd"]
# heads, keys, masks, bags, columns, shared and own queries; every scorer
CHOSEN = [
    *("pool_bags", "context_many", "latent_mask", "query_map", "query_keys", "query_bags"),
    *("additive_mask", "additive_bags", "gated_branches", "gated_bags"),
]


@pytest.fixture
def pool(emulate):
    return emulate(softmax_pool)


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("pieces", [1, 2, 5])
@pytest.mark.parametrize("call", POOLING, ids=str)
def test_every_pool_in_pieces(pool, call, pieces, channels_last):
    # seed, dtype and tile turn with the case, so that all of them meet all counts of pieces
    index = POOLING.index(call) + pieces + channels_last
    dtype = (torch.float32, torch.bfloat16, torch.float16)[index % 3]
    pool.device.configure(seed=index)
    pool.force = {"pieces": pieces, "tile": 16 * (index // 3 % 2)}
    tensors = call.case.inputs(dtype, channels_last=channels_last)
    testing.compare(call.spec, call.case, tensors, impl="native")


@pytest.mark.parametrize("call", calls(*CHOSEN), ids=str)
def test_pools_are_the_same_bits_under_every_schedule(pool, call):
    pool.force = {"pieces": 3, "tile": 16}
    results = []
    for seed in range(6):
        pool.device.configure(seed=seed)
        results.append(_results(call, dtype=torch.bfloat16))
    for other in results[1:]:
        for (name, value), (_, same) in zip(results[0].items(), other.items(), strict=True):
            assert torch.equal(value, same), name


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
    spec = next(c.spec for c in POOLING if c.spec.name == "query_attention_pool")
    case = testing.Case("", {"x": (1, 9, 1100), "query": (1, 13, 1100)}, {}, scale={"query": 1.0})
    for seed, dtype in enumerate((torch.float32, torch.bfloat16)):
        pool.device.configure(seed=seed)
        pool.force = {"tile": 4}
        testing.compare(spec, case, case.inputs(dtype), impl="native")
        assert pool.plans[0].query_blocks == 2
        assert pool.plans[1].padded_queries * pool.plans[1].key_width > 32 * pool.plans[1].threads


def test_too_many_features_are_the_operators_error(pool):
    x, scores = torch.zeros(1, 4, 40000), torch.zeros(1, 4)
    with pytest.raises(AssertionError, match="so many features do not fit"):
        POOLING[0].spec.function(values=x, scores=scores, impl="native")


# ------------------------------------------------------------------ attention gates

GATED = [c for c in CALLS if c.spec.operator == "attention_gate_fwd"]
# whole maps in shared memory, backward in one kernel or in ranges of two tiles; chunks of maps
GATE_PLANS = {
    "fused": {"tile": 64},
    "whole": {"tile": 64, "chunk_units": 2},
    "chunks": {"tile": 32, "chunk": 32, "chunk_units": 2},
    "long": {"tile": 256, "chunk": 64, "chunk_units": 1},
}
# statistics, patches, a resampled g, target g, both multiplies
CHOSEN_GATES = [
    *("monai", "monai_training", "oktay_2d_odd", "coarse_training", "target_g", "softmax_norm"),
]


@pytest.fixture
def gates(emulate):
    return emulate(attention_gate)


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("plan", GATE_PLANS)
@pytest.mark.parametrize("call", GATED, ids=str)
def test_every_gate_with_every_plan(gates, call, plan, channels_last):
    # seed and dtype turn with the case, so that all of them meet all plans
    index = GATED.index(call) + list(GATE_PLANS).index(plan) + channels_last
    dtype = (torch.float32, torch.bfloat16, torch.float16)[index % 3]
    gates.device.configure(seed=index)
    gates.force = GATE_PLANS[plan]
    tensors = call.case.inputs(dtype, channels_last=channels_last)
    testing.compare(call.spec, call.case, tensors, impl="native")


@pytest.mark.parametrize("call", calls(*CHOSEN_GATES), ids=str)
def test_gates_are_the_same_bits_under_every_schedule(gates, call):
    gates.force = GATE_PLANS["chunks"]
    results = []
    for seed in range(6):
        gates.device.configure(seed=seed)
        results.append(_results(call, dtype=torch.bfloat16))
    for other in results[1:]:
        for (name, value), (_, same) in zip(results[0].items(), other.items(), strict=True):
            assert torch.equal(value, same), name


@pytest.mark.parametrize("call", calls(*CHOSEN_GATES), ids=str)
def test_gates_by_the_launchers_own_plan(gates, call):
    """On one processor a block takes all tiles, one after another."""
    gates.device.configure(seed=2, sms=1, capability=80, shared=163 << 10)
    gates.force = None
    tensors = call.case.inputs(torch.float32)
    testing.compare(call.spec, call.case, tensors, impl="native")


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("norms", [None, "track"])
def test_gates_of_whole_packs(gates, norms, channels_last):
    """What networks have: sizes of which every row is whole 16-byte accesses."""
    for seed, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        gates.device.configure(seed=seed)
        gates.force = {}
        case = gate_cases.case("", 2, 64, (8, 24), 32, norms=norms)
        tensors = case.inputs(dtype, channels_last=channels_last)
        testing.compare(GATED[0].spec, case, tensors, impl="native")
        assert all(plan.whole for plan in gates.plans)
        assert gates.plans[-1].fused


def test_more_hidden_units_than_a_block_has(gates):
    """Forward takes them in passes, backward in blocks of their own."""
    case = gate_cases.case("", 1, 40, (5, 8), 600)
    for seed, dtype in enumerate((torch.float32, torch.bfloat16)):
        gates.device.configure(seed=seed)
        gates.force = {}
        testing.compare(GATED[0].spec, case, case.inputs(dtype), impl="native")
        assert min(plan.passes for plan in gates.plans) == 3


def test_more_channels_than_shared_memory_holds(gates):
    case = gate_cases.case("", 1, 300, (4, 6), 40)
    gates.device.configure(shared=72 << 10)
    for dtype in (torch.float32, torch.bfloat16):
        gates.force = {}
        testing.compare(GATED[0].spec, case, case.inputs(dtype), impl="native")
        assert not any(plan.whole for plan in gates.plans)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_in_two_parts_meet_infinity_once(gates, dtype):
    """1, 1 and a little, its neighbours: no part has another sign, none is 0."""
    x = torch.zeros(1, 4, 1, 2, dtype=dtype)
    x[0, :, 0, 0] = torch.tensor([math.inf, 1.0, 1.0, 1.0])
    others = {"phi_weight": torch.zeros(1, 4), "psi_weight": torch.ones(1, 1)}
    for weight in (1.0, 1.0 + 2**-20, 1.0 - 2**-20, 0.1, -3e-4, -1.0):
        theta = torch.tensor([[weight, 1.0, 1.0, 1.0]])
        y, alpha, _ = GATED[0].spec.function(
            x, torch.zeros_like(x), theta_weight=theta, **others, act="leaky_relu",
            return_alpha=True, impl="native",
        )  # fmt: skip
        assert alpha[0, 0, 0, 0] == (weight > 0), weight
        assert y[0, 1:, 0, 0].isfinite().all(), weight


# ------------------------------------------------------------------ the property tests


@pytest.mark.parametrize("properties", ["forward", "backward", "layouts", "special_values"])
def test_the_property_tests_hold_on_the_emulator(properties):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent / "simt")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "plugin", "-p", "no:cacheprovider", "-x"]
    process = subprocess.run(
        [*command, "--impl", "native", f"tests/test_{properties}.py"],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-4000:]
