"""Attention gates' CUDA kernels on the emulator: every case with every plan, outputs and gradients."""

import math

import pytest
import torch
from conftest import CALLS, calls
from emulation import DTYPES, check_schedules, emulated, needs_compiler

from attnkern import testing
from attnkern.ops.attention_gate import cases as gate_cases

pytestmark = needs_compiler
GATED = [c for c in CALLS if c.spec.operator == "attention_gate_fwd"]
# whole maps in shared memory: backward in one kernel, two blocks an SM or one, or in ranges of two tiles; chunks
GATE_PLANS = {
    "fused": {"tile": 64},
    "alone": {"tile": 128, "alone": 1},
    "whole": {"tile": 64, "chunk_units": 2},
    "chunks": {"tile": 32, "chunk": 32, "chunk_units": 2},
    "long": {"tile": 256, "chunk": 64, "chunk_units": 1},
    "tall": {"tile": 128, "warp_tile": 64, "chunk": 32, "chunk_units": 2},
}
# statistics, patches, a resampled g, target g, both multiplies
CHOSEN_GATES = [
    *("monai", "monai_training", "oktay_2d_odd", "coarse_training", "target_g", "softmax_norm"),
]

gates = emulated("attention_gate")


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("plan", GATE_PLANS)
@pytest.mark.parametrize("call", GATED, ids=str)
def test_every_gate_with_every_plan(gates, call, plan, channels_last):
    # seed and dtype turn with the case, so that all of them meet all plans
    index = GATED.index(call) + list(GATE_PLANS).index(plan) + channels_last
    dtype = DTYPES[index % 3]
    gates.device.configure(seed=index)
    gates.force = GATE_PLANS[plan]
    tensors = call.case.inputs(dtype, channels_last=channels_last)
    testing.compare(call.spec, call.case, tensors, impl="native")


@pytest.mark.parametrize("call", calls(*CHOSEN_GATES), ids=str)
def test_gates_are_the_same_bits_under_every_schedule(gates, call):
    gates.force = GATE_PLANS["chunks"]
    check_schedules(gates, call, torch.bfloat16)


@pytest.mark.parametrize("call", calls(*CHOSEN_GATES), ids=str)
def test_gates_by_the_launchers_own_plan(gates, call):
    """On one processor a block takes all tiles, one after another."""
    gates.device.configure(seed=2, sms=1, capability=80, shared=163 << 10)
    gates.force = None
    tensors = call.case.inputs(torch.float32)
    testing.compare(call.spec, call.case, tensors, impl="native")


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("norms", [None, "track"])
def test_gates_of_whole_packs(gates, norms, channels, channels_last):
    """What networks have: rows of whole 16-byte accesses. 128 channels of 16 bits take an SM alone."""
    for seed, dtype in enumerate(DTYPES[channels // 128 :]):
        gates.device.configure(seed=seed, sms=1)
        gates.force = {}
        case = gate_cases.case("", 2, channels, (8, 24), channels // 2, norms=norms)
        tensors = case.inputs(dtype, channels_last=channels_last)
        testing.compare(GATED[0].spec, case, tensors, impl="native")
        assert all(plan.whole for plan in gates.plans)
        plan = gates.plans[-1]
        assert plan.fused
        assert plan.alone == (channels == 128)
        assert plan.units >= 2 * plan.blocks, "a tile follows another"


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
    gates.device.configure(shared=99 << 10)  # as sm_86 has
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


@pytest.mark.parametrize("plan", ["fused", "alone", "whole", "chunks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_takes_the_nearest_weight(gates, plan, dtype):
    """Where nothing is applied dx is dt, rounded once, of a weight of 1: of its high part, a step below 1, less."""
    gates.force = GATE_PLANS[plan]
    x = (torch.rand(1, 32, 1, 64, generator=torch.Generator().manual_seed(0)) / 32).to(dtype)
    x.requires_grad_()
    weights = {
        "theta_weight": torch.ones(1, 32),
        "phi_weight": torch.zeros(1, 32),
        "psi_weight": torch.ones(1, 1),
    }
    g = torch.zeros_like(x)
    _, alpha, _ = GATED[0].spec.function(x, g, **weights, return_alpha=True, impl="native")
    alpha.sum().backward()
    ran = gates.plans[-1]
    assert (ran.fused, ran.alone) == (plan in ("fused", "alone"), plan == "alone")
    sigmoid = x.detach().double().sum(1, keepdim=True).sigmoid()
    dt = (sigmoid * (1 - sigmoid)).to(dtype)
    assert (x.grad == dt).float().mean() > 0.9
