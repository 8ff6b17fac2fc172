"""Drop-in rules of the pooling heads: budget, reports, survival, inputs, hooks, masks and dropout."""

import copy
import warnings

import pool_modules as copied
import pytest
import torch
import torch._dynamo
from conftest import DTYPES, TARGETS
from nn_modules import copies
from pool_heads import HEADS, close, gradients, head
from test_optimize import traces
from torch import nn
from torch.utils.checkpoint import checkpoint

import attnkern
from attnkern import _select, testing
from attnkern.ops.softmax_pool import call as pool_call

POOLS = [
    target
    for target in TARGETS
    if _select.refuse(target.impl, torch.device(target.device), torch.float32, "softmax_pool_fwd")
    is None
]


@pytest.fixture
def served(monkeypatch):
    """How many pools the operator has computed."""
    calls, original = [], pool_call.pool

    def counted(*arguments):
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(pool_call, "pool", counted)
    return calls


# ------------------------------------------------------------------ results


def _spec(name, model, impl):
    """Module and optimized module as functions of x and every parameter, for the budget's oracle."""
    optimized = copy.deepcopy(model)
    assert attnkern.optimize(optimized, impl=impl, strict=True).replaced

    def function(net):
        return lambda x, **parameters: torch.func.functional_call(net, parameters, x)

    case = testing.Case(name, {})
    return testing.OpSpec(name, function(optimized), function(model), [case], "softmax_pool_fwd")


@pytest.mark.parametrize("target", POOLS, ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", DTYPES[:3], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_errors_are_within_the_budget(name, kind, train, target, served):
    model, x = head(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    spec = _spec(name, model.train(train), target.impl)
    tensors = {"x": x, **dict(model.named_parameters())}
    tensors = {key: t.detach().to(target.device, kind) for key, t in tensors.items()}
    unused = [key for key, t in tensors.items() if not _used(spec, tensors, key)]
    tensors = {key: t for key, t in tensors.items() if key not in unused}
    testing.compare(spec, spec.cases[0], tensors)
    assert served


def _used(spec, tensors, key):
    leaf = tensors[key].double().requires_grad_()
    outputs = testing.as_tuple(spec.eager(**{**testing.double(tensors), key: leaf}))
    grad = torch.autograd.grad([o for o in outputs if o.requires_grad], leaf,
                               [torch.ones_like(o) for o in outputs if o.requires_grad],
                               allow_unused=True)[0] if any(o.requires_grad for o in outputs) else None  # fmt: skip
    return grad is not None


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("items", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_autocast_gives_the_dtypes_or_the_error_of_eager(name, items, weights, low):
    model, x = head(name, weights)
    optimized = copy.deepcopy(model)
    attnkern.optimize(optimized, impl="reference")

    def result(net):
        try:
            with torch.no_grad(), torch.autocast("cpu", low):
                return testing.as_tuple(net(x.to(items)))
        except Exception as error:
            return type(error), str(error)

    want, got = result(model), result(optimized)
    if not isinstance(want[0], torch.Tensor):
        assert got == want
        return
    eps = max(torch.finfo(kind).eps for kind in (items, weights, low))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        scale = float(b.abs().max().double())
        torch.testing.assert_close(a, b, rtol=0, atol=8 * eps * max(scale, 1.0))


@pytest.mark.parametrize("name", HEADS)
def test_unusual_inputs_give_what_eager_gives(name):
    model, x = head(name)
    optimized = copy.deepcopy(model)
    attnkern.optimize(optimized)
    for odd in (x.double(), x.bfloat16(), x[0], x[:0], x[..., :0], x.unsqueeze(0), x.int(), "text"):

        def result(net, odd=odd):
            try:
                return testing.as_tuple(net(odd))
            except Exception as error:
                return type(error), str(error)

        want, got = result(model), result(optimized)
        if not isinstance(want[0], torch.Tensor):
            assert got == want
        else:
            torch.testing.assert_close(got, want, equal_nan=True)


# ------------------------------------------------------------------ report and survival


@pytest.mark.parametrize("name", HEADS)
def test_dry_run_optimize_twice_and_restore(name, served):
    model, x = head(name)
    before, keys = traces(model), list(model.state_dict())
    want = gradients(model, x)
    dry = attnkern.optimize(model, impl="reference", dry_run=True)
    assert traces(model) == before
    assert len(dry.replaced) == 1 + name.startswith("clam bags")  # and the scorer in it
    assert not dry.skipped
    first_report = attnkern.optimize(model, impl="reference")
    assert first_report == dry
    served.clear()  # the trials
    once = gradients(model, x)
    assert served
    close(once, want)
    changed = {key for key, now in traces(model).items() if now != before[key]}
    assert changed == {"" if r.name == "(model)" else r.name for r in dry.replaced}
    assert list(model.state_dict()) == keys
    assert attnkern.optimize(model, impl="reference") == dry
    attnkern.restore(model)
    assert traces(model) == before
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, x), want, strict=True))


