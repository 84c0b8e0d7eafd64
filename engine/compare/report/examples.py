"""A few validation images with the detections of each model, for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.compare.arrays import load_detections
from engine.compare.protocol import Splits
from engine.compare.report.tables import ModelRuns
from engine.evaluate.box_table import BoxTable
from engine.evaluate.metrics import by_id, truth_of
from utils.images import ImageError, read_image

IMAGES = 6


@dataclass(frozen=True)
class Example:
    """A validation image, RGB (H, W, 3) uint8, with its ground truth and detections."""

    name: str
    image: np.ndarray
    ground_truth: BoxTable
    detections: Mapping[str, BoxTable]  # by the name of the row


def examples(splits: Splits | None, models: Sequence[ModelRuns]) -> list[Example]:
    """Images spread evenly over those with boxes; detections of the first seed of each row.

    Empty without data or evaluated models.  An image that can no longer be read is left out.
    """
    detections = {
        item.entry.name: load_detections(item.finished[0].path) for item in models if item.finished
    }
    if splits is None or not detections:
        return []
    records = by_id(splits.evaluated)
    with_boxes = [index for index, record in enumerate(records) if not record.crowd.all()]
    chosen = np.linspace(0, len(with_boxes) - 1, min(IMAGES, len(with_boxes))).round().astype(int)
    found = []
    for index in (with_boxes[position] for position in chosen):
        record = records[index]
        try:
            image = read_image(record.path)
        except ImageError:
            continue
        truth = truth_of([record])
        found.append(
            Example(
                record.path.name,
                image,
                truth.take(~truth.crowd),
                {name: table.take(table.image == index) for name, table in detections.items()},
            )
        )
    return found
