"""FSDP1, two processes: what is optimized before it or after is served by it, or named with the true reason."""

import gate_blocks
import pool_heads
import pytest
import torch
import torch.multiprocessing as mp
from test_optimize import BLOCKS, MODULES, image, seeded
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from two_ranks import rank_of_two

import attnkern
from attnkern import testing
from attnkern.integrations import _squeeze_excite, timm
from attnkern.integrations._structure import SHARDED
from attnkern.ops.attention_gate import op as gates
from attnkern.ops.softmax_pool import call as pools


class Net(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *maps):
        return self.block(*maps)


def _everything():
    """Name, and what makes a module and its inputs."""
    for name, make in {**MODULES, **BLOCKS}.items():
        yield name, lambda make=make: (seeded(make).eval(), image())
    for name in pool_heads.HEADS:
        yield name, lambda name=name: pool_heads.head(name)
    for name in gate_blocks.BLOCKS:
        yield name, lambda name=name: gate_blocks.block(name)


def _count(module, name, calls):
    original = getattr(module, name)

    def counted(*arguments, **options):
        result = original(*arguments, **options)
        if result is not None:  # `run` refuses so: the stock forward answers
            calls.append(name)
        return result

    setattr(module, name, counted)


def _worker(rank, folder, own):
    calls, counts = [], {True: 0, False: 0}
    for module in (_squeeze_excite, timm):
        _count(module, "run", calls)
    _count(pools, "pool", calls)
    _count(gates, "gate", calls)
    with rank_of_two(rank, folder):
        for name, make in _everything():
            for before in (True, False):
                block, maps = make()
                maps = maps if isinstance(maps, list) else [maps]
                want, net = testing.as_tuple(block(*maps)), Net(block)
                if before:
                    report = attnkern.optimize(net, strict=True)
                net = FullyShardedDataParallel(
                    net, device_id=torch.device("cpu"), use_orig_params=own
                )
                if not before:
                    report = attnkern.optimize(net)
                    assert {row.reason for row in report.skipped} <= {SHARDED}, name
                    assert report.replaced or report.skipped, name
                calls.clear()
                got = testing.as_tuple(net(*maps))
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, msg=name)
                assert bool(calls) == bool(report.replaced), name
                counts[before] += bool(calls)
        assert counts[True] == len([*_everything()])
        assert counts[False] >= len(MODULES) + len(BLOCKS)


@pytest.mark.filterwarnings("ignore:.*upsample. is deprecated")
@pytest.mark.parametrize("own", [False, True], ids=["flat", "own"])
def test_fsdp_is_named_where_it_is_the_reason(own, tmp_path):
    """With a flat parameter for the module's, and with ``use_orig_params``."""
    mp.spawn(_worker, (str(tmp_path), own), nprocs=2)