@pytest.mark.parametrize("name", HEADS)
def test_copies_are_optimized_and_use_their_own_parameters(name, served):
    model, x = head(name)
    fresh = copy.deepcopy(model)
    attnkern.optimize(model, impl="reference")
    played = name.startswith("torchmil")  # the installed class, by one that does not pickle
    for other in [copy.deepcopy(model)] if played else copies(model).values():
        for p, q in zip(other.parameters(), fresh.parameters(), strict=True):
            nn.init.constant_(p, 0.1)
            nn.init.constant_(q, 0.1)
        served.clear()
        close(gradients(other, x), gradients(fresh, x))
        assert served
    replica = next(m for m in model.modules() if vars(m).keys() & {"forward", "calc_head"})
    twin = replica._replicate_for_data_parallel()
    partial = vars(twin).get("forward") or vars(twin)["calc_head"]
    assert partial.args[0] is twin


TRACED = (
    *("latent", "normalised keys", "pool2d", "rotary", "global context", "clip"),
    *("clam gated", "clam bags", "torchmil gated", "monai", "captioning"),
)


@pytest.mark.parametrize("target", POOLS, ids=str)
@pytest.mark.parametrize("name", TRACED)
def test_compiles_to_one_graph_and_exports(name, target):
    model, x = head(name)
    model, x = model.to(target.device), x.to(target.device)
    optimized = copy.deepcopy(model)
    attnkern.optimize(optimized, impl=target.impl)
    torch._dynamo.reset()
    compiled = torch.compile(optimized, fullgraph=True, backend="aot_eager")
    compiled.parameters = optimized.parameters
    close(gradients(compiled, x), gradients(model, x))
    program = torch.export.export(optimized, (x,), strict=False)
    close(testing.as_tuple(program.module()(x)), testing.as_tuple(model(x)))
    graphs = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = [str(node.target) for m in graphs for node in m.graph.nodes]
    assert target.impl == "reference" or any("softmax_pool_fwd" in t for t in targets)


CHILDREN = {
    "latent": "kv",
    "pool2d": "proj",
    "rotary": "qkv",
    "global context": "conv_attn",
    "clam gated": "attention_net.3.attention_b.1",
    "clam bags": "clam.attention_net.3.attention_a",
    "torchmil gated": "act_gated",
    "monai": "attention.1",
    "captioning": "attention.softmax",
}


@pytest.mark.parametrize(("name", "child"), CHILDREN.items())
def test_a_late_hook_runs_the_modules_own_forward(name, child, served):
    model, x = head(name)
    optimized = copy.deepcopy(model)
    attnkern.optimize(optimized, impl="reference")
    log = []
    for net in (model, optimized):
        net.get_submodule(child).register_forward_hook(lambda *_: log.append(1))
    want = gradients(model, x)
    count = len(log)
    served.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "was optimized but runs its own forward"
        got = gradients(optimized, x)
    assert not served
    assert len(log) == 2 * count > 0
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("name", "keys"), [("normalised keys", "normalised"), ("rotary", "rotated"), ("latent", "")]
)
def test_the_report_says_where_projections_are_not_folded(name, keys):
    model, _ = head(name)
    (row,) = attnkern.optimize(model).replaced
    assert row.reason == (keys and f"its keys are {keys}: projected, not folded")


# ------------------------------------------------------------------ masks and dropout


@pytest.mark.parametrize(
    "shape", [(1, 9), (3, 9), (4, 1, 9), (3, 1, 1, 9), (1, 4, 1, 9), (3, 4, 1, 1)]
)
@pytest.mark.parametrize("kind", ["bool", "bias"])
def test_masks_of_scaled_dot_product_attention(shape, kind, served):
    model, x = head("latent")
    optimized = copy.deepcopy(model)
    attnkern.optimize(optimized, impl="reference")
    torch.manual_seed(5)
    mask = torch.randn(shape)
    mask = mask > -0.5 if kind == "bool" else mask.requires_grad_()
    want = _result(lambda: gradients(model, x, attn_mask=mask))
    got = _result(lambda: gradients(optimized, x, attn_mask=mask))
    if shape == (3, 9):  # three samples are no queries or heads
        assert got == want
        assert want[0] is RuntimeError
        return
    assert served
    close(got, want)


