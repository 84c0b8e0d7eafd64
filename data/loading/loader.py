"""Batches for training and validation: which images, in which order, changed in which way."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.index.records import DataIndex
from data.loading.augment import Augmentation, BatchKey, to_sample
from data.loading.memory import Allocate
from data.loading.sample import Batch
from data.loading.store import ImageStore
from data.loading.workers import BatchLoader, stack
from utils.boxes import Letterbox
from utils.errors import UserError
from utils.hyp import Hyperparameters
from utils.seeding import generator

SHUFFLE = 1  # purpose of a generator, next to (seed, epoch, index) of the samples
POOL = 256  # samples; a mosaic takes images of these last ones, so that each is decoded once


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
    fill: bool = False  # the last batch of an epoch up with images from its beginning
    cache: str = "none"  # or auto, ram, disk, device: see choose_cache
    pin_memory: bool = False
    on_device: bool = False  # batches are for a DeviceImages, see augment
    device_memory: int = 0  # bytes that it may take for all training images


class TrainLoader(BatchLoader):
    """A stream of augmented batches, shuffled by (seed, epoch), the same for any number of workers.

    Every rank has the same number of batches and, batch by batch, the same number of images: the
    shuffled set is dealt out to the ranks in turn and begins again where the last ranks would
    miss one image.  The last batch of an epoch may be smaller, unless `fill`.  With `rect` a batch
    has images of similar aspect on the smallest canvas that holds them all, without mosaic, and
    only the order of the batches is shuffled.  The letterboxes of the batches are identities, since
    an augmented image has no way back to one file.

    Mosaics take images of the last POOL samples of this rank, or of the whole set where it has no
    more.  These are shared between workers, so that each image is decoded about once per epoch.

    Workers go on with the next epoch, up to `epochs`, while the caller is still busy with this one
    or its validation: two batches each.  From epoch `mosaic_epochs` on there are no mosaics.

    With `config.on_device` the batches are for a DeviceImages of `slots` images; some have no
    sample, only images for later ones.
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
        images = len(index.records)
        pool = max(POOL, config.batch_size)
        if config.rect or math.ceil(images / config.world_size) <= pool:
            pool = images
        # batches in the making must not fill a slot that another of them still reads
        ahead = 0 if config.on_device else 2 * config.workers
        slots = images if pool == images else pool + ahead * config.batch_size
        store = ImageStore(
            index.records,
            config.image_size,
            cache=config.cache,
            recent=0 if config.on_device or config.rect else slots,
            device_memory=config.device_memory,
        )
        self.cache_line = store.cache_line
        self.slots = images if store.cache == "device" else slots
        self._sampler = _TrainSampler(store.shapes, config, pool=pool, slots=self.slots)
        self._sampler.epochs = epochs
        self._sampler.mosaic_epochs = 0 if config.rect else mosaic_epochs
        self._next: tuple[int, int] | None = None  # epoch and step that the stream has next
        super().__init__(
            Augmentation(store, hyp, config.seed, on_device=config.on_device),
            self._sampler,
            size=3 * config.batch_size * config.image_size**2,
            workers=config.workers,
            pin_memory=config.pin_memory,
        )

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches start_step, ... of `epoch`.

        From the stream where it has just these next, otherwise a new stream begins with them.
        """
        if not 0 <= start_step <= len(self):
            raise ValueError(f"start_step {start_step} of an epoch of {len(self)} batches")
        step = start_step
        while step < len(self):
            if self._next != (epoch, step):
                self._sampler.start = epoch, step
                self._stream = self._start()
            self._next = None  # until the stream has delivered
            batch = next(self._stream)
            step += len(batch) > 0
            self._next = (epoch, step) if step < len(self) else (epoch + 1, 0)
            yield batch


class ValLoader(BatchLoader):
    """Letterboxed batches (area averages when shrinking), each image once, in a fixed order.

    Rank r has images r, r + world_size, ...  Square canvases, or with `rect` each image's own
    (Letterbox.rect), images of one canvas batched.  Crowd regions are not among the targets.
    """

    def __init__(self, index: DataIndex, config: LoaderConfig) -> None:
        size = config.image_size
        cache = "auto" if config.cache == "device" else config.cache
        store = ImageStore(index.records, size, cache=cache, area=True)
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
            size=3 * config.batch_size * max((math.prod(i.dst) for i in letterboxes), default=0),
            workers=config.workers,
            pin_memory=config.pin_memory,
        )


def _letterboxed(
    store: ImageStore,
    letterboxes: Sequence[Letterbox],
    positions: Sequence[int],
    allocate: Allocate,
) -> Batch:
    rows = ((to_sample(store, i, letterboxes[i].dst, store[i]), letterboxes[i]) for i in positions)
    return stack(rows, len(positions), allocate)


class _TrainSampler:
    """The key of each batch of this rank, from `start` (epoch, step) to the end of the epochs.

    Mosaics take images of the last `pool` samples, or of the whole set if it has no more.  `slots`
    says how many of the last images are kept, each sample's at the next slot; those of a whole set
    have their own numbers.
    """

    def __init__(self, shapes: np.ndarray, config: LoaderConfig, *, pool: int, slots: int) -> None:
        self.start = 0, 0
        self.epochs = self.mosaic_epochs = math.inf
        self._sizes = shapes
        self._config = config
        self._pool, self._slots = pool, slots
        self._share = math.ceil(len(shapes) / config.world_size)  # images of this rank
        if config.fill:
            self._share = math.ceil(self._share / config.batch_size) * config.batch_size

    def __len__(self) -> int:
        return math.ceil(self._share / self._config.batch_size)

    def __iter__(self) -> Iterator[BatchKey]:
        keys = self._keys()
        return self._with_images(keys) if self._config.on_device else keys

    def _keys(self) -> Iterator[BatchKey]:
        (epoch, step), every = self.start, range(len(self._sizes))
        recent = np.empty(0, np.int64)  # images of the last samples
        if self._pool < len(every):
            before = [*(self._batches(epoch - 1) if epoch else ()), *self._batches(epoch)[:step]]
            recent = np.concatenate([recent, *(images for images, _ in before)])
        end = epoch * self._share + step * self._config.batch_size  # samples up to there
        while epoch < self.epochs:
            mosaic = epoch < self.mosaic_epochs
            for images, shape in self._batches(epoch)[step:]:
                if self._pool == len(every):
                    yield BatchKey(epoch, images.tolist(), every, every, mosaic, shape)
                    continue
                recent = np.append(recent, images)[-self._pool :]
                end += len(images)
                slots = np.arange(end - len(recent), end) % self._slots
                if self._slots == len(every):
                    slots = recent
                samples = range(len(recent) - len(images), len(recent))
                yield BatchKey(epoch, samples, recent.tolist(), slots.tolist(), mosaic, shape)
            epoch, step = epoch + 1, 0

    def _with_images(self, keys: Iterator[BatchKey]) -> Iterator[BatchKey]:
        """Name the images that the device lacks; before a batch that needs many come others."""
        kept: dict[int, int] = {}  # slot: image
        size = self._config.batch_size
        for key in keys:
            pairs = zip(key.slots, key.pool, strict=True)
            new = [i for i, (slot, image) in enumerate(pairs) if kept.get(slot) != image]
            kept.update((key.slots[i], key.pool[i]) for i in new)
            while len(new) > size:
                yield replace(key, samples=(), new=new[:size])
                new = new[size:]
            yield replace(key, new=new)

    def _batches(self, epoch: int) -> list[tuple[np.ndarray, tuple[int, int]]]:
        """The images of each batch, and the (height, width) of the result."""
        config = self._config
        rng = generator(config.seed, epoch, 0, SHUFFLE)
        step = config.batch_size * config.world_size
        padded = self._share * config.world_size
        if config.rect:
            by_aspect = np.argsort(self._sizes[:, 0] / self._sizes[:, 1], kind="stable")
            order = np.pad(by_aspect, (0, padded - len(by_aspect)), mode="edge")
        else:
            order = np.resize(rng.permutation(len(self._sizes)), padded)
        batches = [order[start : start + step] for start in range(0, padded, step)]
        shapes = [(config.image_size, config.image_size)] * len(batches)
        if config.rect:
            batches = [batches[i] for i in rng.permutation(len(batches))]
            for number, batch in enumerate(batches):
                sides = np.ceil(self._sizes[batch].max(0) / config.stride) * config.stride
                shapes[number] = int(sides[0]), int(sides[1])
        mine = (batch[config.rank :: config.world_size] for batch in batches)
        return list(zip(mine, shapes, strict=True))
