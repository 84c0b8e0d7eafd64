"""From a key to an augmented training sample, and from samples to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from data.index.records import ImageRecord
from data.loading.geometry import scale_segments, whole_segments
from data.loading.mosaic import mosaic4
from data.loading.sample import Batch, Sample
from data.loading.store import ImageStore
from data.loading.transforms import (
    copy_paste,
    flip_left_right,
    flip_up_down,
    hsv,
    keep,
    letterbox,
    mixup,
    random_affine,
)
from utils.boxes import Targets
from utils.hyp import Hyperparameters
from utils.letterbox import Letterbox
from utils.seeding import generator


@dataclass(frozen=True)
class SampleKey:
    """Everything that determines one training sample, so that no worker's state does."""

    epoch: int
    index: int  # in DataIndex.records
    mosaic: bool  # whether mosaics are allowed at all
    shape: tuple[int, int]  # (height, width) of the result


@dataclass(frozen=True)
class Augmentation:
    """YOLOv5's training recipe: SampleKey -> Sample.

    With probability hyp.mosaic a mosaic of the image and three others at random, with copy-paste,
    random affine, and with probability hyp.mixup a blend with a second mosaic; otherwise the
    letterboxed image and the affine.  Then HSV and flips.  All draws come from
    (seed, epoch, index).
    """

    records: Sequence[ImageRecord]
    store: ImageStore
    hyp: Hyperparameters
    size: int
    seed: int

    def __call__(self, key: SampleKey) -> Sample:
        """The augmented sample of key.shape. Raises UserError when a file has become unreadable."""
        rng = generator(self.seed, key.epoch, key.index)
        if key.mosaic and rng.random() < self.hyp.mosaic:
            sample = self._mosaic(key, key.index, rng)
            if rng.random() < self.hyp.mixup:
                second = self._mosaic(key, int(rng.integers(len(self.records))), rng)
                sample = mixup(sample, second, rng)
        else:
            plain = fetch(self.records, self.store, key.index)
            boxed = letterbox(plain, padding(plain.size, key.shape))
            sample = random_affine(boxed, key.shape, rng, self.hyp)
        sample = hsv(sample, rng, self.hyp)
        if rng.random() < self.hyp.flipud:
            sample = flip_up_down(sample)
        if rng.random() < self.hyp.fliplr:
            sample = flip_left_right(sample)
        return sample

    def _mosaic(self, key: SampleKey, first: int, rng: np.random.Generator) -> Sample:
        others = rng.integers(len(self.records), size=3)
        indices = rng.permutation([first, *others])
        samples = [fetch(self.records, self.store, int(index)) for index in indices]
        canvas = mosaic4(samples, self.size, rng)
        canvas = replace(canvas, image_id=self.records[first].image_id)
        canvas = copy_paste(canvas, rng, share=self.hyp.copy_paste)
        return random_affine(canvas, key.shape, rng, self.hyp)


def fetch(records: Sequence[ImageRecord], store: ImageStore, index: int) -> Sample:
    """Record `index` at the store's scale, without padding and without its crowd regions."""
    record, scaled = records[index], store.geometry(index)
    outlines = whole_segments(record.boxes, record.segments)
    whole = Sample(
        image=store[index],
        boxes=scaled.to_network(record.boxes),
        labels=record.labels,
        image_id=record.image_id,
        segments=scale_segments(outlines, scaled.scale_xy),
    )
    return keep(whole, ~record.crowd)


def padding(size: tuple[int, int], canvas: tuple[int, int]) -> Letterbox:
    """The grey round an image of (height, width) `size` that has its scale already."""
    return Letterbox(size, canvas, max(size))


def collate(
    samples: Sequence[Sample], letterboxes: Sequence[Letterbox], *, out: np.ndarray | None = None
) -> Batch:
    """Samples of one size -> a batch. The images are (B, 3, H, W), channels last in memory.

    `out` (B, H, W, 3) uint8 is the memory for the images, if given.
    """
    images = torch.from_numpy(np.stack([sample.image for sample in samples], out=out))
    counts = torch.tensor([len(sample.labels) for sample in samples])
    labels = np.concatenate([sample.labels for sample in samples])
    boxes = np.concatenate([sample.boxes for sample in samples])
    return Batch(
        images=images.permute(0, 3, 1, 2),
        targets=Targets(
            image_index=torch.arange(len(samples)).repeat_interleave(counts),
            labels=torch.from_numpy(labels.astype(np.int64)),
            boxes=torch.from_numpy(boxes.astype(np.float32)),
        ),
        letterboxes=tuple(letterboxes),
        image_ids=tuple(sample.image_id for sample in samples),
    )
