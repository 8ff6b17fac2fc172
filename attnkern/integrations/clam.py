"""CLAM, copied into most MIL code: its scorers by themselves, and the bag classifiers around them.

``Attn_Net`` and ``Attn_Net_Gated`` give raw scores [N, K] and the input; the pool is the caller's.
What is fused is the scorer, whose hidden layers [N, D] are then neither stored nor saved.  (The pool
that comes with the scores costs 1 / (2 D) of them and is dropped.)

``CLAM_SB`` and ``CLAM_MB`` are served whole where a call asks for no more than the bag's logits:
scores and pool in one read of the instances.  With ``instance_eval`` or ``attention_only`` their own
forward runs, the scorer in it served as above: it clusters the most attended by code that people
change, and branches on the label's value.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnkern.integrations import Rule, _softmax_pool
from attnkern.integrations._children import altered
from attnkern.integrations._structure import by_name, has

_NOTE = "in training, with dropout active, its own forward runs"
_BAG_NOTE = "with instance_eval, attention_only or active dropout, its own forward runs"


def _is_plain(m: Any) -> bool:
    layers = list(m.module) if has(m, "module") and type(m.module) is nn.Sequential else []
    return len(layers) in (3, 4) and type(layers[0]) is type(layers[-1]) is nn.Linear


def _is_gated(m: Any) -> bool:
    return has(m, "attention_a attention_b attention_c")


def _layers(sequence: Any, count: int) -> list[nn.Module] | str:
    """The layers but a dropout, or why not."""
    if type(sequence) is not nn.Sequential:
        return f"its branch is a {type(sequence).__name__}"
    if reason := altered(sequence):
        return f"its branch {reason}"
    for layer in sequence:
        if type(layer) is nn.Dropout and (reason := altered(layer)):
            return f"its dropout {reason}"
    layers = [layer for layer in sequence if type(layer) is not nn.Dropout]
    return layers if len(layers) == count else f"its branch is {sequence}"


def _read_plain(m: Any) -> Any:
    layers = _layers(m._modules["module"], 3)  # an attribute is a proxy in torch.export
    if isinstance(layers, str):
        return layers
    V, act, w = layers
    return _softmax_pool.read_gated(V, act, w, note=_note(m))


def _read_gated(m: Any) -> Any:
    c = m._modules
    a, b = _layers(c["attention_a"], 2), _layers(c["attention_b"], 2)
    if isinstance(a, str) or isinstance(b, str):
        return a if isinstance(a, str) else b
    return _softmax_pool.read_gated(a[0], a[1], c["attention_c"], b[0], b[1], _note(m))


def _note(m: nn.Module) -> str:
    return _NOTE if any(type(layer) is nn.Dropout and layer.p > 0 for layer in m.modules()) else ""


def _scores(module: Any, arguments: Any, given: Any, named: Any, impl: str) -> Any:
    inputs = by_name(module, given, named)
    if (
        len(inputs) != 1
        or not _softmax_pool.ready(module, arguments, *inputs)
        or inputs[0].dim() not in (2, 3)
        or (arguments.note and _softmax_pool.dropping(module))
    ):
        return type(module).forward(module, *given, **named)
    (x,) = inputs
    items = x if x.dim() == 3 else x.unsqueeze(0)
    _, scores = _softmax_pool.gated_pool(items, arguments, impl, return_scores=True)
    scores = scores.transpose(1, 2).contiguous()  # [B, N, K]
    return (scores if x.dim() == 3 else scores.squeeze(0)), x


def plain(module: Any, *given: Any, impl: str, **named: Any) -> Any:
    """forward(x)"""
    return _scores(module, _read_plain(module), given, named, impl)


def gated(module: Any, *given: Any, impl: str, **named: Any) -> Any:
    """forward(x)"""
    return _scores(module, _read_gated(module), given, named, impl)


def _trial(m: nn.Module) -> tuple[Tensor, ...]:
    width = next(layer.in_features for layer in m.modules() if isinstance(layer, nn.Linear))
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(5, width, generator=generator, dtype=torch.float64, device="cpu"),)


# ------------------------------------------------------------------ CLAM_SB and CLAM_MB

_CALL = ("self", "h", "label", "instance_eval", "return_features", "attention_only")


def _is_bag_classifier(m: Any) -> bool:
    children = m._modules
    if not {"attention_net", "classifiers", "instance_classifiers"} <= children.keys():
        return False
    layers = children["attention_net"]
    return type(layers) is nn.Sequential and len(layers) > 1 and _reader(layers[-1]) is not None


def _reader(net: Any) -> Any:
    return _read_gated if _is_gated(net) else _read_plain if _is_plain(net) else None


def _read_bag(m: Any) -> Any:
    code = type(m).forward.__code__
    if code.co_varnames[: code.co_argcount] != _CALL:
        return f"its forward takes other arguments than {', '.join(_CALL[1:])}"
    if not _is_bag_classifier(m):
        return "its attention_net no longer ends in a scorer"
    if not isinstance(m._modules["classifiers"], (nn.Linear, nn.ModuleList)):
        return f"its classifiers are a {type(m._modules['classifiers']).__name__}"
    *_, net = m._modules["attention_net"]._modules.values()
    for name, child in (("attention_net", m._modules["attention_net"]), ("scorer", net)):
        if reason := altered(child):
            return f"its {name} {reason}"
    arguments = _reader(net)(net)
    return arguments if isinstance(arguments, str) else arguments._replace(note=_BAG_NOTE)


def bag(
    module: Any,
    h: Any,
    label: Any = None,
    instance_eval: bool = False,
    return_features: bool = False,
    attention_only: bool = False,
    *,
    impl: str,
) -> Any:
    arguments = _read_bag(module)
    layers = [*module._modules["attention_net"]._modules.values()]
    if (
        instance_eval
        or attention_only
        or not _softmax_pool.ready(module, arguments, h)
        or h.dim() != 2
        or _softmax_pool.dropping(layers[-1])
    ):
        own = type(module).forward
        return own(module, h, label, instance_eval, return_features, attention_only)
    for layer in layers[:-1]:
        h = layer(h)
    z, scores = _softmax_pool.gated_pool(h.unsqueeze(0), arguments, impl, return_scores=True)
    z, scores = z.squeeze(0), scores.squeeze(0)  # [K, D] and [K, N]
    classifiers = module._modules["classifiers"]
    if isinstance(classifiers, nn.ModuleList):  # one a branch, logits float32 in any dtype
        logits = torch.stack([classify(z[k]) for k, classify in enumerate(classifiers)], 1).float()
    else:
        logits = classifiers(z)
    best = torch.topk(logits, 1, dim=1)[1]
    features = {"features": z} if return_features else {}
    return logits, F.softmax(logits, dim=1), best, scores, features


def _bag_trial(m: Any) -> tuple[Any, ...]:
    return *_trial(m), None, False, True


RULES = (
    Rule(
        "CLAM's Attn_Net",
        "gated_attention_pool(scores)",
        "softmax_pool_fwd",
        _read_plain,
        plain,
        {"forward": "module"},
        structure=_is_plain,
        trial=_trial,
    ),
    Rule(
        "CLAM's Attn_Net_Gated",
        "gated_attention_pool(scores)",
        "softmax_pool_fwd",
        _read_gated,
        gated,
        {"forward": "attention_a attention_b attention_c mul torch"},
        structure=_is_gated,
        trial=_trial,
    ),
    Rule(
        "CLAM's CLAM_SB or CLAM_MB",
        "gated_attention_pool",
        "softmax_pool_fwd",
        _read_bag,
        bag,
        {
            "forward": "attention_net torch transpose F softmax instance_classifiers one_hot "
            "n_classes squeeze range len item inst_eval inst_eval_out extend cpu numpy subtyping "
            "mm classifiers topk np array update device empty float to"
        },
        structure=_is_bag_classifier,
        trial=_bag_trial,
    ),
)
