"""From a key to an augmented training sample."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from data.loading.geometry import scale_segments, whole_segments
from data.loading.sample import Sample
from data.loading.store import ImageStore
from data.loading.transforms import copy_paste, flip, hsv, keep, mixup, mosaic4, random_affine
from utils.boxes import Letterbox
from utils.hyp import Hyperparameters
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

    store: ImageStore
    hyp: Hyperparameters
    seed: int

    def __call__(self, key: SampleKey) -> tuple[Sample, Letterbox]:
        """The augmented sample of key.shape, and no letterbox to speak of: there is no way back.

        Raises UserError when a file has become unreadable.
        """
        rng = generator(self.seed, key.epoch, key.index)
        if key.mosaic and rng.random() < self.hyp.mosaic:
            sample = self._mosaic(key, key.index, rng)
            if rng.random() < self.hyp.mixup:
                second = self._mosaic(key, int(rng.integers(len(self.store.records))), rng)
                sample = mixup(sample, second, rng)
        else:
            plain = fetch(self.store, key.index, key.shape)
            sample = random_affine(plain, key.shape, rng, self.hyp)
        sample = hsv(sample, rng, self.hyp)
        if rng.random() < self.hyp.flipud:
            sample = flip(sample, 1)
        if rng.random() < self.hyp.fliplr:
            sample = flip(sample, 0)
        return sample, Letterbox(key.shape, key.shape)

    def _mosaic(self, key: SampleKey, first: int, rng: np.random.Generator) -> Sample:
        others = rng.integers(len(self.store.records), size=3)
        indices = rng.permutation([first, *others])
        samples = [fetch(self.store, int(index)) for index in indices]
        canvas = mosaic4(samples, self.store.size, rng)
        canvas = replace(canvas, image_id=self.store.records[first].image_id)
        canvas = copy_paste(canvas, rng, share=self.hyp.copy_paste)
        return random_affine(canvas, key.shape, rng, self.hyp)


def fetch(store: ImageStore, index: int, canvas: tuple[int, int] | None = None) -> Sample:
    """Record `index` at the store's scale, without its crowd regions.

    On a grey `canvas` (height, width) if given, in its centre, else without padding.
    """
    record, geometry, image = store.records[index], store.geometry(index), store[index]
    if canvas is not None:
        image = Letterbox(geometry.dst, canvas, store.size).apply(image)
        geometry = replace(geometry, dst=canvas)
    outlines = whole_segments(record.boxes, record.segments)
    whole = Sample(
        image=image,
        boxes=geometry.to_network(record.boxes),
        labels=record.labels,
        image_id=record.image_id,
        segments=scale_segments(outlines, geometry.scale_xy, geometry.offset),
    )
    return keep(whole, ~record.crowd)
