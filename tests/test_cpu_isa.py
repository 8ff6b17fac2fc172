"""CPU kernels under every instruction set of this processor, each forced in its own process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnkern import _native, testing
from attnkern.ops.softmax_pool import cases as pools
from attnkern.ops.squeeze_excite.cases import case
from attnkern.ops.squeeze_excite.op import squeeze, squeeze_excite

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not _native.available, reason=_native.reason)

ISAS = ("avx512_bf16", "avx512", "avx2", "scalar")
NAMES = {
    "resnet",
    "effnet",
    "residual_relu",
    "residual_silu",
    "lc0",
    "prelu",
    "one_sample_long",
    "2d",
    "1d",
    *("pool_mask", "pool_map", "pool_bags", "context", "context_3d", "context_many"),
    *("latent_queries", "query_keys", "query_bags", "additive_mask", "additive_classes"),
    *("additive_gelu", "gated_mask", "gated_map", "gated_wide", "ungated", "gated_bags"),
    *("monai", "monai_training_3d", "oktay", "coarse_training", "softplus", "target_g_norm"),
}

# Every dtype and layout of cases with and without tails; prints what leaves the budget.
CHECK = f"""
import torch
from attnkern import _C, testing
print(_C.cpu_isa())
for spec in testing.specs():
    for case in spec.cases:
        if case.name not in {NAMES!r}:
            continue
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for channels_last in (False, True):
                inputs = case.inputs(dtype, channels_last=channels_last)
                try:
                    testing.compare(spec, case, inputs, impl="native")
                except AssertionError as error:
                    print(spec.name, case.name, dtype, channels_last, error)
print("done")
"""


def python(code: str, isa: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ATTNKERN_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("isa", ISAS)
def test_results_within_budget(isa: str) -> None:
    if isa not in _native._C.cpu_isas():  # type: ignore[union-attr]
        pytest.skip(f"this processor has no {isa}")
    done = python(CHECK, isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [isa, "done"]


def test_unknown_isa_is_an_error() -> None:
    call = "import torch, attnkern; attnkern.functional.squeeze(torch.ones(2, 3, 4), impl='native')"
    done = python(call, "sse9")
    assert done.returncode == 1  # a Python error, not a signal
    assert "ATTNKERN_CPU_ISA must be one of" in done.stderr
    assert "got 'sse9'" in done.stderr


# Large enough to be shared out: grouped, phased, and channels-last blocks.
THREADED = [
    case("one_sample", 1, 96, (56, 56), 24, residual=True, out_act="relu"),
    case("few_samples", 3, 64, (40, 40), 16, act="silu"),
    case("many_samples", 16, 48, (28, 28), 12, drop_path=True),
]


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("c", THREADED, ids=lambda c: c.name)
def test_results_do_not_depend_on_threads(
    c: testing.Case, dtype: torch.dtype, channels_last: bool
) -> None:
    inputs = c.inputs(dtype, channels_last=channels_last)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            result = testing.run(squeeze_excite, inputs, c.options, impl="native")
            mean = squeeze(inputs["x"], impl="native")
            results.append([*result.outputs, *result.grads.values(), mean])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_act", ["identity", "relu"])
@pytest.mark.parametrize("shape", [(64, 16, 16), (33, 21, 21), (48, 7, 7)], ids=str)
def test_outputs_past_the_caches_are_the_same(
    shape: tuple[int, ...], out_act: str, dtype: torch.dtype, channels_last: bool
) -> None:
    """A batch too large for the last-level cache, of one sample over and over, against that sample alone.

    Rows of whole cache lines, long ones that are not, and short ones that are written as always.
    """
    torch.manual_seed(0)
    sample, dy = torch.randn(2, 1, *shape).to(dtype)
    if channels_last:
        sample, dy = map(testing.to_channels_last, (sample, dy))
    w1, w2 = torch.randn(8, shape[0]).to(dtype), torch.randn(shape[0], 8).to(dtype)
    cache = os.sysconf(194)  # _SC_LEVEL3_CACHE_SIZE of glibc, which Python has no name for
    cache = cache if cache > 0 else 16 << 20
    batch = cache // (2 * sample.numel() * sample.element_size()) + 2
    results = []
    for count in (1, batch):
        x = sample.expand(count, *shape).requires_grad_()
        y = squeeze_excite(x, w1, None, w2, residual=x, out_act=out_act, impl="native")
        results.append((y, *torch.autograd.grad(y, x, dy.expand(count, *shape))))
    for one, many in zip(*results, strict=True):
        assert many.shape == (batch, *shape)
        assert torch.equal(many, one.expand(batch, *shape))


# Long enough to be cut into units: of one sample, of bags, of samples that share a query or weights.
POOLS = {
    "softmax_pool": [
        pools.case("pool", {"values": (1, 9000, 64), "scores": (1, 3, 9000)}),
        pools.case("bags", {"values": (9000, 64), "scores": (9000,)}, lengths=(5000, 0, 3, 3997)),
    ],
    "context_attention_pool": [pools.case("context", {"x": (3, 96, 60, 60), "weight": (1, 96)})],
    "query_attention_pool": [
        pools.case("query", {"x": (2, 3000, 64), "query": (2, 5, 64)}, heads=4),
        pools.case("shared", {"x": (5, 1500, 64), "query": (1, 5, 64)}),
    ],
    "additive_attention_pool": [
        pools.case(
            "additive",
            {"keys": (3, 2000, 40), "values": (3, 2000, 64), "query": (1, 2, 40), "v": (40,)},
        )
    ],
    "gated_attention_pool": [
        pools.case(
            "gated", {"x": (2, 1200, 72), "V": (40, 72), "U": (40, 72), "b_V": (40,), "w": (2, 40)}
        )
    ],
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "c"),
    [(n, c) for n, cs in POOLS.items() for c in cs],
    ids=lambda p: getattr(p, "name", ""),
)
def test_pools_do_not_depend_on_threads(
    name: str, c: testing.Case, dtype: torch.dtype, channels_last: bool
) -> None:
    spec = next(spec for spec in testing.specs() if spec.name == name)
    inputs = c.inputs(dtype, channels_last=channels_last)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            result = testing.run(spec.function, inputs, c.options, impl="native")
            results.append([*result.outputs, *result.grads.values()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_vectors_and_elementary_functions(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "simd_checks"
    sources = [ROOT / "tests/cpp/simd_checks.cpp", ROOT / "csrc/cpu/isa.cpp"]
    flags = [
        "-O2",
        "-std=gnu++20",
        "-fno-math-errno",
        "-Wno-psabi",
        f"-I{ROOT / 'csrc'}",
        f"-I{ROOT / 'tests/cpp'}",
    ]
    subprocess.run(
        [*compiler.split(), *flags, *map(str, sources), "-o", str(program)], check=True, timeout=600
    )
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=600)
    isas = len(_native._C.cpu_isas())  # type: ignore[union-attr]
    assert done.stdout == f"checked {isas} instruction sets, 0 failures\n", done.stdout
