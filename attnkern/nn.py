"""The operators as modules."""

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
    "ContextAttentionPool",
    "GatedAttentionPool",
    "QueryAttentionPool",
    "SoftmaxPool",
    "SqueezeExcite",
]
