"""Fused kernels for attention in vision networks: ``attnkern.optimize(model)`` and ``restore``."""

from attnkern import functional, nn
from attnkern._select import use_impl
from attnkern.optimize import Report, optimize, restore

__version__ = "0.1.0"
__all__ = ["Report", "functional", "nn", "optimize", "restore", "use_impl"]
