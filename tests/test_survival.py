"""What optimized models survive: copies, wrappers, tracers, compilers, data parallelism."""

import copy
import warnings

import pytest
import torch
import torch._dynamo.utils
import torch.multiprocessing as mp
from nn_modules import copies
from test_optimize import BLOCKS, MODULES, close, image, outcome, seeded
from timm.layers.squeeze_excite import SEModule
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from two_ranks import rank_of_two

import attnkern


@pytest.mark.parametrize("make", [*MODULES.values(), *BLOCKS.values()], ids=[*MODULES, *BLOCKS])
def test_copies_are_optimized_and_use_their_own_parameters(make):
    model = seeded(make).eval()
    attnkern.optimize(model, impl="reference")
    want = outcome(model, image())
    replica = model._replicate_for_data_parallel()
    for kind, other in {**copies(model), "replica": replica}.items():
        # a replica shares its children with the original until they are replicated
        if kind != "replica":
            close(outcome(other, image()), want)
            for parameter in other.parameters():
                nn.init.ones_(parameter)
            fresh = seeded(make).eval()
            for parameter in fresh.parameters():
                nn.init.ones_(parameter)
            close(outcome(other, image()), outcome(fresh, image()))
        assert other.forward.args[0] is other, kind
        assert other.forward.keywords == {"impl": "reference"}
        attnkern.restore(other)
        assert "forward" not in vars(other)
    close(outcome(model, image()), want)


def test_state_dicts_load_into_the_stock_model_and_back():
    model = seeded(BLOCKS["dressed"]).eval()
    optimized = seeded(BLOCKS["dressed"]).eval()
    for parameter in optimized.parameters():
        nn.init.normal_(parameter, std=0.5)
    attnkern.optimize(optimized, impl="reference")
    model.load_state_dict(optimized.state_dict())
    close(outcome(model, image()), outcome(optimized, image()))
    optimized.load_state_dict(seeded(BLOCKS["dressed"]).state_dict())
    close(outcome(optimized, image()), outcome(seeded(BLOCKS["dressed"]).eval(), image()))


def test_functional_call_and_checkpointing_use_the_given_parameters():
    model = seeded(BLOCKS["basic"]).eval()
    optimized = copy.deepcopy(model)
    attnkern.optimize(optimized, impl="reference")
    doubled = {name: 2 * p for name, p in model.named_parameters()}
    torch.testing.assert_close(
        torch.func.functional_call(optimized, doubled, image()),
        torch.func.functional_call(model, doubled, image()),
    )
    checkpointed = lambda x: torch.utils.checkpoint.checkpoint(optimized, x, use_reentrant=False)  # noqa: E731
    checkpointed.parameters = optimized.parameters
    close(outcome(checkpointed, image()), outcome(model, image()))


def test_symbolic_tracing_sees_the_stock_modules():
    model = nn.Sequential(seeded(BLOCKS["basic"]), seeded(MODULES["timm"])).eval()
    attnkern.optimize(model, impl="reference")
    graph = torch.fx.symbolic_trace(model)
    assert any(node.target == "1.fc1" for node in graph.graph.nodes)
    torch.testing.assert_close(graph(image()), model(image()))


def _network():
    blocks = [make for name, make in BLOCKS.items() if name != "dressed"]
    return seeded(lambda: nn.Sequential(*(make() for make in (*blocks, *MODULES.values()))))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_compiles_to_one_graph_for_every_batch(train, target):
    model = _network().to(target.device).train(train)
    optimized = copy.deepcopy(model)
    attnkern.optimize(optimized, impl=target.impl)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(optimized, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (4, 2, 7):
        x = image(batch, 16, 6, 6, device=target.device)
        close(outcome(compiled, x), outcome(model, x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_late_hook_recompiles():
    model, log = SEModule(16).eval(), []
    attnkern.optimize(model, impl="reference")
    torch._dynamo.reset()
    # torch assumes by default that no hook comes after compilation; some versions see it all the same
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        compiled = torch.compile(model, backend="eager")
        compiled(image())
    model.fc1.register_forward_hook(lambda *_: log.append(1))
    compiled(image())
    assert log


@pytest.mark.parametrize("strict", [False, True])
def test_exports(strict, target):
    model = _network().to(target.device).eval()
    optimized = copy.deepcopy(model)
    attnkern.optimize(optimized, impl=target.impl)
    x = image(device=target.device)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(optimized, (x,), dynamic_shapes=({0: batch},), strict=strict)
    for size in (4, 3):
        x = image(size, 16, 6, 6, device=target.device)
        torch.testing.assert_close(program.module()(x), model(x))
    graphs = [
        m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)
    ]
    served = [n for g in graphs for n in g.nodes if "squeeze_excite_fwd" in str(n.target)]
    assert len(served) == (0 if target.impl == "reference" else len(BLOCKS) - 1 + len(MODULES))


# ------------------------------------------------------------------ data parallelism, two processes


def _small():
    return seeded(lambda: nn.Sequential(BLOCKS["bottleneck"](), MODULES["torchvision"]()))


def _wrap(kind, model):
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp1":
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    if kind == "fsdp2":
        for block in model:
            fully_shard(block)
        return fully_shard(model)
    for module in list(model.modules()):  # "fsdp2 convolutions": each gathers its own weights
        if isinstance(module, nn.Conv2d):
            fully_shard(module)
    return fully_shard(model)


def _train(kind, optimized, channels_last, rank):
    model = _small()
    if optimized == "before":
        attnkern.optimize(model)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    model = _wrap(kind, model)
    if optimized == "after":
        report = attnkern.optimize(model)
        assert len(report.replaced) == (0 if kind == "fsdp2 convolutions" else 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        x = torch.randn(4, 16, 6, 6, generator=torch.Generator().manual_seed(10 * rank + step))
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [p.detach().clone() for p in full]


def _worker(rank, kind, folder):
    with rank_of_two(rank, folder):
        for channels_last in (False, True) if kind == "ddp" else (False,):
            want = _train(kind, "never", channels_last, rank)
            for when in ("before", "after"):
                with warnings.catch_warnings():
                    if kind == "ddp":  # whose reducer warns of gradients in other strides
                        warnings.simplefilter("error")
                    close(_train(kind, when, channels_last, rank), want)
            start = [p.detach() for p in _small().parameters()]
            if kind == "ddp":
                assert not any(torch.equal(a, b) for a, b in zip(want, start, strict=True))


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2", "fsdp2 convolutions"])
def test_trains_in_parallel_as_the_stock_model_does(kind, tmp_path):
    mp.spawn(_worker, (kind, str(tmp_path)), nprocs=2)
