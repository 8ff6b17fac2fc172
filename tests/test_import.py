"""Importing: quick, without side effects, and without any optional part."""

from __future__ import annotations

import re
import shutil
import textwrap
from pathlib import Path

import pytest
import torch
from test_select import BLOCK, fresh

import attnkern

CALL = """
    import torch, attnkern
    x, w1, w2 = torch.randn(2, 8, 5, 5), torch.randn(2, 8), torch.randn(8, 2)
    x.requires_grad_()
    y = attnkern.functional.squeeze_excite(x, w1, None, w2)
    y.sum().backward()
    assert x.grad.isfinite().all()
    print("served")
"""


def _without(*names):
    return f"BLOCKED = {set(names)}" + textwrap.dedent(BLOCK) + textwrap.dedent(CALL)


@pytest.mark.parametrize(
    "names",
    [
        ("triton",),
        ("attnkern._C",),
        ("timm", "torchvision"),
        ("triton", "attnkern._C", "timm", "torchvision"),
    ],
    ids=lambda names: "+".join(names),
)
def test_works_without(names):
    assert fresh(_without(*names)).split() == ["served"]


def test_imports_no_optional_package_and_starts_no_device():
    out = fresh(
        """
        import sys, torch
        before = set(sys.modules)
        import attnkern
        assert not torch.cuda.is_initialized()
        new = {name.split(".")[0] for name in set(sys.modules) - before}
        print(*sorted(new & {"triton", "timm", "torchvision", "monai", "numpy", "scipy", "matplotlib"}))
        """
    )
    assert out.split() == []


def test_import_costs_little_over_torch():
    """The best of three fresh interpreters: 75 ms of one core, whoever else runs; 32 on the CPU of the README."""
    code = """
        import time, torch
        start = time.process_time()
        import attnkern
        print(time.process_time() - start)
    """
    best = min(float(fresh(code)) for _ in range(3))
    assert best < 0.075, f"{best * 1e3:.0f} ms"


def test_import_leaves_torch_alone():
    fresh(
        """
        import torch
        threads, state = torch.get_num_threads(), torch.get_rng_state()
        before = {k: v for k, v in vars(torch).items() if not k.startswith("_")}
        import attnkern
        assert torch.get_num_threads() == threads
        assert torch.equal(torch.get_rng_state(), state)
        after = {k: v for k, v in vars(torch).items() if not k.startswith("_")}
        assert after == before
        """
    )


def test_a_copy_with_no_compiled_part_serves_through_the_reference(tmp_path):
    """What an install without a compiler is: the Python files alone."""
    source = Path(attnkern.__file__).parent
    shutil.copytree(
        source, tmp_path / "attnkern", ignore=shutil.ignore_patterns("_C*", "__pycache__")
    )
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        # the finder of an editable install would hand out the compiled part of the checkout
        sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
        import warnings
        warnings.simplefilter("ignore")
        {textwrap.indent(textwrap.dedent(CALL), " " * 8)}
        assert attnkern.__file__.startswith({str(tmp_path)!r})
        from attnkern import _native
        assert not _native.available and "pip install" in _native.reason
    """
    assert "served" in fresh(code)


class _Dataset(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        x = torch.full((1, 4, 3), float(index))
        return attnkern.functional.squeeze_excite(x, torch.eye(4), gate="identity", apply="scale")[
            0
        ]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers(method):
    attnkern.functional.squeeze(torch.ones(1, 2, 3))  # the parent has used its thread pool
    loader = torch.utils.data.DataLoader(_Dataset(), num_workers=2, multiprocessing_context=method)
    got = torch.cat(list(loader))
    assert torch.equal(got[:, 0, 0], torch.arange(4.0) ** 2)


def test_version_is_the_packages():
    text = (Path(attnkern.__file__).parents[1] / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.+)"$', text, re.M)[1] == attnkern.__version__
