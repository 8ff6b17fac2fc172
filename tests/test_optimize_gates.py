"""Drop-in rules of attention gates: budget, dtypes, statistics, survival, calls and hooks."""

import copy
import warnings

import gate_modules as copied
import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from conftest import DTYPES, TARGETS
from gate_blocks import BLOCKS, FEW, block, changed, close, gradients, monai, settle
from nn_modules import copies
from test_optimize import traces
from torch import nn
from torch.utils.checkpoint import checkpoint

import attnkern
from attnkern import _select, testing
from attnkern.ops.attention_gate import module as gate_module
from attnkern.ops.attention_gate import op

pytestmark = pytest.mark.filterwarnings("ignore:.*upsample. is deprecated")
GATES = [
    target
    for target in TARGETS
    if _select.refuse(target.impl, torch.device(target.device), torch.float32, "attention_gate_fwd")
    is None
]


@pytest.fixture
def served(monkeypatch):
    """How many gates the operator has computed."""
    calls, original = [], op.gate

    def counted(*arguments):
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(op, "gate", counted)
    return calls


def optimized(model, impl="reference"):
    twin = copy.deepcopy(model)
    assert attnkern.optimize(twin, impl=impl, strict=True).replaced
    return twin


# ------------------------------------------------------------------ results


def _spec(name, model, impl):
    """Block and optimized block as functions of maps and parameters, for the budget's oracle."""

    def function(net):
        def run(**tensors):
            maps = [tensors.pop(key) for key in ("first", "second")]
            buffers = dict(net.named_buffers())
            floating = {k: b.to(maps[0]) for k, b in buffers.items() if b.is_floating_point()}
            return torch.func.functional_call(net, {**tensors, **floating}, tuple(maps))

        return run

    case = testing.Case(name, {})
    twin = function(optimized(model, impl))
    return testing.OpSpec(name, twin, function(model), [case], "attention_gate_fwd")


