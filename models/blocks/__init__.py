"""Importing this package registers every block; the imports are explicit."""

from models.blocks import attention, conv, csp, ghost, mixconv, osa, route, shuffle

__all__ = ["attention", "conv", "csp", "ghost", "mixconv", "osa", "route", "shuffle"]
