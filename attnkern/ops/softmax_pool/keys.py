"""State dicts of other libraries' pools, to load into the modules here."""

from __future__ import annotations

from typing import Any

from torch import nn

_MULTIHEAD = {
    "probe": "latent",
    "attention.out_proj.": "proj.",
    "layernorm.": "norm.",
}
_GATED = {
    **{"attention_V.0.": "attention_a.0.", "attention_U.0.": "attention_b.0."},  # ABMIL
    "attention_w.": "attention_c.",
    **{"fc1.module.": "attention_a.0.", "fc_gated.module.": "attention_b.0."},  # torchmil
    "fc2.": "attention_c.",
}
_PLAIN = {
    "module.3.": "module.2.",  # CLAM with dropout between
    **{"attention.0.": "module.0.", "attention.2.": "module.2."},  # ABMIL, MONAI
    **{"fc1.module.": "module.0.", "fc2.": "module.2."},  # torchmil
    **{"0.": "module.0.", "2.": "module.2."},  # the same without that name
}


def _rename(state: dict[str, Any], prefix: str, names: dict[str, str]) -> None:
    for key in list(state):
        if key.startswith(prefix):
            own = key.removeprefix(prefix)
            for theirs, ours in names.items():
                if own.startswith(theirs):
                    state[prefix + ours + own.removeprefix(theirs)] = state.pop(key)
                    break


def from_multihead_attention(
    module: nn.Module, state: dict[str, Any], prefix: str, *_: Any
) -> None:
    _rename(state, prefix, _MULTIHEAD)
    for kind in ("weight", "bias"):
        fused = state.pop(f"{prefix}attention.in_proj_{kind}", None)
        if fused is not None:
            q, kv = fused.split([len(fused) // 3, 2 * len(fused) // 3])
            state[f"{prefix}q.{kind}"], state[f"{prefix}kv.{kind}"] = q, kv


def from_other_scorers(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    _rename(state, prefix, _PLAIN if "module" in module._modules else _GATED)
