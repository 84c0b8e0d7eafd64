"""Batches for training and validation: which images, in which order, changed in which way."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

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
    random_affine,
    random_matrix,
    source_window,
)
from data.loading.workers import BatchLoader
from utils.boxes import Letterbox
from utils.errors import UserError
from utils.hyp import Hyperparameters
from utils.seeding import generator

SHUFFLE, INVITE = 1, 2  # purposes of generators, next to (seed, epoch, index) of the samples
GUESTS = 8  # images per batch that are drawn for its mosaics: enough for one sample and its mixup


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
        yield to_sample(store, position, store[position], letterbox.dst), letterbox


class _TrainSampler:
    """The key of each batch of this rank, from `start` (epoch, step) to the end of the epochs."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        config: LoaderConfig,
        epochs: float,
        mosaic_epochs: float,
    ) -> None:
        self.start = 0, 0
        self._config = config
        self._sizes = np.array(shapes)
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
            rng = generator(config.seed, epoch, step * config.world_size + config.rank, INVITE)
            guests = tuple(rng.integers(images, size=GUESTS if mosaic else 0).tolist())
            yield BatchKey(epoch, mine, guests, mosaic, shape)


@dataclass(frozen=True)
class BatchKey:
    """Everything that determines one training batch, so that no worker's state does."""

    epoch: int
    indices: tuple[int, ...]  # in DataIndex.records: an image of each sample
    guests: tuple[int, ...]  # further images that its mosaics may have
    mosaic: bool  # whether mosaics are allowed at all
    shape: tuple[int, int]  # (height, width) of the result

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class Augmentation:
    """YOLOv5's training recipe: BatchKey -> samples.

    With probability hyp.mosaic a mosaic of the image and three others, with copy-paste, random
    affine, and with probability hyp.mixup a blend with a second mosaic; otherwise the letterboxed
    image and the affine.  Then HSV and flips.  All draws come from (seed, epoch, index).

    Every file is decoded once per batch: the others are images of the same batch and its guests
    (YOLOv5 takes any of the set, and decodes four files per sample).
    """

    store: ImageStore
    hyp: Hyperparameters
    seed: int
    _recent: dict[int, np.ndarray] = field(default_factory=dict)

    def __call__(self, key: BatchKey) -> Iterator[tuple[Sample, Letterbox]]:
        """Augmented samples of key.shape; their letterboxes are identities.

        Raises UserError when a file has become unreadable.
        """

        @functools.cache
        def source(index: int, canvas: tuple[int, int] | None = None) -> Sample:
            image = self._image(index, len(key) + GUESTS)
            return to_sample(self.store, index, image, canvas)

        for index in key.indices:
            yield self._sample(key, index, source), Letterbox(key.shape, key.shape)

    def _image(self, index: int, limit: int) -> np.ndarray:
        """The image from the store; the last `limit` ones are kept."""
        image = self._recent.pop(index, None)
        if image is None:
            if len(self._recent) >= limit:  # its memory is taken for the new one
                del self._recent[next(iter(self._recent))]
            image = self.store[index]
        self._recent[index] = image
        return image

    def _sample(self, key: BatchKey, index: int, source: Callable[..., Sample]) -> Sample:
        rng = generator(self.seed, key.epoch, index)
        if key.mosaic and rng.random() < self.hyp.mosaic:
            sample = self._mosaic(key, index, source, rng)
            if rng.random() < self.hyp.mixup:
                (partner,) = _others(key, index, 1, rng)
                sample = mixup(sample, self._mosaic(key, partner, source, rng), rng)
        else:
            sample = random_affine(source(index, key.shape), key.shape, rng, self.hyp)
        sample = hsv(sample, rng, self.hyp)
        if rng.random() < self.hyp.flipud:
            sample = flip(sample, 1)
        if rng.random() < self.hyp.fliplr:
            sample = flip(sample, 0)
        return sample

    def _mosaic(
        self, key: BatchKey, first: int, source: Callable[..., Sample], rng: np.random.Generator
    ) -> Sample:
        size, side = self.store.size, 2 * self.store.size
        indices = rng.permutation([first, *_others(key, first, 3, rng)]).tolist()
        matrix = random_matrix((side, side), key.shape, rng, self.hyp)
        whole = self.hyp.copy_paste or self.hyp.perspective
        seen = None if whole else source_window(matrix, key.shape)
        canvas = mosaic4([source(index) for index in indices], size, rng, seen)
        canvas = replace(canvas, image_id=self.store.records[first].image_id)
        canvas = copy_paste(canvas, rng, share=self.hyp.copy_paste)
        return affine(canvas, matrix, key.shape)


def _others(key: BatchKey, index: int, count: int, rng: np.random.Generator) -> list[int]:
    """`count` images of the batch and its guests but `index`, none twice where there are enough."""
    others = sorted({*key.indices, *key.guests} - {index}) or [index]
    return rng.choice(others, count, replace=len(others) < count).tolist()


def to_sample(
    store: ImageStore, index: int, image: np.ndarray, canvas: tuple[int, int] | None = None
) -> Sample:
    """Record `index` with its stored `image`, without its crowd regions.

    On a grey `canvas` (height, width) if given, in its centre, else without padding.
    """
    record, geometry = store.records[index], store.geometry(index)
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
