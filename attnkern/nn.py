"""The operators as modules."""

from attnkern.ops.squeeze_excite import SqueezeExcite

__all__ = ["SqueezeExcite"]
