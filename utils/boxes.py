"""Boxes that travel between data, models and engine, and their arithmetic: xyxy pixels, always.

Centre-size exists only inside heads and losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """The ground-truth boxes of a batch."""

    image_index: Tensor  # (M,) int64, row of the batch
    labels: Tensor  # (M,) int64
    boxes: Tensor  # (M, 4) float32, xyxy network pixels

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def to(self, device: torch.device) -> Targets:
        """The same targets on `device`; asynchronous when the tensors are pinned."""
        return Targets(*(item.to(device, non_blocking=True) for item in vars(self).values()))

    def pin_memory(self) -> Targets:
        """The same targets in page-locked memory."""
        return Targets(*(item.pin_memory() for item in vars(self).values()))


@dataclass(frozen=True)
class Detections:
    """The detections of one image, best first."""

    boxes: Tensor  # (K, 4) float32, xyxy pixels
    scores: Tensor  # (K,) float32 in [0, 1]
    labels: Tensor  # (K,) int64

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    @staticmethod
    def to_cpu(images: Sequence[Detections]) -> list[Detections]:
        """The same detections in main memory, by one copy for all images."""
        columns = [(item.boxes, item.scores[:, None], item.labels[:, None]) for item in images]
        together = torch.cat([torch.cat([part.float() for part in row], 1) for row in columns])
        rows = together.cpu().split([len(item) for item in images])
        return [Detections(row[:, :4], row[:, 4], row[:, 5].long()) for row in rows]


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(N, 4) x1 y1 x2 y2 -> (N, 4) centre x, centre y, width, height."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low), -1)


def yolo_rows(
    boxes: np.ndarray,
    labels: Sequence[int],
    size: tuple[int, int],
    *,
    scores: np.ndarray | None,
    digits: str,
) -> str:
    """YOLO's lines `class cx cy w h`, normalised by `size` (height, width), and the score if given.

    boxes: (N, 4) xyxy pixels; scores: (N,).  `digits` is the format of a number.
    """
    corners = boxes.astype(np.float64) / (np.array([size[1], size[0]] * 2))
    centre, sides = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    values = np.concatenate((centre, sides), 1)
    if scores is not None:
        values = np.concatenate((values, scores[:, None]), 1)
    return "".join(
        f"{label} " + " ".join(f"{value:{digits}}" for value in row) + "\n"
        for label, row in zip(labels, values.tolist(), strict=True)
    )


def complete_iou(predicted: Tensor, target: Tensor, *, eps: float = 1e-7) -> Tensor:
    """CIoU of paired boxes, (N, 4) and (N, 4) centre-size in the same units -> (N,).

    IoU - distance term - aspect term; the aspect term's weight is detached.
    arXiv:1911.08287, section 3.2 (equations 10-12).
    """
    a_centre, a_size = predicted[..., :2], predicted[..., 2:]
    b_centre, b_size = target[..., :2], target[..., 2:]
    a_low, a_high = a_centre - a_size / 2, a_centre + a_size / 2
    b_low, b_high = b_centre - b_size / 2, b_centre + b_size / 2
    overlap = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0)
    intersection = overlap.prod(-1)
    union = a_size.prod(-1) + b_size.prod(-1) - intersection + eps
    iou = intersection / union
    hull = torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)
    diagonal = hull.square().sum(-1) + eps
    distance = (a_centre - b_centre).square().sum(-1)
    angle = torch.atan(b_size[..., 0] / (b_size[..., 1] + eps)) - torch.atan(
        a_size[..., 0] / (a_size[..., 1] + eps)
    )
    aspect = (4 / math.pi**2) * angle.square()
    with torch.no_grad():
        weight = aspect / (aspect - iou + (1 + eps))
    return iou - distance / diagonal - weight * aspect
