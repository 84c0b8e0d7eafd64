"""Batches for training and validation: which images, in which order, changed in which way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from data.index.records import DataIndex
from data.loading.geometry import scale_segments, whole_segments
from data.loading.sample import Sample
from data.loading.store import ImageStore
from data.loading.transforms import copy_paste, flip, hsv, keep, mixup, mosaic4, random_affine
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
    """Augmented batches, shuffled by (seed, epoch), the same for any number of workers.

    Every rank has the same number of batches and, batch by batch, the same number of images: the
    shuffled set is dealt out to the ranks in turn and begins again where the last ranks would
    miss one image.  The last batch of an epoch may be smaller.  With `rect` a batch has images of
    similar aspect on the smallest canvas that holds them all, without mosaic, and only the order
    of the batches is shuffled.  The letterboxes of the batches are identities, since an augmented
    image has no way back to one file.
    """

    def __init__(self, index: DataIndex, config: LoaderConfig, hyp: Hyperparameters) -> None:
        if not index.records:
            raise UserError("the training set has no usable image")
        store = ImageStore(index.records, config.image_size, cache=config.cache)
        self._sampler = _TrainSampler(store.shapes, config)
        super().__init__(
            Augmentation(store, hyp, config.seed),
            self._sampler,
            workers=config.workers,
            pin_memory=config.pin_memory,
        )

    def set_epoch(self, epoch: int, *, start_step: int = 0, mosaic: bool = True) -> None:
        """Choose what the next iteration delivers: batches start_step, ... of `epoch`."""
        if not 0 <= start_step <= len(self):
            raise ValueError(f"start_step {start_step} of an epoch of {len(self)} batches")
        self._sampler.epoch = epoch
        self._sampler.start_step = start_step
        self._sampler.mosaic = mosaic


class ValLoader(BatchLoader):
    """Letterboxed batches (area averages when shrinking), each image once, in a fixed order.

    Rank r has images r, r + world_size, ...  Square canvases, or with `rect` each image's own
    (Letterbox.rect), images of one canvas batched.  Crowd regions are not among the targets.
    """

    def __init__(self, index: DataIndex, config: LoaderConfig) -> None:
        size = config.image_size
        store = ImageStore(index.records, size, cache=config.cache, area=True)
        sources = [(record.height, record.width) for record in index.records]
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
            partial(_letterboxed, store, letterboxes),
            batches,
            workers=config.workers,
            pin_memory=config.pin_memory,
        )


def _letterboxed(
    store: ImageStore, letterboxes: Sequence[Letterbox], position: int
) -> tuple[Sample, Letterbox]:
    return fetch(store, position, letterboxes[position].dst), letterboxes[position]


class _TrainSampler:
    """The keys of each batch of this rank; set_epoch's choices are read when iteration begins."""

    def __init__(self, shapes: Sequence[tuple[int, int]], config: LoaderConfig) -> None:
        self.epoch = 0
        self.start_step = 0
        self.mosaic = True
        self._config = config
        self._sizes = np.array(shapes)

    def __len__(self) -> int:
        return math.ceil(len(self._sizes) / (self._config.batch_size * self._config.world_size))

    def __iter__(self) -> Iterator[list[SampleKey]]:
        config, epoch, mosaic = self._config, self.epoch, self.mosaic and not self._config.rect
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
        for batch in batches[self.start_step :]:
            if config.rect:
                sides = np.ceil(self._sizes[batch].max(0) / config.stride) * config.stride
                shape = int(sides[0]), int(sides[1])
            mine = batch[config.rank :: config.world_size]
            yield [SampleKey(epoch, int(index), mosaic, shape) for index in mine]


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
