"""One image with its boxes, and a batch of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.boxes import Targets
from utils.letterbox import Letterbox


@dataclass(frozen=True)
class Sample:
    """An image and its boxes; a transform is a function Sample -> Sample."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    boxes: np.ndarray  # (N, 4) float32, xyxy pixels
    labels: np.ndarray  # (N,) int64
    image_id: int | str
    segments: tuple[np.ndarray | None, ...] = ()  # per box (P, 2) float32 pixels or None

    def __post_init__(self) -> None:
        if not self.segments:
            object.__setattr__(self, "segments", (None,) * len(self.labels))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.image.shape[0], self.image.shape[1]


@dataclass(frozen=True)
class Batch:
    """Images of one size; bytes until they are on the device."""

    images: Tensor  # (B, 3, H, W) uint8 RGB
    targets: Targets
    letterboxes: tuple[Letterbox, ...]
    image_ids: tuple[int | str, ...]

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; the copy is asynchronous when the memory is pinned."""
        return Batch(
            self.images.to(device, non_blocking=True),
            self.targets.to(device),
            self.letterboxes,
            self.image_ids,
        )

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (called by torch's DataLoader)."""
        return Batch(
            self.images.pin_memory(), self.targets.pin_memory(), self.letterboxes, self.image_ids
        )

    def __len__(self) -> int:
        return self.images.shape[0]
