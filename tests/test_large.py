"""More than 2^31 elements: sizes, strides and offsets are 64 bits wide in every kernel."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import TARGETS

from attnkern import testing
from attnkern.functional import context_attention_pool, squeeze_excite

FAR = 2**31 + 2**12
"""Elements between the first sample of a map and the last."""


@contextmanager
def _unfilled():
    """Lets pages of fresh memory stay untouched, so that the space between samples costs none."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


def _far(t):
    """A copy whose samples (of bags: items) lie far apart."""
    step = FAR // (len(t) - 1)
    with _unfilled():
        storage = torch.empty(FAR + t.numel(), dtype=t.dtype, device=t.device)
    return storage.as_strided(t.shape, (step, *t.stride()[1:])).copy_(t)


KERNELS = [target for target in TARGETS if target.impl != "reference"]


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("target", KERNELS, ids=str)
def test_samples_far_apart(call, target, channels_last):
    if not target.serves(torch.bfloat16, call):
        pytest.skip("the operator has no such kernel")
    near = call.inputs(target, torch.bfloat16, channels_last=channels_last)
    maps = [k for k in call.case.maps if k in near and len(near[k]) > 1]
    if not maps:
        pytest.skip("one sample alone")
    far = {k: _far(t) if k in maps else t for k, t in near.items()}
    testing.compare(call.spec, call.case, far, impl=target.impl)


def _available_gigabytes():
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) >> 20 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.minutes
@pytest.mark.parametrize("target", [t for t in KERNELS if t.impl == "native"], ids=str)
def test_a_map_of_more_than_2_to_the_31_elements(target):
    """Two channels of 2^30 positions, 9 GB: the last ones differ from the rest, and are found."""
    if target.device == "cpu" and _available_gigabytes() < 12:
        pytest.skip("12 GB of free memory are needed")
    with _unfilled():
        x = torch.empty(1, 2, FAR // 2, dtype=torch.bfloat16, device=target.device)
    x[:, 0], x[:, 1] = 1.0, 2.0
    x[:, :, -1] = 4.0
    eye = torch.eye(2, device=target.device, dtype=x.dtype)
    y = squeeze_excite(x, eye, None, eye, None, impl=target.impl)
    s = torch.tensor([1.0, 2.0], dtype=torch.float64).sigmoid()  # the means are 1 and 2 to 1e-9
    for position, value in ((0, (1, 2)), (-2, (1, 2)), (-1, (4, 4))):
        want = (s * torch.tensor(value)).bfloat16()
        assert torch.equal(y[0, :, position].cpu(), want), position
    del y
    x[:, :, -1] = 100.0
    weight = torch.tensor([[1.0, 0.0]], device=target.device, dtype=x.dtype)
    z = context_attention_pool(x.transpose(1, 2), weight, impl=target.impl)
    # e^99 outweighs 2^30 items of e^1
    assert z.flatten().tolist() == [100.0, 100.0]
