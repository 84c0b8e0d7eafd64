"""Curves, confusion matrix and images with boxes as files, without pyplot and its global state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from data.index.records import DataIndex
from data.loading.plots import tiles_of
from data.loading.sample import Batch
from engine.evaluate.matching import confusion_matrix
from engine.evaluate.metrics import DetectionMetrics, by_id, truth_of
from utils.boxes import Detections
from utils.drawing import Tile, draw_tiles, plot_color, plot_name, tick_rotation, write_image
from utils.files import writing
from utils.terminal import warn

DRAWN_BATCHES = 3
DRAWN_CONF = 0.25
LEGEND_CLASSES = 20  # more lines than this have no legend
NUMBERED_CLASSES = 30  # a larger matrix has no numbers in its cells
PLOTTED_CLASSES = 1000  # a matrix of 30,000 classes would take gigabytes
DPI = 200
POINTS_PER_INCH = 72  # of letters
MEAN_COLOR, OTHER_COLOR = "black", "#8c8c8c"
GRID_COLOR = "#d9d9d9"
STYLE: dict[Any, Any] = {
    **{"axes.grid": True, "grid.color": GRID_COLOR, "grid.linewidth": 0.6, "axes.axisbelow": True},
    **{"axes.spines.top": False, "axes.spines.right": False},
}


class BatchImages:
    """Draws the first batches, for val_batch<n>_labels.jpg (ground truth) and _pred.jpg."""

    def __init__(self, index: DataIndex) -> None:
        self._index = index
        self._grids: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, batch: Batch, detections: Sequence[Detections]) -> None:
        """Draw a batch with its boxes and with `detections`, on the CPU, in network pixels."""
        if len(self._grids) == DRAWN_BATCHES:
            return
        truth, found = tiles_of(batch, self._index), []
        for tile, item in zip(truth, detections, strict=False):
            sure = (item.scores >= DRAWN_CONF).numpy()
            boxes, scores, labels = (column.numpy()[sure] for column in vars(item).values())
            found.append(Tile(tile.image, boxes, labels, tile.title, scores))
        names = self._index.names
        self._grids.append((draw_tiles(truth, names), draw_tiles(found, names)))

    def save(self, folder: Path) -> None:
        """Write what was drawn into `folder`. UserError when a file cannot be written."""
        for number, (truth, found) in enumerate(self._grids):
            write_image(folder / f"val_batch{number}_labels.jpg", truth)
            write_image(folder / f"val_batch{number}_pred.jpg", found)


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
    classes = [(int(label), index.names[label]) for label in curves.classes]
    for title, values in (
        ("Precision", curves.precision),
        ("Recall", curves.recall),
        ("F1", curves.f1),
    ):
        path = folder / f"{title[: 2 if title == 'F1' else 1]}_curve.png"
        titles = (f"{title} and confidence", "Confidence", title)
        _plot_lines(path, titles, curves.confidence, values, classes)
    recalls = np.linspace(0, 1, precision50.shape[1])
    titles = ("Precision and recall, IoU 0.5", "Recall", "Precision")
    precision = precision50[curves.classes]
    _plot_lines(folder / "PR_curve.png", titles, recalls, precision, classes, areas=True)
    matrix = confusion_matrix(metrics.detections, truth_of(by_id(index)), len(index.names))
    _plot_confusion(matrix, index.names, folder / "confusion_matrix.png")


def _plot_lines(
    path: Path,
    titles: tuple[str, str, str],
    axis: np.ndarray,
    values: np.ndarray,
    classes: Sequence[tuple[int, str]],
    *,
    areas: bool = False,
) -> None:
    """A thin line for each of the K classes (label, name) and a thick one for their mean.

    values: (K, points).  Up to LEGEND_CLASSES have the colours of their boxes, more are grey.
    The legend gives the maximum of the mean, or with `areas` the area under each line as COCO takes
    it (the mean over the recalls).  titles: of the figure and its two axes.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    with mpl.rc_context(STYLE):
        axes = figure.add_subplot()
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel=titles[1], ylabel=titles[2])
    axes.set_title(titles[0], fontweight="bold")
    few = len(values) <= LEGEND_CLASSES
    width, depth = (1.5, 0.9) if few else (0.6, 0.45)
    for line, (number, name) in zip(values, classes, strict=True):
        shade = plot_color(number) if few else OTHER_COLOR
        label = name + f" {line.mean():.3f}" * areas
        axes.plot(axis, line, color=shade, linewidth=width, alpha=depth, label=plot_name(label))
    if len(values):
        handles = axes.get_lines() if few else []
        mean = values.mean(0)
        best = mean.argmax()
        summary = f"{mean.mean():.3f} mAP50" if areas else f"{mean[best]:.2f} at {axis[best]:.3f}"
        label = f"all classes {summary}"
        thick = axes.plot(axis, mean, color=MEAN_COLOR, linewidth=3, label=label)
        style: dict[str, Any] = {"loc": "upper right", "framealpha": 0.9, "fontsize": 10}
        if few:
            style = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "fontsize": 9}
        axes.legend(handles=[*thick, *handles], frameon=not few, **style)
    _save(figure, path)


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
    image = axes.imshow(np.ma.masked_equal(share, 0), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the column")
    letters = float(np.clip(POINTS_PER_INCH * 0.6 * size / side, 5, 10))
    ticks = [*(plot_name(name) for name in names), "background"]
    axes.set_xticks(range(side), ticks, rotation=tick_rotation(ticks), fontsize=letters)
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


def plot_study(
    sizes: Sequence[float],
    accuracy: Mapping[str, Sequence[float]],
    times: Mapping[str, Sequence[float]],
    path: Path,
) -> None:
    """Three panels: accuracy and times (ms per image) over the sizes (pixels), then one by other.

    The last of `accuracy` is shown against the sum of the times, each point with its size.
    """
    figure = Figure(figsize=(15, 5), layout="constrained")
    with mpl.rc_context(STYLE):
        panels = figure.subplots(1, 3)
    total = np.sum([*times.values()], axis=0)
    for axes, series, title, unit in (
        (panels[0], accuracy, "Accuracy", "AP"),
        (panels[1], {"total": total, **times}, "Time", "ms per image"),
    ):
        for number, (name, values) in enumerate(series.items()):
            shade = MEAN_COLOR if name == "total" else plot_color(number + 1)
            axes.plot(sizes, values, marker="o", color=shade, linewidth=2, label=name)
        axes.set(xlabel="image size (pixels)", ylabel=unit, title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.legend(frameon=False)
    name, values = [*accuracy.items()][-1]
    panels[2].plot(total, values, marker="o", color=MEAN_COLOR, linewidth=2)
    for size, x, y in zip(sizes, total, values, strict=True):
        panels[2].annotate(f"{size:g}", (x, y), (6, -12), textcoords="offset points", fontsize=9)
    panels[2].set(xlabel="ms per image", ylabel=name, title="Accuracy against time, by image size")
    for axes in panels:
        axes.set_ylim(bottom=0)
    panels[2].set_xlim(left=0)
    _save(figure, path, dpi=120)


def _save(figure: Figure, path: Path, *, dpi: int = DPI) -> None:
    with writing(path), warnings.catch_warnings():  # of names in scripts that the font lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(path, dpi=dpi)
