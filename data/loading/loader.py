"""Batches for training and validation: which images, in which order, changed in which way."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.index.records import DataIndex
from data.loading.geometry import scale_segments, whole_segments
from data.loading.sample import Batch, Sample
from data.loading.store import ImageStore
from data.loading.transforms import (
    affine,
    copy_paste,
    flip,
    hsv,
    keep,
    mixup,
    mosaic4,
    mosaic_centre,
    random_affine,
    random_matrix,
    source_window,
)
from data.loading.workers import BatchLoader
from utils.boxes import Letterbox
from utils.errors import UserError
from utils.hyp import Hyperparameters
from utils.seeding import generator

SHUFFLE = 1  # purpose of a generator, next to (seed, epoch, index) of the samples


@dataclass(frozen=True)
class LoaderConfig:
    """How images become batches. `batch_size` is per rank, `pin_memory` for CUDA devices only."""

    image_size: int  # a multiple of `stride`
    batch_size: int
    stride: int  # the detector's maximum
    workers: int
    seed: int
    rank: int = 0
    world_size: int = 1
    rect: bool = False
    cache: str = "none"  # or ram, disk: see ImageStore
    pin_memory: bool = False


class TrainLoader(BatchLoader):
    """A stream of augmented batches, shuffled by (seed, epoch), the same for any number of workers.

    Every rank has the same number of batches and, batch by batch, the same number of images: the
    shuffled set is dealt out to the ranks in turn and begins again where the last ranks would
    miss one image.  The last batch of an epoch may be smaller.  With `rect` a batch has images of
    similar aspect on the smallest canvas that holds them all, without mosaic, and only the order
    of the batches is shuffled.  The letterboxes of the batches are identities, since an augmented
    image has no way back to one file.

    Workers go on with the next epoch, up to `epochs`, while the caller is still busy with this one
    or its validation: two batches each.  From epoch `mosaic_epochs` on there are no mosaics.
    """

    def __init__(
        self,
        index: DataIndex,
        config: LoaderConfig,
        hyp: Hyperparameters,
        *,
        epochs: float = math.inf,
        mosaic_epochs: float = math.inf,
    ) -> None:
        if not index.records:
            raise UserError("the training set has no usable image")
        store = ImageStore(index.records, config.image_size, cache=config.cache)
        self._sampler = _TrainSampler(store.shapes, config, epochs, mosaic_epochs)
        self._next: tuple[int, int] | None = None  # epoch and step that the stream has next
        super().__init__(
            Augmentation(store, hyp, config.seed),
            self._sampler,
            workers=config.workers,
            pin_memory=config.pin_memory,
        )

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches start_step, ... of `epoch`.

        From the stream where it has just these next, otherwise a new stream begins with them.
        """
        if not 0 <= start_step <= len(self):
            raise ValueError(f"start_step {start_step} of an epoch of {len(self)} batches")
        for step in range(start_step, len(self)):
            if self._next != (epoch, step):
                self._sampler.start = epoch, step
                self._stream = self._start()
            self._next = None  # until the stream has delivered
            batch = next(self._stream)
            self._next = (epoch, step + 1) if step + 1 < len(self) else (epoch + 1, 0)
            yield batch


class ValLoader(BatchLoader):
    """Letterboxed batches (area averages when shrinking), each image once, in a fixed order.

    Rank r has images r, r + world_size, ...  Square canvases, or with `rect` each image's own
    (Letterbox.rect), images of one canvas batched.  Crowd regions are not among the targets.
    """

    def __init__(self, index: DataIndex, config: LoaderConfig) -> None:
        size = config.image_size
        store = ImageStore(index.records, size, cache=config.cache, area=True)
        sources = [(height, width) for height, width in store.records.sizes.tolist()]
        if config.rect:
            letterboxes = [Letterbox.rect(source, size, config.stride) for source in sources]
        else:
            letterboxes = [Letterbox(source, (size, size)) for source in sources]
        groups: dict[tuple[int, int], list[int]] = {}
        for position in range(config.rank, len(sources), config.world_size):
            groups.setdefault(letterboxes[position].dst, []).append(position)
        batches = [
            group[start : start + config.batch_size]
            for _, group in sorted(groups.items())
            for start in range(0, len(group), config.batch_size)
        ]
        super().__init__(
            functools.partial(_letterboxed, store, letterboxes),
            batches,
            workers=config.workers,
            pin_memory=config.pin_memory,
        )


def _letterboxed(
    store: ImageStore, letterboxes: Sequence[Letterbox], positions: Sequence[int]
) -> Iterator[tuple[Sample, Letterbox]]:
    for position in positions:
        letterbox = letterboxes[position]
        yield to_sample(store, position, letterbox.dst), letterbox


