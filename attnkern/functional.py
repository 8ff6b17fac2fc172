"""The operators as functions."""

from attnkern.ops.squeeze_excite import excite, squeeze, squeeze_excite

__all__ = ["excite", "squeeze", "squeeze_excite"]
