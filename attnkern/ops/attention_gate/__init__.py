"""Attention gates of skip connections; README.md here has the derivation, reference.py the formulas."""

from attnkern import _triton
from attnkern.ops.attention_gate.functions import attention_gate
from attnkern.ops.attention_gate.module import AttentionGate, MultiAttentionGate
from attnkern.ops.attention_gate.norm import BatchNorm

__all__ = ["AttentionGate", "BatchNorm", "MultiAttentionGate", "attention_gate"]

_triton.serve(
    "attnkern.ops.attention_gate.triton",
    "attention_gate_fwd",
    "attention_gate_eval",
    "attention_gate_bwd",
    "attention_gate_moments",
    "attention_gate_sums",
    "gate_norm_fwd",
    "gate_norm_bwd",
    "gate_apply_fwd",
    "gate_apply_bwd",
)
