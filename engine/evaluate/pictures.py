"""val_batch*_labels.jpg and val_batch*_pred.jpg: what was asked and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.loading.sample import Batch
from utils.drawing import draw_boxes, grid, write_image
from utils.structures import Detections

PICTURED_BATCHES = 3
PICTURED_IMAGES = 16  # of a batch
PICTURED_CONF = 0.25
LONGEST_SIDE = 1920  # pixels of the whole picture


class BatchPictures:
    """Draws the first batches it is shown into `folder`."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder = folder
        self._names = names
        self._done = 0

    def add(self, batch: Batch, detections: Sequence[Detections]) -> None:
        """Draw a batch, its boxes in network pixels and `detections` likewise, on any device."""
        if self._done == PICTURED_BATCHES:
            return
        images = batch.images[:PICTURED_IMAGES].cpu().numpy().transpose(0, 2, 3, 1)
        targets = (batch.targets.image_index, batch.targets.boxes, batch.targets.labels)
        owner, boxes, labels = (item.cpu().numpy() for item in targets)
        asked, found = [], []
        for number, image in enumerate(images):
            mine = owner == number
            asked.append(draw_boxes(image, boxes[mine], labels[mine], names=self._names))
            item = detections[number].cpu()
            sure = item.scores >= PICTURED_CONF
            found.append(
                draw_boxes(
                    image,
                    item.boxes[sure].numpy(),
                    item.labels[sure].numpy(),
                    names=self._names,
                    scores=item.scores[sure].numpy(),
                )
            )
        for kind, drawn in (("labels", asked), ("pred", found)):
            self._write(drawn, self._folder / f"val_batch{self._done}_{kind}.jpg")
        self._done += 1

    @staticmethod
    def _write(images: Sequence[np.ndarray], path: Path) -> None:
        columns = int(np.ceil(np.sqrt(len(images))))
        height, width = images[0].shape[:2]
        shrink = min(LONGEST_SIDE / (columns * max(height, width)), 1)
        cell = (max(round(height * shrink), 1), max(round(width * shrink), 1))
        write_image(path, grid(images, columns, cell))
