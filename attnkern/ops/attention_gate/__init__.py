"""Attention gates of skip connections; README.md here has the derivation, reference.py the formulas."""

from attnkern.ops.attention_gate.functions import attention_gate
from attnkern.ops.attention_gate.module import AttentionGate, MultiAttentionGate
from attnkern.ops.attention_gate.norm import BatchNorm

__all__ = ["AttentionGate", "BatchNorm", "MultiAttentionGate", "attention_gate"]
