"""Curves, confusion matrix and images with boxes as files, without pyplot and its global state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from data.index.records import DataIndex
from data.loading.sample import Batch
from engine.evaluate.matching import confusion_matrix
from engine.evaluate.metrics import DetectionMetrics, by_id, truth_of
from utils.boxes import Detections
from utils.drawing import draw_boxes, grid, write_image
from utils.files import writing
from utils.terminal import warn

DRAWN_BATCHES = 3
DRAWN_IMAGES = 16  # of a batch
DRAWN_CONF = 0.25
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


class BatchImages:
    """Draws the first batches, for val_batch<n>_labels.jpg (ground truth) and _pred.jpg."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._grids: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, batch: Batch, detections: Sequence[Detections]) -> None:
        """Draw a batch with its boxes and with `detections`, on the CPU, in network pixels."""
        if len(self._grids) == DRAWN_BATCHES:
            return
        images = batch.images[:DRAWN_IMAGES].cpu().numpy().transpose(0, 2, 3, 1)
        owner, labels, boxes = (item.cpu().numpy() for item in vars(batch.targets).values())
        truth, found = [], []
        for number, (image, item) in enumerate(zip(images, detections, strict=False)):
            mine = owner == number
            truth.append(draw_boxes(image, boxes[mine], labels[mine], names=self._names))
            sure = (item.scores >= DRAWN_CONF).numpy()
            b, scores, classes = (column.numpy()[sure] for column in vars(item).values())
            found.append(draw_boxes(image, b, classes, names=self._names, scores=scores))
        self._grids.append((grid(truth), grid(found)))

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
    names = [index.names[label] for label in curves.classes]
    for title, values in (
        ("Precision", curves.precision),
        ("Recall", curves.recall),
        ("F1", curves.f1),
    ):
        path = folder / f"{title[: 2 if title == 'F1' else 1]}_curve.png"
        titles = (f"{title} and confidence", "Confidence", title)
        _plot_lines(path, titles, curves.confidence, values, names)
    recalls = np.linspace(0, 1, precision50.shape[1])
    titles = ("Precision and recall, IoU 0.5", "Recall", "Precision")
    precision = precision50[curves.classes]
    _plot_lines(folder / "PR_curve.png", titles, recalls, precision, names, areas=True)
    matrix = confusion_matrix(metrics.detections, truth_of(by_id(index)), len(index.names))
    _plot_confusion(matrix, index.names, folder / "confusion_matrix.png")


def _plot_lines(
    path: Path,
    titles: tuple[str, str, str],
    axis: np.ndarray,
    values: np.ndarray,
    names: Sequence[str],
    *,
    areas: bool = False,
) -> None:
    """One thin line for each class and a thick one for their mean, values (K, points).

    The legend gives the maximum of the mean, or with `areas` the area under each line as COCO takes
    it (the mean over the recalls).  titles: of the figure and its two axes.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    with mpl.rc_context(STYLE):
        axes = figure.add_subplot()
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel=titles[1], ylabel=titles[2])
    axes.set_title(titles[0], fontweight="bold")
    few = len(values) <= LEGEND_CLASSES
    colors = mpl.colormaps["tab20"].colors if few else ["#8c8c8c"]  # type: ignore[attr-defined]
    width, depth = (1.3, 0.9) if few else (0.6, 0.45)
    for row, (line, name) in enumerate(zip(values, names, strict=True)):
        shade, label = colors[row % len(colors)], name + f" {line.mean():.3f}" * areas
        axes.plot(axis, line, color=shade, linewidth=width, alpha=depth, label=_short(label))
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