class _TrainSampler:
    """The key of each batch of this rank, from `start` (epoch, step) to the end of the epochs."""

    def __init__(
        self,
        shapes: np.ndarray,
        config: LoaderConfig,
        epochs: float,
        mosaic_epochs: float,
    ) -> None:
        self.start = 0, 0
        self._config = config
        self._sizes = shapes
        self._epochs = epochs
        self._mosaic_epochs = 0 if config.rect else mosaic_epochs

    def __len__(self) -> int:
        return math.ceil(len(self._sizes) / (self._config.batch_size * self._config.world_size))

    def __iter__(self) -> Iterator[BatchKey]:
        epoch, step = self.start
        while epoch < self._epochs:
            yield from self._epoch(epoch, step)
            epoch, step = epoch + 1, 0

    def _epoch(self, epoch: int, start_step: int) -> Iterator[BatchKey]:
        config, mosaic = self._config, epoch < self._mosaic_epochs
        rng = generator(config.seed, epoch, 0, SHUFFLE)
        images = len(self._sizes)
        padded = math.ceil(images / config.world_size) * config.world_size
        step = config.batch_size * config.world_size
        if config.rect:
            by_aspect = np.argsort(self._sizes[:, 0] / self._sizes[:, 1], kind="stable")
            order = np.pad(by_aspect, (0, padded - images), mode="edge")
        else:
            order = np.resize(rng.permutation(images), padded)
        batches = [order[start : start + step] for start in range(0, padded, step)]
        if config.rect:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        shape = (config.image_size, config.image_size)
        for step in range(start_step, len(batches)):
            batch = batches[step]
            if config.rect:
                sides = np.ceil(self._sizes[batch].max(0) / config.stride) * config.stride
                shape = int(sides[0]), int(sides[1])
            mine = tuple(batch[config.rank :: config.world_size].tolist())
            yield BatchKey(epoch, mine, mosaic, shape)


@dataclass(frozen=True)
class BatchKey:
    """Everything that determines one training batch, so that no worker's state does."""

    epoch: int
    indices: tuple[int, ...]  # in DataIndex.records: an image of each sample
    mosaic: bool  # whether mosaics are allowed at all
    shape: tuple[int, int]  # (height, width) of the result

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class Augmentation:
    """YOLOv5's training recipe: BatchKey -> samples.

    With probability hyp.mosaic a mosaic of the image and three others at random, with copy-paste,
    random affine, and with probability hyp.mixup a blend with a second mosaic; otherwise the
    letterboxed image and the affine.  Then HSV and flips.  All draws come from
    (seed, epoch, index).
    """

    store: ImageStore
    hyp: Hyperparameters
    seed: int

    def __call__(self, key: BatchKey) -> Iterator[tuple[Sample, Letterbox]]:
        """Augmented samples of key.shape; their letterboxes are identities.

        Raises UserError when a file has become unreadable.
        """
        for index in key.indices:
            yield self._sample(key, index), Letterbox(key.shape, key.shape)

    def _sample(self, key: BatchKey, index: int) -> Sample:
        rng = generator(self.seed, key.epoch, index)
        if key.mosaic and rng.random() < self.hyp.mosaic:
            sample = self._mosaic(key, index, rng)
            if rng.random() < self.hyp.mixup:
                partner = int(rng.integers(len(self.store.records)))
                sample = mixup(sample, self._mosaic(key, partner, rng), rng)
        else:
            sample = to_sample(self.store, index, key.shape)
            sample = random_affine(sample, key.shape, rng, self.hyp)
        sample = hsv(sample, rng, self.hyp)
        if rng.random() < self.hyp.flipud:
            sample = flip(sample, 1)
        if rng.random() < self.hyp.fliplr:
            sample = flip(sample, 0)
        return sample

    def _mosaic(self, key: BatchKey, first: int, rng: np.random.Generator) -> Sample:
        size, sides = self.store.size, (2 * self.store.size,) * 2
        others = rng.integers(len(self.store.records), size=3)
        samples = [to_sample(self.store, i) for i in rng.permutation([first, *others]).tolist()]
        centre = mosaic_centre(size, rng)
        if self.hyp.copy_paste or self.hyp.perspective:
            canvas = copy_paste(mosaic4(samples, size, centre), rng, share=self.hyp.copy_paste)
            matrix = random_matrix(sides, key.shape, rng, self.hyp)
        else:
            matrix = random_matrix(sides, key.shape, rng, self.hyp)
            canvas = mosaic4(samples, size, centre, source_window(matrix, key.shape))
        canvas = replace(canvas, image_id=self.store.records[first].image_id)
        return affine(canvas, matrix, key.shape)


def to_sample(store: ImageStore, index: int, canvas: tuple[int, int] | None = None) -> Sample:
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
