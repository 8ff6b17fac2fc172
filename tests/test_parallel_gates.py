"""Gates in data parallelism, two processes: optimized before or after wrapping they train as the stock network does."""

import warnings

import gate_modules as copied
import pytest
import torch
import torch.multiprocessing as mp
from gate_blocks import settle
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from two_ranks import rank_of_two

import attnkern
from attnkern.nn import AttentionGate

SHARDED = "its weights are sharded; optimize before wrapping"


class Net(nn.Module):
    """A copied gate with norms, a copied one on a coarser grid, and our own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.same = copied.Attention_block(8, 8, 4)
        self.coarse = copied.GridAttentionBlock2D(8, 8, 4)
        self.own = AttentionGate(8, norm=True, theta_bias=True, out=True)

    def forward(self, x):
        x = self.stem(x)
        x = self.same(x, x)
        return self.own(self.coarse(x, x[..., ::2, ::2])[0], x)


def _wrap(kind, model):
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp1":
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    for module in (model.same, model.coarse, model.own):
        fully_shard(module)
    return fully_shard(model)


def _train(kind, optimized, channels_last, rank):
    torch.manual_seed(0)
    model = settle(Net())
    if optimized == "never":
        model.own.forward = model.own._by_layers
    if optimized == "before":
        attnkern.optimize(model, strict=True)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    wrapped = _wrap(kind, model)
    if optimized == "after":
        report = attnkern.optimize(wrapped)
        assert len(report.replaced) == (0 if kind == "fsdp1" else 2)
        assert {row.reason for row in report.skipped} == ({SHARDED} if kind == "fsdp1" else set())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(10 * rank + step))
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        optimizer.zero_grad()
        wrapped(x).square().mean().backward()
        optimizer.step()
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [t.detach().clone() for t in (*full, *model.buffers())]


def _worker(rank, folder):
    with rank_of_two(rank, folder):
        for kind in ("ddp", "fsdp1", "fsdp2"):
            for channels_last in (False, True) if kind == "ddp" else (False,):
                want = _train(kind, "never", channels_last, rank)
                for when in ("before", "after"):
                    with warnings.catch_warnings():
                        warnings.filterwarnings("error", message="(?i).*strides")  # DDP's reducer
                        got = _train(kind, when, channels_last, rank)
                    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*upsample. is deprecated")
def test_gates_train_in_parallel_as_the_stock_network_does(tmp_path):
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)
