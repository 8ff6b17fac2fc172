"""Which implementation runs: an explicit choice never falls back, auto says once when it does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

import attnkern
from attnkern import _native, _once, _select
from attnkern.functional import squeeze, squeeze_excite


def fresh(code, **environment):
    """Run ``code`` in a new interpreter; its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCK = """
    import sys
    class Hider:  # as if BLOCKED were not installed
        def __init__(self, finder):
            self.finder = finder
        def find_spec(self, name, path=None, target=None):
            return None if name in BLOCKED else self.finder.find_spec(name, path, target)
    sys.meta_path[:] = map(Hider, sys.meta_path)
"""


def test_the_compiled_part_is_built_where_a_compiler_is():
    assert _native.available or shutil.which("c++") is None, _native.reason


def test_auto_prefers_the_fastest(target):
    device = torch.device(target.device)
    order = [
        i for i in _select.ORDER[device.type] if _select.refuse(i, device, torch.float32) is None
    ]
    assert _select.select("op", "auto", device, torch.float32) == order[0]
    assert _select.select("op", target.impl, device, torch.float32) == target.impl


def test_use_impl_changes_auto_only(monkeypatch):
    device, before = torch.device("cpu"), _select.requested("auto")
    with attnkern.use_impl("reference"):
        assert _select.select("op", "auto", device, torch.float32) == "reference"
        if _native.available:
            assert _select.select("op", "native", device, torch.float32) == "native"
        with attnkern.use_impl("auto"):  # the inner block wins
            assert _select.requested("auto") == "auto"
        assert _select.requested("auto") == "reference"
        with pytest.raises(ZeroDivisionError), attnkern.use_impl("native"):
            raise ZeroDivisionError
        assert _select.requested("auto") == "reference"
    assert _select.requested("auto") == before
    with pytest.raises(ValueError, match=r"use_impl: impl must be one of .*, got 'fast'"):
        attnkern.use_impl("fast").__enter__()
    with attnkern.use_impl("triton"), pytest.raises(ValueError, match="impl='triton' cannot serve"):
        squeeze(torch.ones(1, 2, 3, dtype=torch.float64))


@pytest.mark.skipif(not _native.available, reason="one implementation: nothing to tell apart")
def test_use_impl_reaches_the_call():
    """The memory of admitted calls holds one verdict per meaning of auto."""
    x, w = torch.randn(2, 8, 5), torch.randn(8, 8)
    ran = []
    for impl in ("native", "reference", "native", "reference"):
        with attnkern.use_impl(impl), torch.profiler.profile() as profile:
            squeeze_excite(x, w)
        names = {event.key for event in profile.key_averages()}
        ran.append("native" if "attnkern::squeeze_excite_fwd" in names else "reference")
    assert ran == ["native", "reference", "native", "reference"]


def test_use_impl_is_for_every_thread():
    seen = []
    with attnkern.use_impl("reference"):
        thread = threading.Thread(target=lambda: seen.append(_select.requested("auto")))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_first_calls_from_many_threads_agree():
    x, w = torch.randn(2, 8, 7), torch.randn(8, 8)
    want = squeeze_excite(x, w, gain=1.25)
    barrier, results = threading.Barrier(16), []

    def work(index):
        barrier.wait()
        for step in range(20):
            y = squeeze_excite(x[: 1 + (index + step) % 2], w, gain=1.25)
            results.append(torch.equal(y, want[: len(y)]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 320
    assert all(results)


def test_the_environment_variable_changes_auto_only():
    out = fresh(
        """
        import torch
        from attnkern import _select
        cpu = torch.device("cpu")
        print(_select.select("op", "auto", cpu, torch.float32))
        print(_select.requested("native"))
        """,
        ATTNKERN_IMPL="reference",
    )
    assert out.split() == ["reference", "native"]


def test_a_wrong_environment_variable_is_an_error_at_import():
    with pytest.raises(
        AssertionError, match=r"ValueError: attnkern: ATTNKERN_IMPL must be one of .*'fast'"
    ):
        fresh("import attnkern", ATTNKERN_IMPL="fast")


def test_the_fallback_to_the_reference_warns_once_with_its_reason():
    out = fresh(
        "BLOCKED = {'attnkern._C'}"
        + textwrap.dedent(BLOCK)
        + textwrap.dedent(
            """
            import warnings, torch
            from attnkern.functional import squeeze, squeeze_excite
            x, w = torch.ones(1, 2, 3), torch.ones(2, 2)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for _ in range(3):
                    squeeze_excite(x, w)
                squeeze_excite(x.double(), w.double())
                squeeze(x)
            for w in caught:
                print(w.filename, w.message)
            """
        )
    )
    lines = out.splitlines()
    assert len(lines) == 3  # one an operator and dtype
    assert all("<string>" in line for line in lines), "the warning points at the caller"
    assert (
        "squeeze_excite runs its reference implementation for torch.float32 on cpu: native: "
        in lines[0]
    )
    assert "attnkern._C" in lines[0]
    assert "torch.float64" in lines[1]


def test_an_explicit_choice_never_falls_back():
    out = fresh(
        "BLOCKED = {'attnkern._C'}"
        + textwrap.dedent(BLOCK)
        + textwrap.dedent(
            """
            import torch
            from attnkern.functional import squeeze
            try:
                squeeze(torch.ones(1, 2, 3), impl="native")
            except ValueError as error:
                print(error)
            """
        )
    )
    assert "squeeze: impl='native' cannot serve torch.float32 on cpu: the compiled extension" in out
    assert "reference: can serve it" in out
    assert "triton: " in out


# ------------------------------------------------------------------ torch.func and forward mode


def test_transforms_run_through_the_reference():
    x, w = torch.randn(3, 2, 4, 5), torch.randn(4, 4)

    def call(x, w):
        return squeeze_excite(x, w)

    with pytest.warns(UserWarning, match="torch.func transforms") if _native.available else _none():
        _once._said.clear()
        mapped = torch.func.vmap(call, (0, None))(x, w)
    torch.testing.assert_close(mapped, torch.stack([call(a, w) for a in x]))
    tangent = torch.randn_like(x[0])
    _, got = torch.func.jvp(lambda a: call(a, w), (x[0],), (tangent,))
    step = 1e-2
    want = (call(x[0] + step * tangent, w) - call(x[0] - step * tangent, w)) / (2 * step)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    grads = torch.func.vmap(torch.func.grad(lambda a, w: call(a, w).sum(), 1), (0, None))(x, w)
    assert grads.shape == (3, 4, 4)
    leaf = w.clone().requires_grad_()
    call(x[1], leaf).sum().backward()
    torch.testing.assert_close(grads[1], leaf.grad)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x[0], tangent)
        y = torch.autograd.forward_ad.unpack_dual(call(dual, w))
        torch.testing.assert_close(y.tangent, got)


def _none():
    import contextlib

    return contextlib.nullcontext()


@pytest.mark.skipif(not _native.available, reason="the explicit choice would be refused anyway")
def test_an_explicit_choice_under_a_transform_is_an_error():
    with pytest.raises(ValueError, match=r"impl='native' cannot serve .*torch\.func transforms"):
        torch.func.vmap(lambda x: squeeze(x, impl="native"))(torch.ones(2, 1, 2, 3))
