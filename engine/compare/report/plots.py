"""Pareto plots of a comparison: AP against each cost, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from engine.compare.report.columns import pareto_front
from engine.compare.schema import Results, Row

DPI = 150
FRONT_COLOR, GRID_COLOR = "#1f3fbf", "#d9d9d9"
GIGA, MEGA = 1e9, 1e6
ROOM = 1.2  # of the highest cost: for names beside points


@dataclass(frozen=True)
class Axis:
    """A cost that AP is drawn against."""

    name: str  # of the file
    label: str
    value: Callable[[Row], float | None]
    upper: Callable[[Row], float | None] = lambda row: None  # end of the error bar


@dataclass(frozen=True)
class Point:
    """A row in a plot."""

    name: str
    cost: float
    ap: float
    sd: float  # of AP
    beyond: float  # from the cost to its upper end


def axes_of(results: Results) -> tuple[Axis, ...]:
    """FLOPs, parameters, the latency at each batch size (to p90), energy."""

    def latency(batch: int, key: str) -> Callable[[Row], float | None]:
        def value(row: Row) -> float | None:
            found = next((one for one in row["latency"] if one["batch"] == batch), None)
            return None if found is None else found[key]  # type: ignore[literal-required]

        return value

    batches = results["measurement"]["batches"] if results["measurement"] else []
    return (
        Axis("flops", "GFLOPs", lambda row: row["cost"] and row["cost"]["flops"] / GIGA),
        Axis("params", "parameters (M)", lambda row: row["cost"] and row["cost"]["params"] / MEGA),
        *(
            Axis(
                f"latency_batch{batch}",
                f"ms per image at batch {batch}, median; bar to the 90th percentile",
                latency(batch, "p50_ms"),
                latency(batch, "p90_ms"),
            )
            for batch in batches
        ),
        Axis(
            "energy",
            _energy_label(results),
            lambda row: row["energy"] and row["energy"]["joules_per_image"],
        ),
    )


def _energy_label(results: Results) -> str:
    found = sorted({row["energy"]["batch"] for row in results["rows"] if row["energy"]})
    return "J per image" + (f" at batch {', '.join(map(str, found))}" if found else "")


def points(table: Sequence[Row], axis: Axis) -> list[Point]:
    """The rows that have both AP and the cost."""
    found = []
    for row in table:
        cost = axis.value(row)
        ap = row["accuracy"]["AP"] if row["accuracy"] else None
        if cost is None or ap is None or ap["mean"] is None:
            continue
        upper = axis.upper(row)
        beyond = 0.0 if upper is None else max(upper - cost, 0.0)
        found.append(Point(row["name"], cost, ap["mean"], ap["sd"] or 0.0, beyond))
    return found


def write_plots(results: Results, folder: Path) -> list[Path]:
    """pareto_COST.png and .svg for every cost that a row with an AP has; the files written."""
    written = []
    for axis in axes_of(results):
        rows = points(results["rows"], axis)
        if rows:
            figure = _figure(rows, axis)
            for suffix in ("png", "svg"):
                path = folder / f"pareto_{axis.name}.{suffix}"
                with mpl.rc_context({"svg.hashsalt": axis.name}):  # the same file each time
                    metadata = {"Date": None} if suffix == "svg" else None
                    figure.savefig(path, dpi=DPI, metadata=metadata)
                written.append(path)
    return written


def _figure(rows: Sequence[Point], axis: Axis) -> Figure:
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(color=GRID_COLOR, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    front = pareto_front([point.cost for point in rows], [point.ap for point in rows])
    best = [rows[index] for index in front]
    limit = ROOM * max(point.cost + point.beyond for point in rows)
    _draw_front(axes, best, limit)
    for point in rows:
        on_front = point in best
        axes.errorbar(
            [point.cost],
            [point.ap],
            yerr=[point.sd],
            xerr=[[0.0], [point.beyond]],
            fmt="o",
            color=FRONT_COLOR if on_front else "#8c8c8c",
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
    axes.set_xlabel(axis.label)
    axes.set_ylabel("AP, mean ± sd over seeds")
    axes.margins(y=0.12)
    axes.set_xlim(0, limit)
    return figure


def _draw_front(axes: Axes, best: Sequence[Point], limit: float) -> None:
    """Steps: between two points the cheaper one is what can be had."""
    axes.plot(
        [*(point.cost for point in best), limit],
        [*(point.ap for point in best), best[-1].ap],
        drawstyle="steps-post",
        color=FRONT_COLOR,
        linewidth=1.2,
        alpha=0.6,
    )
