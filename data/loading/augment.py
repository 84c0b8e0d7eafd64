"""The training recipe: what one batch is made of, drawn and put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from data.loading.compose import Plan, inverse_of
from data.loading.geometry import scale_segments, whole_segments
from data.loading.memory import Allocate
from data.loading.sample import Batch, Sample, collate
from data.loading.store import ImageStore
from data.loading.transforms import (
    MIXUP_BETA,
    affine,
    copy_paste,
    flip,
    grey,
    hsv,
    hsv_gains,
    is_grey,
    keep,
    mixup,
    mosaic4,
    mosaic_centre,
    random_matrix,
    source_window,
)
from utils.boxes import Letterbox
from utils.hyp import Hyperparameters
from utils.seeding import generator


@dataclass(frozen=True)
class BatchKey:
    """Everything that determines one training batch, so that no worker's state does."""

    epoch: int
    samples: Sequence[int]  # an image of each sample, as a position in `pool`
    pool: Sequence[int]  # images, by their number in DataIndex.records, that mosaics may take
    slots: Sequence[int]  # where each of these is kept while it is in use
    mosaic: bool  # whether mosaics are allowed at all
    shape: tuple[int, int]  # (height, width) of the result
    new: Sequence[int] = ()  # positions in `pool` of images that the device does not have yet

    def __len__(self) -> int:
        return len(self.samples)


@dataclass(frozen=True)
class View:
    """An affine view of images that touch at `centre` (x, y) on a grey canvas."""

    tiles: Sequence[int]  # positions in the pool
    centre: tuple[int, int]
    canvas: tuple[int, int]  # (height, width)
    matrix: np.ndarray  # (3, 3) from the canvas to the result


@dataclass(frozen=True)
class Augmentation:
    """YOLOv5's training recipe: BatchKey -> batch.

    With probability hyp.mosaic a mosaic of the image and three others at random, with copy-paste,
    random affine, and with probability hyp.mixup a blend with a second mosaic; otherwise the
    letterboxed image and the affine.  Then HSV and flips.  All draws come from
    (seed, epoch, index).
    """

    store: ImageStore
    hyp: Hyperparameters
    seed: int
    on_device: bool = False  # a batch then has source images and a plan to compose them

    def __call__(self, key: BatchKey, allocate: Allocate) -> Batch:
        """A batch of key.shape; its letterboxes are identities.

        Raises UserError when a file has become unreadable.
        """
        whole = Letterbox(key.shape, key.shape)
        if not self.on_device:
            images = allocate((len(key), *key.shape, 3))
            drawn = (self._sample(key, row, None, out) for row, out in enumerate(images.numpy()))
            return collate([(sample, whole) for sample in drawn], images)
        plan = Plan.blank(len(key), 2 if self.hyp.mixup else 1)
        rows = [(self._sample(key, row, plan, None), whole) for row in range(len(key))]
        sources = allocate((len(key.new), self.store.size, self.store.size, 3))
        for source, position in zip(sources.numpy(), key.new, strict=True):
            image = self.store[key.pool[position]]
            source[: image.shape[0], : image.shape[1]] = image
        slots = torch.tensor([key.slots[position] for position in key.new], dtype=torch.int64)
        return replace(collate(rows, sources), plan=plan, slots=slots)

    def _sample(self, key: BatchKey, row: int, plan: Plan | None, out: np.ndarray | None) -> Sample:
        """Sample `row` of the batch; its image is `out`, or grey where it goes into a plan."""
        hyp, first = self.hyp, key.samples[row]
        rng = generator(self.seed, key.epoch, key.pool[first])
        share, views = 1.0, []
        if key.mosaic and rng.random() < hyp.mosaic:
            sample, view = self._mosaic(key, first, rng)
            views.append(view)
            if rng.random() < hyp.mixup:
                partner = int(rng.integers(len(key.pool)))
                second, view = self._mosaic(key, partner, rng)
                views.append(view)
                share = rng.beta(MIXUP_BETA, MIXUP_BETA)
                sample = mixup(sample, second, share)
        else:
            canvas = self._tile(key, first, key.shape)
            matrix = random_matrix(canvas.size, key.shape, rng, hyp)
            sample = affine(canvas, matrix, key.shape)
            left, top = self.store.on_canvas(key.pool[first], key.shape).offset
            height, width = self.store.shape(key.pool[first])
            views.append(View([first], (left + width, top + height), key.shape, matrix))
        gains = hsv_gains(rng, hyp)
        flips = [axis for axis in (1, 0) if rng.random() < (hyp.fliplr, hyp.flipud)[axis]]
        for axis in flips:
            sample = flip(sample, axis)
        if out is not None:
            sample = hsv(sample, gains, out)
        if plan is not None:
            for number, view in enumerate(views):
                plan.place(
                    row,
                    number,
                    tiles=[(key.slots[i], self.store.shape(key.pool[i])) for i in view.tiles],
                    centre=view.centre,
                    size=view.canvas,
                    inverse=inverse_of(view.matrix, key.shape, ud=1 in flips, lr=0 in flips),
                )
            plan.shares[row] = share
            plan.gains[row] = torch.from_numpy(gains)
        return sample

    def _mosaic(self, key: BatchKey, first: int, rng: np.random.Generator) -> tuple[Sample, View]:
        size, sides = self.store.size, (2 * self.store.size,) * 2
        tiles = rng.permutation([first, *rng.integers(len(key.pool), size=3)]).tolist()
        samples = [self._tile(key, position) for position in tiles]
        centre = mosaic_centre(size, rng)
        if self.hyp.copy_paste or self.hyp.perspective:
            canvas = copy_paste(mosaic4(samples, size, centre), rng, share=self.hyp.copy_paste)
            matrix = random_matrix(sides, key.shape, rng, self.hyp)
        else:
            matrix = random_matrix(sides, key.shape, rng, self.hyp)
            canvas = mosaic4(samples, size, centre, source_window(matrix, key.shape))
        image_id = samples[tiles.index(first)].image_id
        moved = affine(replace(canvas, image_id=image_id), matrix, key.shape)
        return moved, View(tiles, centre, sides, matrix)

    def _tile(self, key: BatchKey, position: int, canvas: tuple[int, int] | None = None) -> Sample:
        record = key.pool[position]
        if self.on_device:
            return to_sample(self.store, record, canvas, grey(self.store.shape(record)))
        image = self.store.recent(record, key.slots[position])
        return to_sample(self.store, record, canvas, image)


def to_sample(
    store: ImageStore, index: int, canvas: tuple[int, int] | None, image: np.ndarray
) -> Sample:
    """Record `index`, whose pixels at the store's scale are `image`, without its crowd regions.

    On a grey `canvas` (height, width) if given, in its centre, else without padding.
    """
    records, scale = store.records, store.scales[index]
    rows = records.rows(index)
    boxes, segments = records.boxes[rows], records.segments(rows)
    offset = (0, 0)
    if canvas is not None:
        place = store.on_canvas(index, canvas)
        offset, image = place.offset, grey(canvas) if is_grey(image) else place.apply(image)
    whole = Sample(
        image=image,
        boxes=boxes * scale + np.array(offset * 2, np.float32),
        labels=records.labels[rows],
        image_id=records.image_id(index),
        segments=scale_segments(whole_segments(boxes, segments), scale[:2], offset),
    )
    return keep(whole, ~records.crowd[rows])
