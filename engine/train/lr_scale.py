"""Learning rates of their own for parts of a detector, by name."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from engine.train.freeze import rows_named
from models.detector import Detector
from utils.errors import UserError


def rate_scales(model: Detector, items: Sequence[str]) -> dict[nn.Parameter, float]:
    """What `--lr-scale NAME=FACTOR ...` multiplies the rate of which parameters by.

    NAME is a section (backbone, neck, head), a row's name or its number; where two name a row, the
    later one counts.  UserError for a row that does not exist, or a factor that is not over 0.
    """
    scales: dict[nn.Parameter, float] = {}
    for item in items:
        name, _, text = item.partition("=")
        try:
            factor = float(text)
        except ValueError:
            factor = math.nan
        if not (name and 0 < factor < math.inf):
            hint = f"; to hold rows still use --freeze {name}" if factor == 0 else ""
            raise UserError(
                f"--lr-scale {item}: expected NAME=FACTOR with a factor over 0, e.g."
                f" backbone=0.1{hint}"
            )
        for row in rows_named(model.spec, name, "--lr-scale"):
            scales.update(dict.fromkeys(model.layers[row].parameters(), factor))
    return scales
