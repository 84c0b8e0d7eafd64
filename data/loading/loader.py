"""Batches for training and validation from worker processes."""

from __future__ import annotations

import atexit
import contextlib
import functools
import math
import multiprocessing
import re
import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.index.records import DataIndex
from data.loading.pipeline import Augmentation, SampleKey, collate, fetch, padding
from data.loading.sample import Batch
from data.loading.store import ImageStore
from data.loading.transforms import letterbox
from utils.errors import FeatherDetError, UserError
from utils.hyp import Hyperparameters
from utils.letterbox import Letterbox
from utils.seeding import generator

CACHES = ("none", "ram", "disk")
DEAD_WORKER = re.compile(r"worker \(pid.*")  # torch's words; its text after the line is advice
TOO_MANY_WORKERS = ".*worker processes in total"
SHUFFLE = 1  # purpose of a generator, beside (seed, epoch, index) of the samples


@dataclass(frozen=True)
class LoaderConfig:
    """How images become batches. `batch_size` is per rank."""

    image_size: int
    batch_size: int
    stride: int  # the detector's largest
    workers: int
    seed: int
    rank: int = 0
    world_size: int = 1
    rect: bool = False
    cache: str = "none"

    def __post_init__(self) -> None:
        for name in ("image_size", "batch_size", "stride", "world_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.image_size % self.stride:
            raise ValueError(f"image size {self.image_size} is no multiple of {self.stride}")
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} of {self.world_size}")
        if self.cache not in CACHES:
            raise ValueError(f"cache must be one of {', '.join(CACHES)}, got {self.cache!r}")


class TrainLoader:
    """Augmented batches, shuffled by (seed, epoch), the same for any number of workers.

    Every rank has the same number of batches and, batch by batch, the same number of images: the
    shuffled set is dealt out to the ranks in turn and begins again where the last ranks would
    miss one image.  The last batch of an epoch may be smaller.  With `rect` a batch has images of
    like aspect on the least canvas that holds them all, without mosaic, and only the order of the
    batches is shuffled.  The letterboxes of the batches are identities, since an augmented image
    has no way back to one file.

    Iterating raises UserError for a file that has become unreadable since the scan and
    FeatherDetError, naming the process, when a worker has died (between two batches torch sees it,
    too: see dead_workers_named).
    """

    def __init__(self, index: DataIndex, config: LoaderConfig, hyp: Hyperparameters) -> None:
        if not index.records:
            raise UserError("the training set has no usable image")
        records = index.records
        store = ImageStore(
            records, config.image_size, cache=config.cache, processes=config.world_size
        )
        self._sampler = _TrainSampler(store, len(records), config)
        recipe = Augmentation(records, store, hyp, config.image_size, config.seed)
        self._loader = _data_loader(_TrainSet(recipe), self._sampler, config.workers)

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        return len(self._sampler)

    def set_epoch(self, epoch: int, *, start_step: int = 0, mosaic: bool = True) -> None:
        """Choose what the next iteration delivers: batches start_step, ... of `epoch`."""
        if not 0 <= start_step <= len(self):
            raise ValueError(f"start_step {start_step} of an epoch of {len(self)} batches")
        self._sampler.epoch = epoch
        self._sampler.start_step = start_step
        self._sampler.mosaic = mosaic

    def __iter__(self) -> Iterator[Batch]:
        return _deliver(self._loader)


class ValLoader:
    """Letterboxed batches (area averages when shrinking), each image once, in a fixed order.

    Rank r has images r, r + world_size, ...  Square canvases, or with `rect` each image's own
    (Letterbox.rect), images of one canvas batched.  Crowd regions are not among the targets.
    """

    def __init__(self, index: DataIndex, config: LoaderConfig) -> None:
        dataset = _ValSet(index, config)
        mine = range(config.rank, len(index.records), config.world_size)
        groups: dict[tuple[int, int], list[int]] = {}
        for position in mine:
            groups.setdefault(dataset.letterbox(position).dst, []).append(position)
        self._batches = [
            group[start : start + config.batch_size]
            for _, group in sorted(groups.items())
            for start in range(0, len(group), config.batch_size)
        ]
        self._loader = _data_loader(dataset, self._batches, config.workers)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return _deliver(self._loader)


def val_batches(index: DataIndex, config: LoaderConfig) -> ValLoader:
    """The batches of a split for the evaluator; can be iterated any number of times."""
    return ValLoader(index, config)


