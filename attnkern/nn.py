"""The operators as modules."""

from attnkern.ops.attention_gate import AttentionGate, MultiAttentionGate
from attnkern.ops.softmax_pool import (
    AdditiveAttentionPool,
    ContextAttentionPool,
    GatedAttentionPool,
    QueryAttentionPool,
    SoftmaxPool,
)
from attnkern.ops.squeeze_excite import SqueezeExcite

__all__ = [
    "AdditiveAttentionPool",
    "AttentionGate",
    "ContextAttentionPool",
    "GatedAttentionPool",
    "MultiAttentionGate",
    "QueryAttentionPool",
    "SoftmaxPool",
    "SqueezeExcite",
]