@pytest.mark.parametrize("target", GATES, ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", DTYPES[:3], ids=str)
@pytest.mark.parametrize("name", [n for n in BLOCKS if n != "grids"])  # which is a net of gates
def test_errors_are_within_the_budget(name, kind, train, target, served):
    model, maps = block(name)
    spec = _spec(name, model.train(train), target.impl)
    tensors = {
        **dict(zip(("first", "second"), maps, strict=True)),
        **dict(model.named_parameters()),
    }
    tensors = {key: t.detach().to(target.device, kind) for key, t in tensors.items()}
    served.clear()
    testing.compare(spec, spec.cases[0], tensors)
    assert served


@pytest.mark.parametrize("target", GATES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_channels_last_stays_channels_last(name, target, served):
    model, maps = block(name)
    twin = optimized(model, target.impl).to(target.device)
    maps = [testing.to_channels_last(t).to(target.device) for t in maps]
    want, got = (testing.as_tuple(net.to(target.device)(*maps)) for net in (model, twin))
    assert got[0].stride() == want[0].stride()
    close(got, want)
    assert served


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("maps", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["monai", "grid", "torr softmax"])
def test_autocast_gives_the_dtypes_or_the_error_of_eager(name, maps, weights, low):
    model, (x, g) = block(name, weights)
    twin = optimized(model)
    for second in (maps, torch.float32):

        def result(net, second=second):
            try:
                with torch.no_grad(), torch.autocast("cpu", low):
                    return testing.as_tuple(net(x.to(maps), g.to(second)))
            except Exception as error:
                return type(error), str(error)

        want, got = result(model), result(twin)
        if not isinstance(want[0], torch.Tensor):
            assert got == want
            continue
        eps = max(torch.finfo(kind).eps for kind in (maps, weights, low))
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            scale = float(b.abs().max().double())
            torch.testing.assert_close(a, b, rtol=0, atol=16 * eps * max(scale, 1.0))


ACCEPTED = {
    "leaky": lambda: changed("image segmentation", "relu", nn.LeakyReLU(0.2)),
    "no norm": lambda: changed("image segmentation", "W_g", nn.Sequential(nn.Conv2d(6, 4, 1))),
    "no bias": lambda: changed("image segmentation", "W_x.0", nn.Conv2d(8, 4, 1, bias=False)),
}


@pytest.mark.parametrize("make", ACCEPTED.values(), ids=ACCEPTED)
def test_variants_are_served(make, served):
    model = settle(make()).train()
    maps = [torch.randn(3, channels, 4, 5) for channels in (6, 8)]
    twin = optimized(model)
    served.clear()
    close(gradients(twin, maps), gradients(model, maps))
    assert served


def test_norms_may_stay_float32_beside_low_precision_layers(served):
    model, maps = block("monai", torch.bfloat16)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    twin = optimized(model)
    for train in (False, True):
        want, got = (gradients(net.train(train), maps) for net in (model, twin))
        close(got, want, 0.1)
    assert served


# ------------------------------------------------------------------ statistics


def _norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _set(norms, **values):
    for norm in norms:
        vars(norm).update(values)


NORMS = {
    "cumulative": lambda norms: _set(norms, momentum=None),
    "momentum": lambda norms: _set(norms, momentum=0.7, eps=0.3),
    "frozen": lambda norms: _set(norms, training=False),
    "one frozen": lambda norms: _set(norms[1:2], training=False),
    "not tracked": lambda norms: _set(norms, track_running_stats=False),
    "uncounted": lambda norms: [_set([n], momentum=None) or n._buffers.update(num_batches_tracked=None) for n in norms],
    "without statistics": lambda norms: [
        n._buffers.update(running_mean=None, running_var=None) for n in norms
    ],
    "not affine": lambda norms: [n._parameters.update(weight=None, bias=None) for n in norms],
    "no shift": lambda norms: [n._parameters.update(bias=None) for n in norms[:2]],
}  # fmt: skip


@pytest.mark.parametrize("change", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("name", ["monai", "grid 2d"])
def test_running_statistics_move_as_torchs(name, change, served):
    """Over several steps in training and then in evaluation, and every parameter has its gradient."""
    model, maps = block(name, torch.float64)
    model.train()
    change(_norms(model))
    twin = optimized(model)
    served.clear()
    for step in range(3):
        scaled = [t * (1 + step) for t in maps]
        close(gradients(twin, scaled), gradients(model, scaled), 1e-9)
    _set([*_norms(model), *_norms(twin)], training=False)
    close(gradients(twin, maps), gradients(model, maps), 1e-9)
    assert len(served) == 4


def test_a_fold_is_never_kept():
    """Writes through .data, as of averaged models, count no version."""
    model, maps = block("monai")
    twin = optimized(model)
    with torch.no_grad():
        twin(*maps)
        for net in (model, twin):
            for t in (*net.parameters(), *net.buffers()):
                if t.is_floating_point():
                    t.data.mul_(0.7)
        close([twin(*maps)], [model(*maps)])


def test_synchronised_norms_share_statistics_by_their_own_forward(served, monkeypatch):
    """SyncBatchNorm is a BatchNorm but in training in a process group."""
    model, maps = block("monai")
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)).train()
    twin = optimized(synced)
    close(gradients(twin, maps), gradients(synced, maps))
    assert len(served) == 1
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for net in (synced, twin):
            with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):
                net(*maps)
        close(gradients(twin.eval(), maps), gradients(synced.eval(), maps))
        assert len(served) == 2
        norm = _norms(twin)[0].train()
        assert gate_module.synchronised(norm, maps[0])
        on_gpu = type("OnGpu", (), {"is_cuda": True})()
        assert not gate_module.synchronised(norm, on_gpu)  # one rank
        monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
        assert gate_module.synchronised(norm, on_gpu)
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------ report and survival


def test_report_names_gates_and_reasons():
    model = nn.ModuleDict(
        {
            "two": copied.MultiAttentionBlock(4, 4, 2),
            "mean": copied._GridAttentionBlockND_TORR(4, 4, 2, 2, "concatenation_mean"),
            "monai": monai(2, 2, 4, 4),
        }
    )
    report = attnkern.optimize(model, impl="reference")
    assert [(row.name, row.op, row.reason) for row in report.replaced] == [
        (name, "attention_gate", "") for name in ("two.gate_block_1", "two.gate_block_2", "monai")
    ]
    assert [(row.name, row.reason) for row in report.skipped] == [
        ("mean", "its mode is concatenation_mean, neither a sigmoid nor a softmax")
    ]


@pytest.mark.parametrize("name", BLOCKS)
def test_dry_run_optimize_twice_and_restore(name, served):
    model, maps = block(name)
    before, keys = traces(model), list(model.state_dict())
    want = gradients(model, maps)
    dry = attnkern.optimize(model, impl="reference", dry_run=True)
    assert traces(model) == before
    assert dry.replaced
    assert not dry.skipped
    assert attnkern.optimize(model, impl="reference") == dry
    served.clear()  # the trials
    close(gradients(model, maps), want)
    assert len(served) == len(dry.replaced)
    changed = {key for key, now in traces(model).items() if now != before[key]}
    assert changed == {"" if r.name == "(model)" else r.name for r in dry.replaced}
    assert list(model.state_dict()) == keys
    assert attnkern.optimize(model, impl="reference") == dry
    attnkern.restore(model)
    assert traces(model) == before
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, maps), want, strict=True))


