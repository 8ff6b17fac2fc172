"""torchmil: ``AttentionPool``, gated or not (ABMIL, CLAM_SB, DTFDMIL, PatchGCN, TransformerABMIL)."""

from __future__ import annotations

from typing import Any

from attnkern._activations import qualified_name
from attnkern.integrations import Rule, _softmax_pool
from attnkern.integrations._children import altered


def _read(m: Any) -> Any:
    lazy = (m.fc1, m.fc_gated) if m.gated else (m.fc1,)
    for layer in lazy:
        if (cls := qualified_name(type(layer))) != "torchmil.nn.utils.LazyLinear":
            return f"its layer is a {cls}"
        if reason := altered(layer):
            return f"its layer {reason}"
    gate = (m.fc_gated.module, m.act_gated) if m.gated else ()
    return _softmax_pool.read_gated(m.fc1.module, m.act_layer, m.fc2, *gate)


def attention_pool(
    module: Any, X: Any, mask: Any = None, return_att: bool = False, *, impl: str
) -> Any:
    arguments = _read(module)
    if (
        not _softmax_pool.ready(module, arguments, X)
        or X.dim() != 3
        or (mask is not None and mask.shape != X.shape[:2])
    ):
        return type(module).forward(module, X, mask, return_att)
    keep = None if mask is None else mask != 0
    z, f = _softmax_pool.gated_pool(X, arguments, impl, mask=keep, return_scores=True)
    z = z.squeeze(1).clone()  # the caller may change it in place; backward keeps the pool's own
    return (z, f.squeeze(1)) if return_att else z


RULES = (
    Rule(
        "torchmil.nn.attention.attention_pool.AttentionPool",
        "gated_attention_pool",
        "softmax_pool_fwd",
        _read,
        attention_pool,
        {
            "forward": "shape torch ones device unsqueeze fc1 act_layer gated fc_gated act_gated "
            "fc2 masked_softmax bmm transpose squeeze"
        },
    ),
)
