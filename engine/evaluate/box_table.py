"""Boxes of many images as columns: detections and ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DECIMALS = 3  # of pixels; gives back the numbers of COCO's JSON, which float32 corners blur


@dataclass(frozen=True)
class BoxTable:
    """One row per box. Detections come best first within each image."""

    image: np.ndarray  # (N,) int64, index of the image
    labels: np.ndarray  # (N,) int64
    boxes: np.ndarray  # (N, 4) float, xyxy image pixels
    scores: np.ndarray  # (N,) float in [0, 1]; ground truth: 1
    crowd: np.ndarray  # (N,) bool, a region of many objects; detections: False
    areas: np.ndarray  # (N,) float, square pixels (of the mask, if known): small, medium or large

    @staticmethod
    def detections(
        image: np.ndarray, labels: np.ndarray, boxes: np.ndarray, scores: np.ndarray
    ) -> BoxTable:
        """Detections; their areas are those of the boxes."""
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        return BoxTable(image, labels, boxes, scores, np.zeros(len(labels), dtype=bool), areas)

    @staticmethod
    def ground_truth(
        image: np.ndarray,
        labels: np.ndarray,
        boxes: np.ndarray,
        crowd: np.ndarray,
        areas: np.ndarray,
    ) -> BoxTable:
        """Ground-truth boxes."""
        return BoxTable(image, labels, boxes, np.ones(len(labels)), crowd, areas)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> BoxTable:
        """The boxes of these rows (indices or a mask)."""
        return BoxTable(*(column[rows] for column in vars(self).values()))

    @staticmethod
    def concatenate(parts: Sequence[BoxTable]) -> BoxTable:
        """All parts in their order; an empty table for no parts."""
        if not parts:
            none = np.zeros(0, dtype=np.int64)
            return BoxTable.detections(none, none, np.zeros((0, 4)), np.zeros(0))
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return BoxTable(*map(np.concatenate, columns))


def to_xywh(boxes: np.ndarray) -> np.ndarray:
    """(N, 4) xyxy -> (N, 4) float64 left, top, width, height, to 0.001, for COCO's files."""
    corners = boxes.astype(np.float64).reshape(-1, 4)
    sizes = corners[:, 2:] - corners[:, :2]
    return np.round(np.concatenate((corners[:, :2], sizes), 1), DECIMALS)
