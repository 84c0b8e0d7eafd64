"""Importing this package registers every block; the imports are explicit."""

from models.blocks import (
    attention,
    classify,
    conv,
    csp,
    dense,
    fusion,
    ghost,
    inverted,
    mixconv,
    osa,
    pelee,
    residual,
    route,
    shuffle,
)

__all__ = [
    "attention",
    "classify",
    "conv",
    "csp",
    "dense",
    "fusion",
    "ghost",
    "inverted",
    "mixconv",
    "osa",
    "pelee",
    "residual",
    "route",
    "shuffle",
]
