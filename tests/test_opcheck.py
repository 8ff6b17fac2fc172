"""torch.library.opcheck of every operator overload: schema, fake, autograd registration, AOT dispatch."""

from __future__ import annotations

import pytest
import torch
from conftest import CALLS as EVERY
from conftest import calls

from attnkern import _layout, testing
from attnkern.ops.attention_gate import op as attention_gate
from attnkern.ops.softmax_pool import op as softmax_pool
from attnkern.ops.squeeze_excite.reference import Options

ALL = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
CALLS = calls(
    "resnet", "ese", "src_shift", "residual_relu_drop_path", "residual_silu", "prelu", "3d"
)
OPTIONS = Options._fields


def _overload(name, target):
    if target.impl == "reference":
        pytest.skip("the reference is no operator")
    return getattr(getattr(torch.ops.attnkern, name), target.impl)


def _arguments(call, target, dtype, channels_last):
    """The operator's tensors and options, as op.py passes them."""
    t = call.inputs(target, dtype, channels_last=channels_last)
    acc = torch.promote_types(dtype, torch.float32)
    for name in ("src", "drop_path"):
        if name in t:
            t[name] = t[name].to(acc)
    names = ("x", "src", "w1", "b1", "w2", "b2", "act_weight", "residual", "drop_path")
    options = {k: v for k, v in call.case.options.items() if k in OPTIONS}
    return [t.get(name) for name in names], Options(**options)


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_squeeze_excite(call, target, channels_last):
    forward, backward = (_overload(f"squeeze_excite_{d}", target) for d in ("fwd", "bwd"))
    tensors, options = _arguments(call, target, torch.float32, channels_last)
    masked = options.out_act in ("relu", "relu6")
    for save_mask in {masked, False}:
        torch.library.opcheck(forward, (*tensors, *options, save_mask), test_utils=ALL)
    y, mean, hidden, logits, mask = forward(*tensors, *options, masked)
    if masked:
        tensors[7] = None
    saved = (mean, hidden, logits, mask)
    for dlogits in (None, torch.randn_like(logits)):
        for needs in ((True, True, True), (True, False, False)):
            arguments = (torch.randn_like(y), dlogits, *tensors, *saved, *options, *needs)
            torch.library.opcheck(backward, arguments, test_utils=ALL)
            with torch.no_grad():
                for gradient, like in zip(backward(*arguments), [*tensors[:7], y], strict=False):
                    assert gradient.numel() == 0 or gradient.stride() == like.stride()


@pytest.mark.parametrize("call", calls("2d", "3d", "1d")[:3], ids=str)
def test_squeeze(call, target, dtype):
    op = _overload("squeeze_fwd", target)
    for channels_last in (False, True):
        x = call.inputs(target, dtype, channels_last=channels_last)["x"]
        torch.library.opcheck(op, (x,), test_utils=ALL)
        assert op(x).dtype == torch.promote_types(dtype, torch.float32)


class _Recorder:
    """An operator that keeps its arguments."""

    def __init__(self, overload):
        self.overload, self.seen = overload, []

    def __call__(self, *arguments):
        self.seen.append(arguments)
        return self.overload(*arguments)


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize(
    "call", [c for c in EVERY if c.spec.operator == "softmax_pool_fwd"], ids=str
)
def test_softmax_pool(call, target, channels_last, monkeypatch):
    forward, backward = (_Recorder(_overload(f"softmax_pool_{d}", target)) for d in ("fwd", "bwd"))
    monkeypatch.setitem(softmax_pool.softmax_pool_fwd, target.impl, forward)
    monkeypatch.setitem(softmax_pool.softmax_pool_bwd, target.impl, backward)
    tensors = call.inputs(target, channels_last=channels_last)
    testing.run(call.spec.function, tensors, call.case.options, impl=target.impl)
    small = {**tensors}
    del small[call.case.maps[0]]  # frozen items
    if small:
        _frozen(call, target, tensors, small)
    assert forward.seen
    assert backward.seen
    utilities = ALL if len(forward.seen[0]) and "long" not in call.case.name else ALL[:3]
    for recorder in (forward, backward):
        for arguments in recorder.seen:
            detached = [
                a.detach().requires_grad_(False) if isinstance(a, torch.Tensor) else a
                for a in arguments
            ]
            torch.library.opcheck(recorder.overload, tuple(detached), test_utils=utilities)


GATES = [c for c in EVERY if c.spec.operator == "attention_gate_fwd"]


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("call", GATES, ids=str)
def test_attention_gate(call, target, channels_last, monkeypatch):
    """All nine operators, with the arguments that each case gives them."""
    recorders = {}
    for name in ("fwd", "eval", "bwd", "moments", "sums"):
        recorders[f"attention_gate_{name}"] = _Recorder(_overload(f"attention_gate_{name}", target))
    for name in ("norm_fwd", "norm_bwd", "apply_fwd", "apply_bwd"):
        recorders[f"gate_{name}"] = _Recorder(_overload(f"gate_{name}", target))
    for name, recorder in recorders.items():
        monkeypatch.setitem(getattr(attention_gate, name), target.impl, recorder)
    tensors = call.inputs(target, channels_last=channels_last)
    testing.run(call.spec.function, tensors, call.case.options, impl=target.impl)
    small = {k: t for k, t in tensors.items() if k not in call.case.maps}
    _frozen(call, target, tensors, small)
    with torch.no_grad():
        call.spec.function(**tensors, **call.case.options, impl=target.impl)
    assert recorders["attention_gate_fwd"].seen
    over_batch = recorders["attention_gate_moments"].seen
    assert bool(recorders["attention_gate_eval"].seen) != bool(over_batch)
    assert recorders["attention_gate_bwd"].seen
    for recorder in recorders.values():
        for arguments in recorder.seen:
            detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
            torch.library.opcheck(recorder.overload, detached, test_utils=ALL)


def _frozen(call, target, tensors, small):
    leaves = {k: t.detach().requires_grad_(k in small) for k, t in tensors.items()}
    outputs = testing.as_tuple(call.spec.function(**leaves, **call.case.options, impl=target.impl))
    torch.autograd.grad(
        sum(o.float()[o.isfinite()].sum() for o in outputs), [leaves[k] for k in small]
    )


def test_operators_refuse_maps_of_different_layouts(target):
    """op.py brings them to one layout; called by hand, the operator says so instead of misreading."""
    if target.impl != "native":
        pytest.skip("the check is the compiled part's")
    op = _overload("squeeze_excite_fwd", target)
    x = torch.randn(2, 4, 3, 3, device=target.device)
    other = x.contiguous(memory_format=torch.channels_last)
    src = torch.randn(2, 4, device=target.device)
    assert _layout.is_channels_last(other)
    with pytest.raises(RuntimeError, match="residual must have the layout of x"):
        op(x, src, *[None] * 5, other, None, *Options(), False)
