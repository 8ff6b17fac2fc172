"""Triton kernels compile for every target with no GPU, spill nothing and address in int64."""

from __future__ import annotations

import os
import pkgutil
import re
from importlib import import_module

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

import triton
import triton.language as tl

from attnkern._triton import LAUNCH, aot, tune


def tuned(calls):
    """What ``calls`` launch when every candidate is timed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "enabled", True)
        patch.setattr(tune, "_chosen", {})
        patch.setattr(tune, "measure", lambda launch, candidate: launch(candidate) or 0.0)
        return aot.launches(calls)


LAUNCHES = [
    pytest.param(launch, id=f"{op}-{launch.name}-{label}")
    for op, module in aot.declarations()
    for launch, label in aot.launches(module.CALLS).items()
]
CANDIDATES = [
    pytest.param(launch, id=f"{op}-{launch.name}-{label}-{index}")
    for op, module in aot.declarations()
    for index, (launch, label) in enumerate(tuned(module.CALLS).items())
    if launch not in aot.launches({label: module.CALLS[label]})
]

ASSIGNMENT = re.compile(r"^\s*(%[\w]+)(?::\d+)? = \"?([\w.]+)\"?\s(.*)$")
FORWARDING = {
    *("arith.addi", "arith.subi", "arith.muli", "arith.select"),
    *("tt.splat", "tt.broadcast", "tt.expand_dims"),
}


def narrow_offsets(ttir: str) -> list[str]:
    """Lines that offset a pointer by less than 64 bits, or widen a product made in fewer.

    A quotient or remainder of a program id is bounded by it; any other 32-bit product may overflow
    before it is widened.
    """
    lines: dict[str, re.Match[str]] = {}  # by name, of which a later region may have the same

    def has_narrow_product(name: str) -> bool:
        if name not in lines:
            return False  # an argument
        _, operation, rest = lines[name].groups()
        if operation not in FORWARDING:
            return False
        return operation == "arith.muli" or any(map(has_narrow_product, operands(rest)))

    def operands(rest: str) -> list[str]:
        return re.findall(r"%\w+", rest.split(" loc(")[0])

    found = []
    for line in ttir.splitlines():
        if not (match := ASSIGNMENT.match(line)):
            continue
        name, operation, rest = match.groups()
        lines[name] = match
        narrow = operation == "tt.addptr" and not re.search(r"[, x<]i64>?\s*(loc|$)", rest)
        if operation in ("arith.extsi", "arith.extui"):
            narrow = has_narrow_product(operands(rest)[0])
        if narrow:
            found.append(match[0])
    return found


def check_resources(launch, capability):
    compiled = aot.compile(launch, capability)
    used = aot.resources(compiled)
    assert used.stack == 0, f"sm_{capability}: {used}"
    assert 0 < used.registers <= LAUNCH["maxnreg"], f"sm_{capability}: {used}"
    assert used.shared <= 48 * 1024, f"sm_{capability}: {used}"
    assert not narrow_offsets(compiled.asm["ttir"])


@pytest.mark.parametrize("launch", LAUNCHES)
def test_compiles_within_its_resources(launch):
    for capability in aot.CAPABILITIES:
        check_resources(launch, capability)


@pytest.mark.parametrize("launch", CANDIDATES)
def test_what_tuning_may_choose_compiles_within_its_resources(launch):
    check_resources(launch, 90)


@pytest.mark.parametrize(
    ("kernel", "barriers"),
    [
        ("squeeze_excite-sample_fwd_kernel-lc0", 3),
        ("squeeze_excite-sample_bwd_kernel-lc0", 4),
        ("attention_gate-gate_bwd_kernel-monai, top, bf16", 1),
    ],
)
def test_programs_that_pass_values_in_memory_wait_for_them(kernel, barriers):
    """m, h, z forward; sums, dz, dh, dm backward; dt.  The interpreter could not tell: it has no threads."""
    (launch,) = [p.values[0] for p in LAUNCHES if p.id.startswith(kernel)]
    ttir = aot.compile(launch, 90).asm["ttir"]
    assert len(re.findall(r"\b(?:gpu|ttg)\.barrier\b", ttir)) == barriers


@pytest.mark.parametrize("label", ["pool, bf16", "latent, bf16", "gated bag, bf16"])
def test_items_of_one_head_are_read_in_vectors(label):
    """Their rows are aligned, whatever stride a dim of size 1 has."""
    kernel = f"softmax_pool-pool_kernel-{label}"
    launch = next(p.values[0] for p in LAUNCHES if p.id.startswith(kernel))
    ptx = aot.compile(launch, 90).asm["ptx"]
    assert not re.search(r"ld\.global\S*\.b16", ptx)


POOLS = import_module("attnkern.ops.softmax_pool.triton_aot").CALLS


@pytest.mark.parametrize("label", POOLS)
def test_a_pool_scores_its_items_itself(label):
    """No kernel reads them before it, whoever scores them."""
    with aot.recorded() as made:
        POOLS[label]()
    assert made[0].name == "pool_kernel"


def test_declarations_cover_every_kernel_that_launchers_use():
    from attnkern import _triton, ops

    used = set()
    for package in (
        _triton,
        *(import_module(f"{ops.__name__}.{op}") for op, _ in aot.declarations()),
    ):
        for found in pkgutil.iter_modules(package.__path__):
            if package is _triton or found.name.startswith("triton"):
                module = import_module(f"{package.__name__}.{found.name}")
                used |= {
                    value.__name__
                    for value in vars(module).values()
                    if isinstance(value, triton.JITFunction) and value.__name__.endswith("_kernel")
                }
    assert used == {parameter.values[0].name for parameter in LAUNCHES}


@triton.jit
def product_in_int32(x, rows, BLOCK: tl.constexpr):
    offset = (tl.program_id(0) * rows).to(tl.int64) + tl.arange(0, BLOCK)
    tl.store(x + offset, 0.0)


@triton.jit
def offset_in_int32(x, rows, BLOCK: tl.constexpr):
    tl.store(x + tl.program_id(0) * rows + tl.arange(0, BLOCK), 0.0)


@triton.jit
def product_in_int64(x, rows, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, BLOCK)
    tl.store(x + offset, 0.0)


@pytest.mark.parametrize(
    ("kernel", "faults"), [(product_in_int32, 1), (offset_in_int32, 2), (product_in_int64, 0)]
)
def test_the_scan_finds_narrow_offsets(kernel, faults):
    types = (("x", "*fp32"), ("rows", "i32"), ("BLOCK", "constexpr"))
    launch = aot.Launch(kernel, types, (("BLOCK", 128),), (0,), ())
    assert len(narrow_offsets(aot.compile(launch, 90).asm["ttir"])) == faults