def _result(function):
    try:
        return function()
    except RuntimeError as error:
        return type(error), str(error)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.int64])
def test_masks_of_torchmil(kind, served):
    model, x = head("torchmil gated")
    optimized = copy.deepcopy(model)
    attnkern.optimize(optimized, impl="reference")
    mask = (torch.arange(9) < torch.tensor([[9], [4], [1]])).to(kind)
    close(gradients(optimized, x, mask=mask), gradients(model, x, mask=mask))
    close(optimized(x, mask, True), model(x, mask, return_att=True))
    assert len(served) == 2


@pytest.mark.parametrize("gate", [False, True])
def test_active_dropout_leaves_the_original_forward_in_charge(gate, served):
    torch.manual_seed(0)
    model = copied.CLAM(gate=gate, dropout=0.1)
    optimized = copy.deepcopy(model)
    (row,) = attnkern.optimize(optimized, impl="reference").replaced
    assert row.reason == "in training, with dropout active, its own forward runs"
    x = torch.randn(40, 24)
    served.clear()
    for net in (model, optimized):
        net.train()
        net.zero_grad()
    torch.manual_seed(1)
    want = gradients(model, x)
    torch.manual_seed(1)
    got = gradients(optimized, x)
    assert not served
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    close(gradients(optimized.eval(), x), gradients(model.eval(), x))
    assert served


@pytest.mark.parametrize("subtyping", [False, True])
@pytest.mark.parametrize("cls", [copied.CLAM_SB, copied.CLAM_MB])
def test_clam_clusters_instances_and_gives_heat_maps_as_before(cls, subtyping):
    """By its own forward, around the scorer that is served; otherwise all at once."""
    torch.manual_seed(0)
    model, x, label = cls(subtyping=subtyping), torch.randn(40, 24), torch.tensor([1])
    optimized = copy.deepcopy(model)
    report = attnkern.optimize(optimized, impl="reference")
    assert [(row.name, row.op) for row in report.replaced] == [
        ("(model)", "gated_attention_pool"),
        ("attention_net.3", "gated_attention_pool(scores)"),
    ]
    assert "with instance_eval, attention_only or active dropout" in report.replaced[0].reason
    calls = (
        *({}, {"return_features": True}, {"attention_only": True}),
        {"label": label, "instance_eval": True, "return_features": True},
    )
    for call in calls:
        *want, results = testing.as_tuple(model(x, **call))
        *got, theirs = testing.as_tuple(optimized(x, **call))
        if call == {"attention_only": True}:
            want, got, results, theirs = [results], [theirs], {}, {}
        close(got, want)
        assert theirs.keys() == results.keys()
        for key, value in results.items():
            torch.testing.assert_close(theirs[key], value)
    close(
        training_step(optimized, x, label, *optimized.parameters()),
        training_step(model, x, label, *model.parameters()),
    )


def training_step(model, x, label, *parameters):
    """CLAM's loss of bag and instances, and its gradients."""
    logits, *_, results = model(x, label, instance_eval=True)
    loss = 0.7 * nn.functional.cross_entropy(logits, label) + 0.3 * results["instance_loss"]
    return [loss, *torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)]


def test_clam_scores_keep_their_layout_and_the_input():
    net, x = copied.Attn_Net_Gated(n_classes=3), torch.randn(7, 32)
    attnkern.optimize(net, impl="reference")
    scores, same = net(x)
    assert same is x
    assert scores.shape == (7, 3)
    assert scores.is_contiguous()
    batched, _ = net(x.expand(2, 7, 32))
    torch.testing.assert_close(batched, scores.expand(2, 7, 3))


def test_checkpointed_heads_train(served):
    model, x = head("latent")
    optimized = copy.deepcopy(model)
    attnkern.optimize(optimized, impl="reference")
    run = lambda x: checkpoint(optimized, x, use_reentrant=False)  # noqa: E731
    run.parameters = optimized.parameters
    close(gradients(run, x), gradients(model, x))
    assert served


def test_the_pyramid_of_milmodel_is_pooled():
    """In place: a deepcopy of the stock class fails, as its hooks write into the original."""
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    model = nets.MILModel(2, mil_mode="att_trans_pyramid", trans_blocks=1, pretrained=False).eval()
    x = torch.randn(2, 3, 3, 32, 32)
    weight = model.attention[0].weight

    def outcome():
        logits = model(x)
        return logits, torch.autograd.grad(logits.square().sum(), weight)[0]

    want = outcome()
    assert len(attnkern.optimize(model).replaced) == 1
    for got, stock in zip(outcome(), want, strict=True):
        torch.testing.assert_close(got, stock, rtol=1e-4, atol=1e-6)
