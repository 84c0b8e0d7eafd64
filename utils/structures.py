"""The values that travel between data, models and engine. Boxes are xyxy pixels, always."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
