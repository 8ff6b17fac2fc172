"""Squeeze-and-excitation; README.md here has the derivation, reference.py the formulas."""

from attnkern import _triton
from attnkern.ops.squeeze_excite.module import SqueezeExcite
from attnkern.ops.squeeze_excite.op import excite, squeeze, squeeze_excite

__all__ = ["SqueezeExcite", "excite", "squeeze", "squeeze_excite"]

_triton.serve(
    "attnkern.ops.squeeze_excite.triton",
    "squeeze_excite_fwd",
    "squeeze_excite_bwd",
    "squeeze_fwd",
)
