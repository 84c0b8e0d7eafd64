"""Plots of the training data: labels.jpg and train_batch*.jpg."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from data.index.records import DataIndex
from data.loading.sample import Batch
from utils.drawing import color, draw_boxes, grid, write_image
from utils.files import writing

NAMED_CLASSES = 30  # more bars than this have no names below them
DRAWN_BOXES = 2000  # more of them, evenly chosen, would only blacken the plot
HEAT_BINS = 50


def plot_labels(index: DataIndex, path: Path) -> None:
    """Plot classes, sizes and positions of an index's boxes (without crowd regions).

    Four panels: boxes per class; box outlines about one centre; heat map of box centres; heat map
    of widths and heights; all relative to the images' sides.
    Raises UserError when the file cannot be written.
    """
    labels, boxes = _relative_boxes(index)
    figure = Figure(figsize=(10, 10), layout="constrained")
    FigureCanvasAgg(figure)
    (counts, outlines), (centres, sizes) = figure.subplots(2, 2)
    _bars(counts, labels, index.names)
    _outlines(outlines, labels, boxes)
    _heat(centres, (boxes[:, :2] + boxes[:, 2:]) / 2, title="Box centres", names=("x", "y"))
    centres.invert_yaxis()
    _heat(sizes, boxes[:, 2:] - boxes[:, :2], title="Box sizes", names=("width", "height"))
    with writing(path):
        figure.savefig(path, dpi=150)


def plot_batch(batch: Batch, names: Sequence[str], path: Path, *, max_images: int = 16) -> None:
    """Write the first images of a batch as a grid, with their ground-truth boxes and class names.

    Raises UserError when the file cannot be written.
    """
    targets = batch.targets
    images = []
    for number in range(min(len(batch), max_images)):
        image = batch.images[number].permute(1, 2, 0).cpu().numpy()
        mine = targets.image_index.cpu() == number
        boxes, labels = targets.boxes.cpu()[mine].numpy(), targets.labels.cpu()[mine].numpy()
        images.append(draw_boxes(np.ascontiguousarray(image), boxes, labels, names=names))
    write_image(path, grid(images))


def _relative_boxes(index: DataIndex) -> tuple[np.ndarray, np.ndarray]:
    """(N,) labels and (N, 4) xyxy boxes as shares of their images' sides."""
    labels, boxes = [np.zeros(0, dtype=np.int64)], [np.zeros((0, 4), dtype=np.float32)]
    for record in index.records:
        labels.append(record.labels[~record.crowd])
        sides = np.array([record.width, record.height] * 2, dtype=np.float32)
        boxes.append(record.boxes[~record.crowd] / sides)
    return np.concatenate(labels), np.concatenate(boxes)


def _shades(labels: Sequence[int] | np.ndarray) -> list[tuple[float, ...]]:
    return [tuple(channel / 255 for channel in color(int(label))) for label in labels]


def _bars(axes: Axes, labels: np.ndarray, names: Sequence[str]) -> None:
    counts = np.bincount(labels, minlength=len(names))
    bars = axes.bar(range(len(names)), counts, color=_shades(range(len(names))))
    axes.set(title=f"{len(labels)} boxes of {len(names)} classes", ylabel="boxes", xlabel="class")
    if len(names) <= NAMED_CLASSES:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.bar_label(bars, fontsize=8)
        axes.margins(y=0.1)
        axes.set_xlabel("")


def _outlines(axes: Axes, labels: np.ndarray, boxes: np.ndarray) -> None:
    chosen = np.linspace(0, len(boxes) - 1, min(len(boxes), DRAWN_BOXES)).round().astype(int)
    half = (boxes[chosen, 2:] - boxes[chosen, :2]) / 2
    corners = 0.5 + half[:, None] * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    shades = _shades(labels[chosen])
    alpha = 0.3
    axes.add_collection(
        PolyCollection(list(corners), facecolors="none", edgecolors=shades, alpha=alpha)
    )
    some = f"{len(chosen)} of the boxes" if len(chosen) < len(boxes) else "All boxes"
    axes.set(title=f"{some}, centred", xlim=(0, 1), ylim=(1, 0), aspect="equal")


def _heat(axes: Axes, points: np.ndarray, *, title: str, names: tuple[str, str]) -> None:
    square = [[0, 1], [0, 1]]
    heat, _, _ = np.histogram2d(points[:, 0], points[:, 1], bins=HEAT_BINS, range=square)
    axes.imshow(np.log1p(heat.T), extent=(0, 1, 0, 1), origin="lower", cmap="Blues", aspect="equal")
    axes.set(title=f"{title} (log scale)", xlabel=names[0], ylabel=names[1])
