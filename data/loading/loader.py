"""Batches for training and validation: which images, in which order, on which canvas."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from data.index.records import DataIndex, ImageRecord
from data.loading.pipeline import Augmentation, SampleKey, fetch, padding
from data.loading.sample import Sample
from data.loading.store import ImageStore
from data.loading.transforms import letterbox
from data.loading.workers import BatchLoader
from utils.errors import UserError
from utils.hyp import Hyperparameters
from utils.letterbox import Letterbox
from utils.seeding import generator

CACHES = ("none", "ram", "disk")
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
    cache: str = "none"  # one of CACHES
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
        recipe = Augmentation(index.records, store, hyp, config.image_size, config.seed)
        self._sampler = _TrainSampler(store, len(index.records), config)
        super().__init__(
            _TrainBatch(recipe),
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
        store = ImageStore(index.records, config.image_size, cache=config.cache, area=True)
        make = _ValBatch(index.records, store, config)
        groups: dict[tuple[int, int], list[int]] = {}
        for position in range(config.rank, len(index.records), config.world_size):
            groups.setdefault(make.letterbox(position).dst, []).append(position)
        batches = [
            group[start : start + config.batch_size]
            for _, group in sorted(groups.items())
            for start in range(0, len(group), config.batch_size)
        ]
        super().__init__(make, batches, workers=config.workers, pin_memory=config.pin_memory)


@dataclass(frozen=True)
class _TrainBatch:
    recipe: Augmentation

    def __call__(self, keys: Sequence[SampleKey]) -> tuple[list[Sample], list[Letterbox]]:
        samples = [self.recipe(key) for key in keys]
        return samples, [Letterbox(key.shape, key.shape) for key in keys]


@dataclass(frozen=True)
class _ValBatch:
    records: Sequence[ImageRecord]
    store: ImageStore
    config: LoaderConfig

    def letterbox(self, position: int) -> Letterbox:
        """From the file's pixels to the network's."""
        record, size = self.records[position], self.config.image_size
        source = (record.height, record.width)
        if self.config.rect:
            return Letterbox.rect(source, size, self.config.stride)
        return Letterbox.square(source, size)

    def __call__(self, positions: Sequence[int]) -> tuple[list[Sample], list[Letterbox]]:
        letterboxes = [self.letterbox(position) for position in positions]
        scaled = [fetch(self.records, self.store, position) for position in positions]
        samples = [
            letterbox(sample, padding(sample.size, geometry.dst))
            for sample, geometry in zip(scaled, letterboxes, strict=True)
        ]
        return samples, letterboxes


class _TrainSampler(Sampler):
    """The keys of each batch of this rank; set_epoch's choices are read when iteration begins."""

    def __init__(self, store: ImageStore, images: int, config: LoaderConfig) -> None:
        self.epoch = 0
        self.start_step = 0
        self.mosaic = True
        self._config = config
        self._images = images
        self._sizes = np.array([store.geometry(i).dst for i in range(images)])

    def __len__(self) -> int:
        return math.ceil(self._images / (self._config.batch_size * self._config.world_size))

    def __iter__(self) -> Iterator[list[SampleKey]]:
        config, epoch = self._config, self.epoch
        mosaic = self.mosaic and not config.rect
        for batch in self._global_batches()[self.start_step :]:
            shape = self._shape(batch)
            mine = batch[config.rank :: config.world_size]
            yield [SampleKey(epoch, int(index), mosaic, shape) for index in mine]

    def _global_batches(self) -> list[np.ndarray]:
        config = self._config
        rng = generator(config.seed, self.epoch, 0, SHUFFLE)
        padded = math.ceil(self._images / config.world_size) * config.world_size
        step = config.batch_size * config.world_size
        if config.rect:
            by_aspect = np.argsort(self._sizes[:, 0] / self._sizes[:, 1], kind="stable")
            order = np.pad(by_aspect, (0, padded - self._images), mode="edge")
        else:
            order = np.resize(rng.permutation(self._images), padded)
        batches = [order[start : start + step] for start in range(0, len(order), step)]
        return [batches[i] for i in rng.permutation(len(batches))] if config.rect else batches

    def _shape(self, batch: np.ndarray) -> tuple[int, int]:
        if not self._config.rect:
            return self._config.image_size, self._config.image_size
        stride = self._config.stride
        height, width = (math.ceil(side / stride) * stride for side in self._sizes[batch].max(0))
        return height, width
