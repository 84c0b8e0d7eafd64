"""Plots of the training data: labels.jpg and train_batch*.jpg."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from data.index.columns import Records
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
    records = Records.of(index.records)
    shares = records.boxes / records.sides()[:, [1, 0, 1, 0]].astype(np.float32)
    table = np.column_stack((shares, records.labels))[~records.crowd]
    boxes, labels, names = table[:, :4], table[:, 4].astype(int), index.names
    figure = Figure(figsize=(10, 10), layout="constrained")
    FigureCanvasAgg(figure)
    (counts, outlines), (centres, sizes) = figure.subplots(2, 2)

    classes, heights = range(len(names)), np.bincount(labels, minlength=len(names))
    bars = counts.bar(classes, heights, color=_shades(classes))
    counts.set(title=f"{len(labels)} boxes of {len(names)} classes", ylabel="boxes", xlabel="class")
    if len(names) <= NAMED_CLASSES:
        counts.set_xticks(classes, names, rotation=90)
        counts.bar_label(bars, fontsize=8)
        counts.margins(y=0.1)
        counts.set_xlabel("")

    chosen = np.linspace(0, len(boxes) - 1, min(len(boxes), DRAWN_BOXES)).round().astype(int)
    half = (boxes[chosen, 2:] - boxes[chosen, :2]) / 2
    corners = 0.5 + half[:, None] * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    shades = _shades(labels[chosen])
    drawn = PolyCollection(list(corners), facecolors="none", edgecolors=shades, alpha=0.3)
    outlines.add_collection(drawn)
    some = f"{len(chosen)} of the boxes" if len(chosen) < len(boxes) else "All boxes"
    outlines.set(title=f"{some}, centred", xlim=(0, 1), ylim=(1, 0), aspect="equal")

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


def _shades(labels: Sequence[int] | np.ndarray) -> list[tuple[float, ...]]:
    return [tuple(channel / 255 for channel in color(int(label))) for label in labels]


def _heat(axes: Axes, points: np.ndarray, *, title: str, names: tuple[str, str]) -> None:
    square = [[0, 1], [0, 1]]
    heat, _, _ = np.histogram2d(points[:, 0], points[:, 1], bins=HEAT_BINS, range=square)
    axes.imshow(np.log1p(heat.T), extent=(0, 1, 0, 1), origin="lower", cmap="Blues", aspect="equal")
    axes.set(title=f"{title} (log scale)", xlabel=names[0], ylabel=names[1])
