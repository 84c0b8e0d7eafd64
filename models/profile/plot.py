"""Profiles of several models as one bar chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DPI = 200


def stacked_shares(
    names: Sequence[str], parts: Mapping[str, Sequence[float]], *, unit: str, path: str | Path
) -> None:
    """Write one horizontal bar for each name: the share of each part, and the total in `unit`.

    Shares, since the totals of light and heavy models differ a hundredfold.
    """
    figure = Figure(figsize=(9.0, 1.2 + 0.24 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    total = np.sum([np.asarray(values, dtype=float) for values in parts.values()], axis=0)
    left = np.zeros(len(names))
    places = np.arange(len(names))
    for label, values in parts.items():
        share = 100 * np.asarray(values) / np.maximum(total, 1e-12)
        axes.barh(places, share, left=left, label=label)
        left += share
    for place, value in zip(places, total, strict=True):
        axes.annotate(f" {value:.3g} {unit}", (100.0, float(place)), va="center", fontsize=7)
    axes.set_yticks(places, [name.replace("$", r"\$") for name in names], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 116)
    axes.set_xticks(range(0, 101, 20))
    axes.margins(y=0.01)
    axes.set_xlabel(f"share of {unit} in %")
    figure.legend(loc="outside upper center", ncols=len(parts), frameon=False)
    figure.savefig(path, dpi=DPI)
