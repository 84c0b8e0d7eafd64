"""Curves, confusion matrix and drawn batches as files, without pyplot and its global state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data.index.records import DataIndex
from engine.evaluate.batch_images import BatchImages
from engine.evaluate.matching import confusion_matrix
from engine.evaluate.metrics import by_id, truth_of
from engine.evaluate.results import DetectionMetrics
from utils.files import writing
from utils.terminal import warn

LEGEND_CLASSES = 20  # more lines than this have no legend
NUMBERED_CLASSES = 30  # a larger matrix has no numbers in its cells
PLOTTED_CLASSES = 1000  # a matrix of 30,000 classes would take gigabytes
DPI = 200
POINTS_PER_INCH = 72  # of letters
MEAN_COLOR = "#1f3fbf"
GRID_COLOR = "#d9d9d9"
STYLE: dict[Any, Any] = {
    **{"axes.grid": True, "grid.color": GRID_COLOR, "grid.linewidth": 0.6, "axes.axisbelow": True},
    **{"axes.spines.top": False, "axes.spines.right": False},
}


def save_plots(
    metrics: DetectionMetrics, index: DataIndex, images: BatchImages, folder: Path
) -> None:
    """Write curves, confusion matrix and the drawn batches of an evaluation (rank 0's metrics).

    Raises UserError when a file cannot be written.
    """
    images.save(folder)
    if len(index.names) > PLOTTED_CLASSES:
        warn(f"{len(index.names)} classes: curves are drawn up to {PLOTTED_CLASSES}")
        return
    curves, precision50 = metrics.curves, metrics.precision50
    assert curves is not None
    assert precision50 is not None
    names = [index.names[label] for label in curves.classes]
    for title, values in (
        ("Precision", curves.precision),
        ("Recall", curves.recall),
        ("F1", curves.f1),
    ):
        mean, summary = values.mean(0) if names else np.zeros(1), "(none)"
        best = curves.best if title == "F1" else int(mean.argmax())
        if names:
            summary = f"{mean[best]:.2f} at {curves.confidence[best]:.3f}"
        figure, axes = _axes(f"{title} and confidence", "Confidence", title)
        _lines(axes, curves.confidence, values, names, f"all classes {summary}")
        _save(figure, folder / f"{title[: 2 if title == 'F1' else 1]}_curve.png")
    # the area under each line, as COCO takes it (the mean over the recalls), is in the legend
    precision = precision50[curves.classes]
    area = precision.mean(1)
    summary = f"{area.mean():.3f} mAP50" if names else "(none)"
    named = [f"{name} {value:.3f}" for name, value in zip(names, area, strict=True)]
    figure, axes = _axes("Precision and recall, IoU 0.5", "Recall", "Precision")
    _lines(axes, np.linspace(0, 1, precision.shape[1]), precision, named, f"all classes {summary}")
    _save(figure, folder / "PR_curve.png")
    matrix = confusion_matrix(metrics.detections, truth_of(by_id(index)), len(index.names))
    _plot_confusion(matrix, index.names, folder / "confusion_matrix.png")


def _axes(title: str, across: str, up: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, 6), layout="constrained")
    with mpl.rc_context(STYLE):
        axes = figure.add_subplot()
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel=across, ylabel=up)
    axes.set_title(title, fontweight="bold")
    return figure, axes


def _lines(
    axes: Axes, across: np.ndarray, values: np.ndarray, names: Sequence[str], label: str
) -> None:
    """One thin line for each class and a thick one for their mean."""
    few = len(values) <= LEGEND_CLASSES
    colors = mpl.colormaps["tab20"].colors if few else ["#8c8c8c"]  # type: ignore[attr-defined]
    width, depth = (1.3, 0.9) if few else (0.6, 0.45)
    for row, (line, name) in enumerate(zip(values, names, strict=True)):
        shade = colors[row % len(colors)]
        axes.plot(across, line, color=shade, linewidth=width, alpha=depth, label=_short(name))
    if not len(values):
        return
    handles = axes.get_lines() if few else []
    mean = axes.plot(across, values.mean(0), color=MEAN_COLOR, linewidth=3, label=label)
    if few:
        style: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "fontsize": 9}
        axes.legend(handles=[*mean, *handles], frameon=False, **style)
    else:
        axes.legend(handles=mean, loc="upper right", framealpha=0.9, fontsize=10)


def _short(name: str) -> str:
    """A name that fits next to a plot and that matplotlib does not read as a formula or hides."""
    text = name if len(name) <= 28 else name[:27] + "…"
    text = text.replace("$", r"\$")
    return " " + text if text.startswith("_") else text


def _plot_confusion(matrix: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Write a (K + 1, K + 1) matrix of counts, row = predicted, column = true, last = background.

    The colour is the share of the column: of the ground truth of a class (in the last column, of
    the false detections).  Up to 30 classes have share and count in their cells.
    """
    total = matrix.sum(0, keepdims=True)
    share = np.divide(matrix, total, out=np.zeros(matrix.shape), where=total > 0)
    side = len(matrix)
    size = float(np.clip(3 + 0.55 * side, 7, 18))
    figure = Figure(figsize=(size + 1.5, size), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(np.ma.masked_equal(share, 0), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the column")
    letters = float(np.clip(POINTS_PER_INCH * 0.6 * size / side, 5, 10))
    ticks = [*(_short(name) for name in names), "background"]
    axes.set_xticks(range(side), ticks, rotation=90, fontsize=letters)
    axes.set_yticks(range(side), ticks, fontsize=letters)
    axes.set(xlabel="True", ylabel="Predicted")
    axes.set_title("Confusion matrix", fontweight="bold")
    axes.set_xticks(np.arange(side + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(side + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=GRID_COLOR, linewidth=0.3)
    axes.tick_params(which="both", length=0)
    if side - 1 <= NUMBERED_CLASSES:
        letters = float(np.clip(POINTS_PER_INCH * 0.18 * size / side, 5, 10))
        for row, column in np.argwhere(matrix):
            shade = "white" if share[row, column] > 0.5 else "black"
            text = f"{share[row, column]:.2f}\n{matrix[row, column]}"
            axes.text(column, row, text, ha="center", va="center", color=shade, fontsize=letters)
    _save(figure, path)


def plot_study(sizes: Sequence[float], series: Mapping[str, Sequence[float]], path: Path) -> None:
    """Write one small diagram for each named series over the image sizes (pixels)."""
    figure = Figure(figsize=(4.5 * len(series), 4), layout="constrained")
    with mpl.rc_context(STYLE):
        row = figure.subplots(1, len(series), squeeze=False)[0]
    for axes, (name, values) in zip(row, series.items(), strict=True):
        axes.plot(sizes, values, marker="o", color=MEAN_COLOR, linewidth=2)
        axes.set(xlabel="image size (pixels)", ylabel=name)
        axes.set_ylim(bottom=0)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with writing(path), warnings.catch_warnings():  # of names in scripts that the font lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(path, dpi=DPI)
