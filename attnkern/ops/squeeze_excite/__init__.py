"""Squeeze-and-excitation; README.md here has the derivation, reference.py the formulas."""

from attnkern.ops.squeeze_excite.module import SqueezeExcite
from attnkern.ops.squeeze_excite.op import excite, squeeze, squeeze_excite

__all__ = ["SqueezeExcite", "excite", "squeeze", "squeeze_excite"]
