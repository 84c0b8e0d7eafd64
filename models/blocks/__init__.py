"""Importing this package registers every block; the imports are explicit."""

from models.blocks import conv, csp, route

__all__ = ["conv", "csp", "route"]
