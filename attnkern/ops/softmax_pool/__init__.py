"""Softmax-weighted pooling; README.md here has the derivation, reference.py the formulas."""

from attnkern import _triton
from attnkern.ops.softmax_pool.functions import (
    additive_attention_pool,
    context_attention_pool,
    gated_attention_pool,
    merge_pools,
    softmax_pool,
)
from attnkern.ops.softmax_pool.module import (
    AdditiveAttentionPool,
    ContextAttentionPool,
    GatedAttentionPool,
    QueryAttentionPool,
    SoftmaxPool,
)
from attnkern.ops.softmax_pool.query import query_attention_pool

__all__ = [
    "AdditiveAttentionPool",
    "ContextAttentionPool",
    "GatedAttentionPool",
    "QueryAttentionPool",
    "SoftmaxPool",
    "additive_attention_pool",
    "context_attention_pool",
    "gated_attention_pool",
    "merge_pools",
    "query_attention_pool",
    "softmax_pool",
]

_triton.serve("attnkern.ops.softmax_pool.triton", "softmax_pool_fwd", "softmax_pool_bwd")
