"""Fused kernels for attention in vision networks: ``attnkern.optimize(model)``, ``attnkern.restore(model)``."""

from attnkern import functional, nn
from attnkern._select import use_impl

__version__ = "0.1.0"
__all__ = ["functional", "nn", "use_impl"]