@dataclass(frozen=True)
class _Failure:
    """A user's error on its way out of a worker; torch would wrap an exception in a traceback."""

    message: str


class _TrainSet(Dataset):
    def __init__(self, recipe: Augmentation) -> None:
        self._recipe = recipe

    def __getitem__(self, keys: Sequence[SampleKey]) -> Batch | _Failure:
        try:
            samples = [self._recipe(key) for key in keys]
        except UserError as error:
            return _Failure(str(error))
        return collate(samples, [Letterbox(key.shape, key.shape) for key in keys])


class _ValSet(Dataset):
    def __init__(self, index: DataIndex, config: LoaderConfig) -> None:
        self._records = index.records
        self._config = config
        self._store = ImageStore(
            index.records,
            config.image_size,
            cache=config.cache,
            area=True,
            processes=config.world_size,
        )

    def letterbox(self, position: int) -> Letterbox:
        """From the file's pixels to the network's."""
        record, size = self._records[position], self._config.image_size
        source = (record.height, record.width)
        if self._config.rect:
            return Letterbox.rect(source, size, self._config.stride)
        return Letterbox.square(source, size)

    def __getitem__(self, positions: Sequence[int]) -> Batch | _Failure:
        letterboxes = [self.letterbox(position) for position in positions]
        try:
            scaled = [fetch(self._records, self._store, position) for position in positions]
        except UserError as error:
            return _Failure(str(error))
        samples = [
            letterbox(sample, padding(sample.size, geometry.dst))
            for sample, geometry in zip(scaled, letterboxes, strict=True)
        ]
        return collate(samples, letterboxes)


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
        if not config.rect:
            order = np.resize(rng.permutation(self._images), padded)
            return self._cut(order)
        by_aspect = np.argsort(self._sizes[:, 0] / self._sizes[:, 1], kind="stable")
        batches = self._cut(np.pad(by_aspect, (0, padded - self._images), mode="edge"))
        return [batches[place] for place in rng.permutation(len(batches))]

    def _cut(self, order: np.ndarray) -> list[np.ndarray]:
        step = self._config.batch_size * self._config.world_size
        return [order[start : start + step] for start in range(0, len(order), step)]

    def _shape(self, batch: np.ndarray) -> tuple[int, int]:
        if not self._config.rect:
            return self._config.image_size, self._config.image_size
        stride = self._config.stride
        height, width = (math.ceil(side / stride) * stride for side in self._sizes[batch].max(0))
        return height, width


def _data_loader(dataset: Dataset, batches: Any, workers: int) -> DataLoader:
    if workers:
        _end_workers_at_exit()
    with warnings.catch_warnings():
        # the user has asked for that many; torch would warn of more than there are cores
        warnings.filterwarnings("ignore", message=TOO_MANY_WORKERS)
        return DataLoader(
            dataset,
            batch_size=None,  # a key of the sampler is a whole batch
            sampler=batches,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_start_worker,
            persistent_workers=workers > 0,
        )


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(number: int) -> None:
    cv2.setNumThreads(0)  # the processes are the parallelism
    for number in (signal.SIGINT, signal.SIGTERM):  # also sent to whole groups of processes
        signal.signal(number, signal.SIG_IGN)  # the parent says when to stop


@functools.cache
def _end_workers_at_exit() -> None:
    """Once: before multiprocessing waits for its children, which ignore its SIGTERM, end them."""
    atexit.register(_kill_workers)


def _kill_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report them as lost
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _deliver(loader: DataLoader) -> Iterator[Batch]:
    """The loader's batches, with its failures as one-line errors."""
    with dead_workers_named():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=TOO_MANY_WORKERS)
            batches = iter(loader)
        for batch in batches:
            if isinstance(batch, _Failure):
                raise UserError(batch.message)
            yield batch


@contextlib.contextmanager
def dead_workers_named() -> Iterator[None]:
    """Turn the RuntimeError that torch raises for a killed worker into a FeatherDetError.

    torch raises it at whatever place the program is when the signal comes.
    """
    try:
        yield
    except RuntimeError as error:
        dead = DEAD_WORKER.search(str(error))
        if dead is None:
            raise
        raise FeatherDetError(
            f"a process that loads images has died: {dead[0]}; fewer --workers, more memory or more"
            " shared memory (/dev/shm) may help"
        ) from error
