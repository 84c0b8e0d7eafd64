"""Batches for training and validation, made in worker processes."""

from __future__ import annotations

import atexit
import contextlib
import functools
import math
import multiprocessing
import multiprocessing.queues
import os
import signal
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from data.index.records import DataIndex, ImageRecord
from data.loading.pipeline import Augmentation, SampleKey, collate, fetch, padding
from data.loading.sample import Batch, Sample
from data.loading.store import ImageStore
from data.loading.transforms import letterbox
from utils.errors import DEAD_WORKER, FeatherDetError, UserError, cause_of
from utils.hyp import Hyperparameters
from utils.letterbox import Letterbox
from utils.seeding import generator
from utils.structures import Targets
from utils.terminal import warn

CACHES = ("none", "ram", "disk")
TOO_MANY_WORKERS = ".*worker processes in total"  # torch's warning; the user asked for that many
TOO_MANY_FILES = "Too many open files"
NO_ROOM = (
    "no room for a batch in /dev/shm: batches go through pipes, which is slower;"
    " docker run --shm-size 1g, a smaller batch or fewer --workers may help"
)
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


class _Loader:
    """torch's DataLoader for whole batches, with its failures as one-line errors.

    `make` turns one item of `keys` into samples and their letterboxes; it runs in the workers.
    Iterating raises UserError for a file that has become unreadable since the scan and
    FeatherDetError, naming the process, when a worker has died (torch may raise that between two
    batches as well: see dead_workers_named).
    """

    def __init__(self, make: _MakeBatch, keys: Any, config: LoaderConfig) -> None:
        self._keys = keys
        with _no_advice_on_workers():
            self._loader = DataLoader(
                _Batches(make),
                batch_size=None,  # a key is a whole batch
                sampler=keys,
                num_workers=config.workers,
                collate_fn=_unchanged,
                pin_memory=config.pin_memory,
                worker_init_fn=_start_worker,
                persistent_workers=config.workers > 0,
            )

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        return len(self._keys)

    def __iter__(self) -> Iterator[Batch]:
        with dead_workers_named():
            for item in _started(self._loader):
                if isinstance(item, _Failure):
                    raise UserError(item.message)
                yield item.open() if isinstance(item, _Parcel) else item


class TrainLoader(_Loader):
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
        super().__init__(_TrainBatch(recipe), self._sampler, config)

    def set_epoch(self, epoch: int, *, start_step: int = 0, mosaic: bool = True) -> None:
        """Choose what the next iteration delivers: batches start_step, ... of `epoch`."""
        if not 0 <= start_step <= len(self):
            raise ValueError(f"start_step {start_step} of an epoch of {len(self)} batches")
        self._sampler.epoch = epoch
        self._sampler.start_step = start_step
        self._sampler.mosaic = mosaic


class ValLoader(_Loader):
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
        super().__init__(make, batches, config)


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


_MakeBatch = Callable[[Any], tuple[list[Sample], list[Letterbox]]]


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


@dataclass(frozen=True)
class _Failure:
    """A user's error on its way out of a worker; torch would wrap an exception in a traceback."""

    message: str


