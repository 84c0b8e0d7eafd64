"""Profiles of several models as one bar chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from utils.errors import UserError, cause_of

DPI = 200


def plot_shares(
    names: Sequence[str], parts: Mapping[str, Sequence[float]], *, unit: str, path: str
) -> None:
    """Write one horizontal bar per name: the share of each part, and the total in `unit`.

    Shares, since the totals of light and heavy models differ a hundredfold.  UserError where the
    file cannot be written.
    """
    figure = Figure(figsize=(9.0, 1.2 + 0.24 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = np.asarray(list(parts.values()), dtype=float)  # (parts, models)
    total = values.sum(axis=0)
    shares = 100 * values / np.maximum(total, 1e-12)
    positions = np.arange(len(names))
    for label, share, left in zip(parts, shares, shares.cumsum(axis=0) - shares, strict=True):
        axes.barh(positions, share, left=left, label=label)
    for position, value in zip(positions, total, strict=True):
        axes.annotate(f" {value:.3g} {unit}", (100.0, float(position)), va="center", fontsize=7)
    axes.set_yticks(positions, [name.replace("$", r"\$") for name in names], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 116)
    axes.set_xticks(range(0, 101, 20))
    axes.margins(y=0.01)
    axes.set_xlabel(f"share of {unit} in %")
    figure.legend(loc="outside upper center", ncols=len(parts), frameon=False)
    try:
        figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise UserError(f"--plot {path}: cannot be written: {cause_of(error)}") from error
