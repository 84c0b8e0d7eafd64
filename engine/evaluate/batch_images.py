"""val_batch*_labels.jpg and val_batch*_pred.jpg: ground truth and detections of a few images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.loading.sample import Batch
from utils.boxes import Detections
from utils.drawing import draw_boxes, grid, write_image

DRAWN_BATCHES = 3
DRAWN_IMAGES = 16  # of a batch
DRAWN_CONF = 0.25


class BatchImages:
    """Draws the first batches it is shown, and writes them at the end."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._done: list[dict[str, np.ndarray]] = []

    def add(self, batch: Batch, detections: Sequence[Detections]) -> None:
        """Draw a batch with its boxes and with `detections`, on the CPU, in network pixels."""
        if len(self._done) == DRAWN_BATCHES:
            return
        images = batch.images[:DRAWN_IMAGES].cpu().numpy().transpose(0, 2, 3, 1)
        targets = (batch.targets.image_index, batch.targets.boxes, batch.targets.labels)
        owner, boxes, labels = (item.cpu().numpy() for item in targets)
        asked, found = [], []
        for number, (image, item) in enumerate(zip(images, detections, strict=False)):
            mine = owner == number
            asked.append(draw_boxes(image, boxes[mine], labels[mine], names=self._names))
            sure = (item.scores >= DRAWN_CONF).numpy()
            columns = (item.boxes, item.labels, item.scores)
            corners, classes, scores = (column.numpy()[sure] for column in columns)
            found.append(draw_boxes(image, corners, classes, names=self._names, scores=scores))
        self._done.append({"labels": grid(asked), "pred": grid(found)})

    def save(self, folder: Path) -> None:
        """Write what was drawn into `folder`. UserError when a file cannot be written."""
        for number, grids in enumerate(self._done):
            for kind, image in grids.items():
                write_image(folder / f"val_batch{number}_{kind}.jpg", image)
