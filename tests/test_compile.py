"""torch.compile: one graph, few recompilations, the kernels in forward and backward, eager's results."""

from __future__ import annotations

import pytest
import torch
from conftest import calls
from torch._dynamo.testing import CompileCounterWithBackend

from attnkern import testing
from attnkern.functional import squeeze, squeeze_excite


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _graphs(record):
    """A backend that runs the AOT graphs as they are and keeps the operators they call."""
    from torch._dynamo.backends.common import aot_autograd

    def keep(graph, _):
        record.append(
            [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        )
        return graph

    return aot_autograd(fw_compiler=keep, bw_compiler=keep)


PLUMBING = {f"aten.{name}.default" for name in ("reshape", "view", "detach", "zeros")}
"""What may surround the kernels: views, and zeros [B, C] for the unused gradient of the logits."""
KINDS = (
    "resnet",
    "ese",
    "gate_returned",
    "residual_relu_drop_path",
    "residual_silu",
    "lc0",
    "prelu",
    "1d",
    "3d",
    "pool_mask",
    "pool_bags",
    "context",
    "latent_queries",
    "query_keys",
    "additive",
    "gated",
    "gated_bags",
    "monai",
    "monai_training",
    "oktay",
    "coarse_training",
    "target_g_norm",
    "softmax_norm",
)


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("call", calls(*KINDS), ids=str)
def test_outputs_and_gradients_are_those_of_the_uncompiled_call(call, target, channels_last):
    tensors = call.inputs(target, channels_last=channels_last)
    compiled = torch.compile(call.spec.function, fullgraph=True, dynamic=True, backend="aot_eager")
    want = testing.run(call.spec.function, tensors, call.case.options, impl=target.impl)
    got = testing.run(compiled, tensors, call.case.options, impl=target.impl)
    for (name, g), (_, w) in zip(got.items(), want.items(), strict=True):
        # torch's own convolution and interpolation, which a graph breaks into other operations
        if target.impl == "reference" or "upsample" in call.case.options:
            torch.testing.assert_close(g, w, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert torch.equal(g, w), name
            assert g.stride() == w.stride(), name


@pytest.mark.parametrize("call", calls("resnet", "residual_relu", "residual_silu"), ids=str)
def test_the_compiled_graphs_call_the_kernels(call, target):
    if target.impl == "reference":
        pytest.skip("the reference is no operator")
    graphs = []
    compiled = torch.compile(call.spec.function, fullgraph=True, backend=_graphs(graphs))
    testing.run(compiled, call.inputs(target), call.case.options, impl=target.impl)
    forward, backward = graphs
    assert forward.count(f"attnkern.squeeze_excite_fwd.{target.impl}") == 1
    assert backward.count(f"attnkern.squeeze_excite_bwd.{target.impl}") == 1
    arithmetic = {t for t in forward + backward if t.startswith("aten") and "empty" not in t}
    assert not arithmetic - PLUMBING


@pytest.mark.parametrize(
    "call", calls("pool", "context", "query", "additive_tanh", "gated_branches"), ids=str
)
def test_the_compiled_graphs_of_pools_call_the_kernels(call, target):
    if target.impl == "reference":
        pytest.skip("the reference is no operator")
    graphs = []
    compiled = torch.compile(call.spec.function, fullgraph=True, backend=_graphs(graphs))
    options = {k: v for k, v in call.case.options.items() if k != "returns"}
    testing.run(compiled, call.inputs(target), options, impl=target.impl)
    for graph, direction in zip(graphs, ("fwd", "bwd"), strict=True):
        assert graph.count(f"attnkern.softmax_pool_{direction}.{target.impl}") == 1
        assert not any("softmax" in t or "exp" in t or "mm" in t for t in graph if "aten" in t)


@pytest.mark.parametrize("call", calls("no_norm", "monai_training", "oktay"), ids=str)
def test_the_compiled_graphs_of_gates_call_the_kernels(call, target):
    if target.impl == "reference":
        pytest.skip("the reference is no operator")
    graphs = []
    compiled = torch.compile(call.spec.function, fullgraph=True, backend=_graphs(graphs))
    testing.run(compiled, call.inputs(target), call.case.options, impl=target.impl)
    forward, backward = graphs
    batch = call.case.name == "monai_training"
    apart = call.case.name != "no_norm"  # logits, then the multiply
    for graph, names in (
        (
            forward,
            {
                "attention_gate_fwd": 1,
                "attention_gate_moments": 2 * batch,
                "gate_norm_fwd": 2 * batch,
                "gate_apply_fwd": apart,
            },
        ),
        (
            backward,
            {
                "attention_gate_bwd": 1,
                "attention_gate_sums": batch,
                "gate_norm_bwd": 2 * batch,
                "gate_apply_bwd": apart,
            },
        ),
    ):
        for name, count in names.items():
            assert graph.count(f"attnkern.{name}.{target.impl}") == count, name


def test_many_shapes_compile_at_most_twice(target):
    counter = CompileCounterWithBackend("aot_eager")

    def step(x, w1, w2):
        return squeeze_excite(x, w1, None, w2, impl=target.impl)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    # sizes that are equal in the first call are taken to be equal for good, by torch
    for batch in (2, 3, 8):
        for channels, hidden in ((24, 6), (96, 16), (8, 4)):
            for height, width in ((5, 9), (7, 7), (14, 3)):
                x = torch.randn(batch, channels, height, width, device=target.device)
                w1 = torch.randn(hidden, channels, device=target.device)
                w2 = torch.randn(channels, hidden, device=target.device)
                compiled(x, w1, w2)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("call", calls("mobilenet", "residual_relu"), ids=str)
def test_inductor(call, target):
    """The default backend, once each way, with something to fuse around the operator."""

    def block(x, **others):
        return call.run(target, {"x": x * 2, **others}).tanh()

    tensors = call.inputs(target)
    want = testing.run(block, tensors, {})
    got = testing.run(torch.compile(block, fullgraph=True), tensors, {})
    for (name, g), (_, w) in zip(got.items(), want.items(), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_gradient_of_other_strides_inside_a_compiled_graph(target):
    """sum().backward() and a transposed consumer hand the operator expanded and permuted gradients."""
    for consumer in (lambda y: y.sum(), lambda y: (y.permute(0, 2, 3, 1).contiguous() ** 2).sum()):
        x = torch.randn(2, 6, 5, 4, device=target.device)
        w = torch.randn(6, 6, device=target.device)

        def loss(x, w, consumer=consumer):
            return consumer(squeeze_excite(x, w, impl=target.impl))

        def grads(function, x=x, w=w):
            leaves = [t.clone().requires_grad_() for t in (x, w)]
            function(*leaves).backward()
            return [t.grad for t in leaves]

        for got, want in zip(
            grads(torch.compile(loss, backend="aot_eager")), grads(loss), strict=True
        ):
            torch.testing.assert_close(got, want)


def test_squeeze_and_its_gradient(target):
    def step(x):
        return squeeze(x, impl=target.impl).square()

    x = torch.randn(2, 5, 3, 4, device=target.device)
    want = testing.run(step, {"x": x}, {})
    got = testing.run(
        torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager"), {"x": x}, {}
    )
    for (_, g), (_, w) in zip(got.items(), want.items(), strict=True):
        torch.testing.assert_close(g, w)


def test_a_user_error_is_the_same_under_compile():
    def step(x, w):
        return squeeze_excite(x, w)

    compiled = torch.compile(step, backend="aot_eager")
    with pytest.raises(Exception, match=r"squeeze_excite: w1 must have shape"):
        compiled(torch.randn(1, 4, 3), torch.randn(5, 3))