@dataclass(frozen=True)
class _Parcel:
    """A batch on its way out of a worker: the images in shared memory where there is room.

    Everything else, and the images where there is no room (Docker gives /dev/shm 64 MB), goes
    through the worker's pipe.
    """

    images: Tensor | np.ndarray  # (B, H, W, 3) uint8
    targets: tuple[np.ndarray, ...]
    letterboxes: tuple[Letterbox, ...]
    image_ids: tuple[int | str, ...]

    def open(self) -> Batch:
        """The batch, in the process that asked for it."""
        if isinstance(self.images, np.ndarray):
            _warn_once(NO_ROOM)
        images = torch.as_tensor(self.images).permute(0, 3, 1, 2)
        targets = Targets(*map(torch.from_numpy, self.targets))
        return Batch(images, targets, self.letterboxes, self.image_ids)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (called by torch's DataLoader)."""
        return self.open().pin_memory()


class _Batches(Dataset):
    def __init__(self, make: _MakeBatch) -> None:
        self._make = make

    def __getitem__(self, keys: Any) -> Batch | _Parcel | _Failure:
        try:
            samples, letterboxes = self._make(keys)
        except UserError as error:
            return _Failure(str(error))
        if get_worker_info() is None:
            return collate(samples, letterboxes)
        shape = (len(samples), *samples[0].image.shape)
        try:
            memory: Tensor | np.ndarray = _shared_bytes(math.prod(shape)).view(shape)
        except RuntimeError:  # /dev/shm is full, read-only or missing
            memory = np.empty(shape, np.uint8)
        batch = collate(samples, letterboxes, out=np.asarray(memory))
        targets = (getattr(batch.targets, item.name).numpy() for item in fields(Targets))
        return _Parcel(memory, tuple(targets), batch.letterboxes, batch.image_ids)


def _shared_bytes(count: int) -> Tensor:
    """(count,) uint8 in shared memory, allocated as a whole: RuntimeError where it has no room."""
    empty = torch.empty(0, dtype=torch.uint8)
    return empty.set_(empty.untyped_storage()._new_shared(count))  # as torch's default_collate


@functools.cache
def _warn_once(text: str) -> None:
    warn(f"warning: {text}")


def _unchanged(batch: Any) -> Any:
    return batch


@contextlib.contextmanager
def _no_advice_on_workers() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=TOO_MANY_WORKERS)
        yield


def _started(loader: DataLoader) -> Iterator[Any]:
    """Begin an iteration; without worker processes where the system cannot start them."""
    with _no_advice_on_workers():
        if not loader.num_workers:
            return iter(loader)
        try:
            multiprocessing.Lock()  # what torch's queues need first: a semaphore in /dev/shm
            batches = iter(loader)
        except OSError as error:
            loader.num_workers = 0
            _warn_once(
                f"no loader processes ({error.strerror}): images are loaded in the main process,"
                " which is slower; docker run --shm-size 1g, ulimit -n 4096 or fewer --workers may"
                " help"
            )
            return iter(loader)
        _end_workers_at_exit()
        _WORKERS.update(batches._workers)  # type: ignore[attr-defined]  # of torch's iterator
        return batches


_WORKERS: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


@functools.cache
def _end_workers_at_exit() -> None:
    """Once: before multiprocessing waits for its children, which ignore its SIGTERM, end them."""
    atexit.register(_kill_workers)


def _kill_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report them as lost
    for worker in _WORKERS:
        worker.kill()


def _start_worker(number: int) -> None:
    cv2.setNumThreads(0)  # the processes are the parallelism
    for number in (signal.SIGINT, signal.SIGTERM):  # also sent to whole groups of processes
        signal.signal(number, signal.SIG_IGN)  # the parent decides when to stop
    # multiprocessing would print a traceback, drop the batch and leave the parent waiting
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_cannot_send)  # type: ignore[attr-defined]


def _cannot_send(error: Exception, batch: object) -> NoReturn:
    warn(f"loader process {os.getpid()}: a batch cannot be sent: {cause_of(error)}")
    os._exit(1)


@contextlib.contextmanager
def dead_workers_named() -> Iterator[None]:
    """Turn the RuntimeError that torch raises for a lost worker into a FeatherDetError.

    torch raises it wherever the program is when the signal comes.
    """
    try:
        yield
    except RuntimeError as error:
        if TOO_MANY_FILES in str(error):
            raise UserError(f"{TOO_MANY_FILES}: try ulimit -n 4096 or fewer --workers") from error
        dead = DEAD_WORKER.search(str(error))
        if dead is None:
            raise
        raise FeatherDetError(
            f"a process that loads images has died: {dead[0]}; fewer --workers, more memory or more"
            " shared memory (/dev/shm) may help"
        ) from error
