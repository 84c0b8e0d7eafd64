"""Pareto plots of a comparison: AP against each cost, as PNG and SVG."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from engine.compare.report.columns import Column, Plain, at, columns_of, places
from engine.compare.report.drawn import pareto_front

DPI = 150
FRONT_COLOR, OTHER_COLOR, GRID_COLOR = "#1f3fbf", "#8c8c8c", "#d9d9d9"
MARGIN = 1.2  # the axis ends at this multiple of the highest cost, for names right of the points


def write_plots(results: Plain, folder: Path) -> None:
    """pareto_COST.png and .svg for every cost that a row with an AP has."""
    taken = places(results["measurement"]) if results["measurement"] else []
    names = [re.sub("[^a-z0-9]+", "_", note.replace("batch ", "batch")) for note in taken]
    paths = {
        "flops": "cost.flops",
        "params": "cost.params",
        **{f"latency_{name}": f"latency.{i}.p50_ms" for i, name in enumerate(names)},
        "energy": "energy.joules_per_image",
    }
    columns = {column.path: column for column in columns_of(results)}
    trained = [row for row in results["rows"] if at(row, "accuracy.AP.mean") is not None]
    for name, path in paths.items():
        rows = [row for row in trained if at(row, path) is not None]
        if not rows:
            continue
        figure = pareto_plot(rows, columns[path])
        for suffix, metadata in (("png", None), ("svg", {"Date": None})):
            with mpl.rc_context({"svg.hashsalt": name}):  # the same file each time
                figure.savefig(folder / f"pareto_{name}.{suffix}", dpi=DPI, metadata=metadata)


def pareto_plot(rows: Sequence[Plain], column: Column) -> Figure:
    """AP against a cost of rows that have both, with bars of one sd, and to the column's second."""

    def values(path: str) -> np.ndarray:
        return np.array([at(row, path) or 0.0 for row in rows])

    ap, sd = values("accuracy.AP.mean"), values("accuracy.AP.sd")
    costs = values(column.path) / column.scale
    bars = values(column.second or column.path) / column.scale - costs
    front = pareto_front(costs.tolist(), ap.tolist())
    limit = MARGIN * max(costs + bars)
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color=GRID_COLOR, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    best = [*ap[front], ap[front[-1]]]
    axes.step([*costs[front], limit], best, where="post", color=FRONT_COLOR, lw=1.2, alpha=0.6)
    for i, row in enumerate(rows):
        color = FRONT_COLOR if i in front else OTHER_COLOR
        bar = [[0.0], [bars[i]]]
        axes.errorbar(costs[i], ap[i], sd[i], bar, fmt="o", color=color, capsize=3, linewidth=1)
        name, spot = row["name"].replace("$", r"\$"), (costs[i], ap[i])
        axes.annotate(name, spot, xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set_xlabel(f"{column.axis}{'; bar to the 90th percentile' if column.second else ''}")
    axes.set_ylabel("AP, mean ± sd over seeds")
    axes.margins(y=0.12)
    axes.set_xlim(0, limit)
    return figure