class Around(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, g, x):
        return self.block(g, x)


@pytest.mark.parametrize("name", ["monai", "image segmentation"])
def test_symbolic_tracing_sees_the_stock_layers(name):
    model, maps = block(name)
    traced = torch.fx.symbolic_trace(Around(optimized(model)))
    assert any(node.target == "block.relu" for node in traced.graph.nodes)
    torch.testing.assert_close(traced(*maps), model(*maps))


def shared_layer():
    model = settle(copied.Attention_block(6, 6, 4))
    model.W_x[0] = model.W_g[0]
    return model


def tied_weight():
    model = settle(copied.Attention_block(6, 6, 4))
    model.W_x[0].weight = model.W_g[0].weight
    return model


@pytest.mark.parametrize("make", [shared_layer, tied_weight])
def test_the_trial_leaves_shared_tensors_as_they_were(make, served):
    model = make().eval()
    tensors = {name: (t, t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    twin = optimized(model)
    attnkern.optimize(model, dry_run=True)
    now = model.state_dict(keep_vars=True)
    assert all(now[name] is t and torch.equal(t, was) for name, (t, was) in tensors.items())
    maps = [torch.randn(2, 6, 4, 5) for _ in range(2)]
    served.clear()
    close(gradients(twin, maps), gradients(model, maps))
    assert served


@pytest.mark.parametrize("name", [n for n in BLOCKS if not n.startswith("torr")])
def test_copies_are_optimized_and_use_their_own_parameters(name, served):
    model, maps = block(name)
    fresh = copy.deepcopy(model)
    attnkern.optimize(model, impl="reference")
    others = [*copies(model).values()]
    for net in (*others, fresh):
        settle(net)
        for p in net.parameters():
            p.data += 0.1
    served.clear()
    for other in others:
        close(gradients(other, maps), gradients(fresh, maps))
    assert len(served) >= 3
    replica = next(m for m in model.modules() if "forward" in vars(m))
    twin = replica._replicate_for_data_parallel()
    assert vars(twin)["forward"].args[0] is twin


def test_lambdas_of_the_classifiers_gate_survive_deepcopy(served):
    model, maps = block("torr linear")
    twin = copy.deepcopy(optimized(model))
    served.clear()
    close(gradients(twin, maps), gradients(model, maps))
    assert served


@pytest.mark.parametrize("target", GATES, ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", FEW)
def test_compiles_to_one_graph(name, train, target):
    model, maps = block(name)
    model, maps = model.to(target.device).train(train), [t.to(target.device) for t in maps]
    twin = optimized(model, target.impl)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    compiled.parameters, compiled.buffers = twin.parameters, twin.buffers
    close(gradients(compiled, maps), gradients(model, maps))


@pytest.mark.parametrize("target", GATES, ids=str)
@pytest.mark.parametrize("name", ["monai", "grid"])
def test_exports(name, target):
    model, maps = block(name)
    model, maps = model.to(target.device), [t.to(target.device) for t in maps]
    program = torch.export.export(optimized(model, target.impl), tuple(maps), strict=False)
    close(testing.as_tuple(program.module()(*maps)), testing.as_tuple(model(*maps)))
    graphs = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = [str(node.target) for m in graphs for node in m.graph.nodes]
    assert target.impl == "reference" or any("attention_gate_fwd" in t for t in targets)


# ------------------------------------------------------------------ calls


class Renamed(copied.Attention_block):
    """A copy whose arguments have other names, the roles in the same order."""

    def forward(self, x, skip):
        hidden = self.relu(self.W_g(x) + self.W_x(skip))
        return skip * self.psi(hidden)


NAMED = {
    "monai": (lambda: monai(2, 5, 8, 8), ("g", "x")),
    "image segmentation": (lambda: copied.Attention_block(8, 8, 4), ("g", "x")),
    "renamed": (lambda: Renamed(8, 8, 4), ("x", "skip")),
    "grid": (lambda: copied.GridAttentionBlock2D(8, 8, 4, sub_sample_factor=1), ("x", "g")),
}


@pytest.mark.parametrize(("make", "names"), NAMED.values(), ids=NAMED)
def test_maps_may_be_given_by_name(make, names, served):
    model = settle(make())
    twin = optimized(model)
    first, second = torch.randn(2, 2, 8, 4, 4)
    served.clear()
    for order in (names, names[::-1]):
        given = dict(zip(order, (first, second), strict=True))
        close(gradients(twin, [], **given), gradients(model, [], **given))
    close(
        gradients(twin, [first], **{names[1]: second}),
        gradients(model, [first], **{names[1]: second}),
    )
    assert len(served) == 3
    own = type(model).forward.__code__.co_varnames[3:]  # which are no arguments
    for wrong in (
        *({}, {"z": first}, {names[0]: first}, {names[0]: first, "z": second}),
        *({name: first} for name in own),
    ):
        with pytest.raises(TypeError) as stock:
            model(first, **wrong)
        with pytest.raises(TypeError) as ours:
            twin(first, **wrong)
        assert str(ours.value) == str(stock.value)


def test_an_argument_with_a_default_is_no_map():
    class Extra(copied.Attention_block):
        def forward(self, g, x, extra=None):
            return x * self.psi(self.relu(self.W_g(g) + self.W_x(x)))

    twin, first = optimized(Extra(8, 8, 4)), torch.randn(2, 8, 4, 4)
    twin(first, x=first)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        twin(g=first, extra=first)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", FEW)
def test_unusual_inputs_give_what_eager_gives(name, train):
    model, (x, g) = block(name)
    model.train(train)
    twin = optimized(model)
    ones = torch.ones(1, *x.shape[1:2], *(1 for _ in x.shape[2:]))
    for maps in (
        (x.double(), g.double()),
        (x.bfloat16(), g),
        (x, g.double()),
        (x[0], g[0]),
        (x[:0], g[:0]),
        (x[..., :0], g[..., :0]),
        (x, g[:1]),
        (x, g[..., :1]),
        (x, g[:, :2]),
        (x[..., :1], g[..., :1]),
        (x.unsqueeze(0), g.unsqueeze(0)),
        (x.int(), g.int()),
        (ones, g[:1, :, :1, :1]),
        ("text", g),
        (x, None),
    ):

        def result(net, maps=maps):
            try:
                return testing.as_tuple(net(*maps))
            except Exception as error:
                return type(error), str(error)

        want, got = result(model), result(twin)
        if not isinstance(want[0], torch.Tensor):
            assert got == want
        else:
            torch.testing.assert_close(got, want, equal_nan=True)
    for a, b in zip(twin.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_tensor_subclasses_come_back_as_from_the_stock_block(served):
    MetaTensor = pytest.importorskip("monai.data").MetaTensor
    model, maps = block("monai")
    twin = optimized(model)
    g, x = (MetaTensor(t, meta={"subject": "one"}) for t in maps)
    for train in (False, True):
        want, got = model.train(train)(g, x), twin.train(train)(g, x)
        assert type(got) is type(want) is MetaTensor
        assert got.meta["subject"] == "one"
        torch.testing.assert_close(got.as_tensor(), want.as_tensor())
        got.sum().backward()
    assert len(served) == 2


def test_checkpointed_blocks_train(served):
    model, maps = block("monai")
    twin = optimized(model.train())
    run = lambda *maps: checkpoint(twin, *maps, use_reentrant=False)  # noqa: E731
    again = lambda *maps: checkpoint(model, *maps, use_reentrant=False)  # noqa: E731
    for function, net in ((run, twin), (again, model)):
        function.parameters, function.buffers = net.parameters, net.buffers
    close(gradients(run, maps), gradients(again, maps))
    assert len(served) == 2


CHILDREN = {
    "monai": ("W_g.0", "psi", "relu"),
    "image segmentation": ("W_x.1", "psi.2"),
    "grid": ("theta", "W", "W.1"),
    "torr": ("psi", "W"),
}


@pytest.mark.parametrize(
    ("name", "child"), [(n, c) for n, children in CHILDREN.items() for c in children]
)
def test_a_late_hook_runs_the_modules_own_forward(name, child, served):
    model, maps = block(name)
    twin = optimized(model.train())
    log = []
    for net in (model, twin):
        net.get_submodule(child).register_forward_hook(lambda *_: log.append(1))
    want = gradients(model, maps)
    count = len(log)
    served.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "was optimized but runs its own forward"
        got = gradients(twin, maps)
    assert not served
    assert len(log) == 2 * count > 0
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_hooks_of_the_block_itself_run(served):
    model, maps = block("grid")
    twin = optimized(model)
    seen = []
    twin.register_forward_hook(lambda module, given, result: seen.append(result[1].shape))
    served.clear()
    twin(*maps)
    assert served
    assert seen == [maps[0][:, :1].shape]
