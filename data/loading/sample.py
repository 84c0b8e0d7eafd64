"""One image with its boxes, and a batch of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.boxes import Letterbox, Targets
from utils.terminal import warn_once


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

    def __reduce__(self) -> tuple[Any, ...]:
        """What a worker sends: shared memory of the images where it has room, the rest as bytes.

        Each tensor would take a file descriptor.
        """
        images = self.images.permute(0, 2, 3, 1)
        targets = [item.numpy() for item in vars(self.targets).values()]
        sent = images if images.is_shared() else images.numpy()
        return _received, (sent, targets, self.letterboxes, self.image_ids)


def _received(images: Tensor | np.ndarray, targets: Sequence[np.ndarray], *rest: Any) -> Batch:
    """The batch, in the process that asked for it."""
    if isinstance(images, np.ndarray):
        warn_once(
            "warning: no room for a batch in /dev/shm: batches go through pipes, which is slower;"
            " docker run --shm-size 1g, a smaller batch or fewer --workers may help"
        )
    images = torch.as_tensor(images).permute(0, 3, 1, 2)
    return Batch(images, Targets(*map(torch.from_numpy, targets)), *rest)


def collate(rows: Sequence[tuple[Sample, Letterbox]], images: Tensor) -> Batch:
    """Samples of one size -> a batch, (B, 3, H, W), channels last in the memory of `images`.

    `images` (B, H, W, 3) uint8 has the pixels of the samples.
    """
    counts = torch.tensor([len(sample.labels) for sample, _ in rows])
    labels = np.concatenate([sample.labels for sample, _ in rows])
    boxes = np.concatenate([sample.boxes for sample, _ in rows])
    return Batch(
        images=images.permute(0, 3, 1, 2),
        targets=Targets(
            image_index=torch.arange(len(rows)).repeat_interleave(counts),
            labels=torch.from_numpy(labels.astype(np.int64)),
            boxes=torch.from_numpy(boxes.astype(np.float32)),
        ),
        letterboxes=tuple(letterbox for _, letterbox in rows),
        image_ids=tuple(sample.image_id for sample, _ in rows),
    )
