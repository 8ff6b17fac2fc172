"""The operators as functions."""

from attnkern.ops.attention_gate import BatchNorm, attention_gate
from attnkern.ops.softmax_pool import (
    additive_attention_pool,
    context_attention_pool,
    gated_attention_pool,
    merge_pools,
    query_attention_pool,
    softmax_pool,
)
from attnkern.ops.squeeze_excite import excite, squeeze, squeeze_excite

__all__ = [
    "BatchNorm",
    "additive_attention_pool",
    "attention_gate",
    "context_attention_pool",
    "excite",
    "gated_attention_pool",
    "merge_pools",
    "query_attention_pool",
    "softmax_pool",
    "squeeze",
    "squeeze_excite",
]
