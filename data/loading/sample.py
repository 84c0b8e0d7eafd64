"""One image with its boxes, and a batch of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.loading.compose import Plan
from utils.boxes import Letterbox, Targets


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
    """Images of one size; bytes until they are on the device.

    With a plan the images are sources for this and later batches, each at the top left of a square
    and to be kept at its slot, and the plan says how to compose those of the batch.
    """

    images: Tensor  # (B, 3, H, W) uint8 RGB
    targets: Targets
    letterboxes: tuple[Letterbox, ...]
    image_ids: tuple[int | str, ...]
    plan: Plan | None = None
    slots: Tensor | None = None  # with a plan: (K,) int64, of each of its K sources

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; the copy is asynchronous when the memory is pinned.

        Other memory may be used again as soon as nobody holds this batch.
        """
        pinned = self.images.is_pinned()
        return self._each(
            lambda part: part.to(device, non_blocking=pinned), self.targets.to(device)
        )

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (called by torch's DataLoader)."""
        return self._each(Tensor.pin_memory, self.targets.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor], targets: Targets) -> Batch:
        plan = None if self.plan is None else self.plan.each(change)
        slots = None if self.slots is None else change(self.slots)
        return Batch(change(self.images), targets, self.letterboxes, self.image_ids, plan, slots)

    def tensors(self) -> Iterator[Tensor]:
        """All that it holds."""
        for part in (self.targets, self.plan):
            yield from () if part is None else vars(part).values()
        yield from (part for part in (self.images, self.slots) if part is not None)

    def __len__(self) -> int:
        return len(self.images if self.plan is None else self.plan)

    def __reduce__(self) -> tuple[Any, ...]:
        """What a worker sends: bytes; each tensor would take a file descriptor."""
        images = self.images.permute(0, 2, 3, 1).numpy()
        parts = [
            None if part is None else [item.numpy() for item in vars(part).values()]
            for part in (self.targets, self.plan)
        ]
        slots = None if self.slots is None else self.slots.numpy()
        return _received, (images, *parts, slots, self.letterboxes, self.image_ids)


def _received(
    images: np.ndarray,
    targets: Sequence[np.ndarray],
    plan: Sequence[np.ndarray] | None,
    slots: np.ndarray | None,
    letterboxes: tuple[Letterbox, ...],
    image_ids: tuple[int | str, ...],
) -> Batch:
    """The batch, in the process that asked for it."""
    return Batch(
        torch.from_numpy(images).permute(0, 3, 1, 2),
        Targets(*map(torch.from_numpy, targets)),
        letterboxes,
        image_ids,
        None if plan is None else Plan(*map(torch.from_numpy, plan)),
        None if slots is None else torch.from_numpy(slots),
    )


def collate(rows: Sequence[tuple[Sample, Letterbox]], images: Tensor) -> Batch:
    """Samples of one size -> a batch, (B, 3, H, W), channels last in the memory of `images`.

    `images` (B, H, W, 3) uint8 has the pixels of the samples.
    """
    counts = torch.tensor([len(sample.labels) for sample, _ in rows], dtype=torch.int64)
    labels = np.concatenate([np.empty(0, np.int64), *(sample.labels for sample, _ in rows)])
    boxes = np.concatenate([np.empty((0, 4), np.float32), *(sample.boxes for sample, _ in rows)])
    return Batch(
        images=images.permute(0, 3, 1, 2),
        targets=Targets(
            image_index=torch.arange(len(rows)).repeat_interleave(counts),
            labels=torch.from_numpy(labels),
            boxes=torch.from_numpy(boxes),
        ),
        letterboxes=tuple(letterbox for _, letterbox in rows),
        image_ids=tuple(sample.image_id for sample, _ in rows),
    )
