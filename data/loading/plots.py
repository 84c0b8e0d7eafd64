"""Plots of the training data: labels.jpg and train_batch*.jpg."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from data.index.columns import Records
from data.index.records import DataIndex
from data.loading.sample import Batch
from utils.drawing import Tile, draw_tiles, plot_color, plot_name, tick_rotation, write_image
from utils.files import writing

DRAWN_IMAGES = 16  # of a batch
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
    bars = counts.bar(classes, heights, color=[plot_color(label) for label in classes])
    counts.set(title=f"{len(labels)} boxes of {len(names)} classes", ylabel="boxes", xlabel="class")
    if len(names) <= NAMED_CLASSES:
        ticks = [plot_name(name) for name in names]
        counts.set_xticks(classes, ticks, rotation=tick_rotation(ticks))
        counts.bar_label(bars, fontsize=8)
        counts.margins(y=0.1)
        counts.set_xlabel("")

    chosen = np.linspace(0, len(boxes) - 1, min(len(boxes), DRAWN_BOXES)).round().astype(int)
    areas = (boxes[chosen, 2:] - boxes[chosen, :2]).prod(1)
    chosen = chosen[np.argsort(-areas, kind="stable")]  # the smallest on top
    half = (boxes[chosen, 2:] - boxes[chosen, :2]) / 2
    corners = 0.5 + half[:, None] * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    shades = [plot_color(label) for label in labels[chosen].tolist()]
    drawn = PolyCollection(list(corners), facecolors="none", edgecolors=shades, alpha=0.3)
    outlines.add_collection(drawn)
    some = f"{len(chosen)} of {len(boxes)} boxes" if len(chosen) < len(boxes) else "Boxes"
    outlines.set(title=f"{some}, drawn about one centre", xlim=(0, 1), ylim=(1, 0), aspect="equal")
    outlines.set(xlabel="width", ylabel="height")

    _heat(centres, (boxes[:, :2] + boxes[:, 2:]) / 2, title="Box centres", names=("x", "y"))
    centres.invert_yaxis()
    _heat(sizes, boxes[:, 2:] - boxes[:, :2], title="Box sizes", names=("width", "height"))
    with writing(path):
        figure.savefig(path, dpi=150)


def plot_batch(batch: Batch, index: DataIndex, path: Path) -> None:
    """Write the first images of a batch as a grid: ground truth, class names and file names.

    A mosaic has the name of its first image.  Raises UserError when the file cannot be written.
    """
    write_image(path, draw_tiles(tiles_of(batch, index), index.names))


def tiles_of(batch: Batch, index: DataIndex) -> list[Tile]:
    """The first images of a batch of `index` with their ground truth."""
    owner, labels, boxes = (item.cpu().numpy() for item in vars(batch.targets).values())
    images = batch.images[:DRAWN_IMAGES].permute(0, 2, 3, 1).cpu().numpy()
    titles = index.file_names(batch.image_ids[:DRAWN_IMAGES])
    return [
        Tile(np.ascontiguousarray(image), boxes[owner == i], labels[owner == i], title)
        for i, (image, title) in enumerate(zip(images, titles, strict=True))
    ]


def _heat(axes: Axes, points: np.ndarray, *, title: str, names: tuple[str, str]) -> None:
    square = [[0, 1], [0, 1]]
    heat, _, _ = np.histogram2d(points[:, 0], points[:, 1], bins=HEAT_BINS, range=square)
    axes.imshow(np.log1p(heat.T), extent=(0, 1, 0, 1), origin="lower", cmap="Blues", aspect="equal")
    axes.set(title=f"{title} (log scale)", xlabel=names[0], ylabel=names[1])
