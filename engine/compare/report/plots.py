"""Pareto plots of a comparison: AP against each cost, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from engine.compare.report.columns import Column, Plain, at, columns_of, pareto_front

DPI = 150
FRONT_COLOR, OTHER_COLOR, GRID_COLOR = "#1f3fbf", "#8c8c8c", "#d9d9d9"
MARGIN = 1.2  # the axis ends at this multiple of the highest cost, for names right of the points


@dataclass(frozen=True)
class Point:
    """A row in a plot."""

    name: str
    cost: float
    ap: float
    sd: float  # of AP
    bar: float  # length of the error bar from the cost upwards


def axes_of(results: Plain) -> dict[str, Column]:
    """The costs that AP is drawn against, by the name of the file."""
    batches = results["measurement"]["batches"] if results["measurement"] else []
    paths = {
        "flops": "cost.flops",
        "params": "cost.params",
        **{f"latency_batch{size}": f"latency.{i}.p50_ms" for i, size in enumerate(batches)},
        "energy": "energy.joules_per_image",
    }
    by_path = {column.path: column for column in columns_of(results)}
    return {name: by_path[path] for name, path in paths.items() if path in by_path}


def points(rows: Sequence[Plain], column: Column) -> list[Point]:
    """The rows that have both AP and the cost."""
    found = []
    for row in rows:
        cost, ap = at(row, column.path), at(row, "accuracy.AP")
        if cost is not None and ap is not None and ap["mean"] is not None:
            upper = at(row, column.second) if column.second else None
            bar = 0.0 if upper is None else max(upper - cost, 0.0)
            scaled = (cost / column.scale, ap["mean"], ap["sd"] or 0.0, bar / column.scale)
            found.append(Point(row["name"], *scaled))
    return found


def write_plots(results: Plain, folder: Path) -> list[Path]:
    """pareto_COST.png and .svg for every cost that a row with an AP has; the files written."""
    written = []
    for name, column in axes_of(results).items():
        rows = points(results["rows"], column)
        if not rows:
            continue
        figure = _figure(rows)
        bar = "; bar to the 90th percentile" if column.second else ""
        figure.axes[0].set_xlabel(f"{column.axis}{bar}")
        for path in (folder / f"pareto_{name}.{suffix}" for suffix in ("png", "svg")):
            with mpl.rc_context({"svg.hashsalt": name}):  # the same file each time
                metadata = {"Date": None} if path.suffix == ".svg" else None
                figure.savefig(path, dpi=DPI, metadata=metadata)
            written.append(path)
    return written


def _figure(rows: Sequence[Point]) -> Figure:
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color=GRID_COLOR, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    best = [rows[i] for i in pareto_front([one.cost for one in rows], [one.ap for one in rows])]
    limit = MARGIN * max(point.cost + point.bar for point in rows)
    costs, values = [one.cost for one in best], [one.ap for one in best]
    (line,) = axes.step([*costs, limit], [*values, values[-1]], where="post", color=FRONT_COLOR)
    line.set(linewidth=1.2, alpha=0.6)
    for point in rows:
        axes.errorbar(
            [point.cost],
            [point.ap],
            yerr=[point.sd],
            xerr=[[0.0], [point.bar]],
            fmt="o",
            color=FRONT_COLOR if point in best else OTHER_COLOR,
            capsize=3,
            linewidth=1,
        )
        axes.annotate(
            point.name.replace("$", r"\$"),
            (point.cost, point.ap),
            xytext=(5, 5),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_ylabel("AP, mean ± sd over seeds")
    axes.margins(y=0.12)
    axes.set_xlim(0, limit)
    return figure
