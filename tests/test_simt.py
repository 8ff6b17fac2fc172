"""The emulator of tests/simt, on which the CUDA kernels' source runs compiled by g++.

Every primitive computes what it should, and every planted fault is reported.  The property tests hold
on it; what is an operator's own is in test_simt_<operator>.py.
"""

import ctypes
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from emulation import needs_compiler, simt

from attnkern.ops.squeeze_excite import reference

pytestmark = needs_compiler

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
