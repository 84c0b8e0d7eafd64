"""torch's worker processes for whole batches, with their failures as one-line errors."""

from __future__ import annotations

import atexit
import contextlib
import functools
import math
import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data.loading.pipeline import collate
from data.loading.sample import Batch, Sample
from utils.boxes import Targets
from utils.errors import DEAD_WORKER, FeatherDetError, UserError, cause_of
from utils.letterbox import Letterbox
from utils.terminal import warn

TOO_MANY_WORKERS = ".*worker processes in total"  # torch's warning; the user asked for that many
REUSED_BYTES = 31 << 20  # under glibc's DEFAULT_MMAP_THRESHOLD_MAX
TOO_MANY_FILES = "Too many open files"
NO_ROOM = (
    "no room for a batch in /dev/shm: batches go through pipes, which is slower;"
    " docker run --shm-size 1g, a smaller batch or fewer --workers may help"
)

MakeBatch = Callable[[Any], tuple[list[Sample], list[Letterbox]]]


class BatchLoader:
    """torch's DataLoader for whole batches, with its failures as one-line errors.

    `make` turns one item of `keys` into samples and their letterboxes; it runs in the workers.
    Iterating raises UserError for a file that has become unreadable since the scan and
    FeatherDetError, naming the process, when a worker has died (torch may raise that between two
    batches as well: see dead_workers_named).
    """

    def __init__(self, make: MakeBatch, keys: Any, *, workers: int, pin_memory: bool) -> None:
        self._keys = keys
        with _no_advice_on_workers():
            self._loader = DataLoader(
                _Batches(make),
                batch_size=None,  # a key is a whole batch
                sampler=keys,
                num_workers=workers,
                collate_fn=_unchanged,
                pin_memory=pin_memory,
                worker_init_fn=_start_worker,
                persistent_workers=workers > 0,
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
    def __init__(self, make: MakeBatch) -> None:
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


def _ignore_lost_parent(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """A parent that ends while it fetches a batch resets the connection of the worker's thread."""
    if not issubclass(kind, ConnectionError):
        sys.__excepthook__(kind, error, trace)


def _start_worker(number: int) -> None:
    cv2.setNumThreads(0)  # the processes are the parallelism
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # sent to whole groups
        signal.signal(number, signal.SIG_IGN)  # the parent decides when to stop
    sys.excepthook = _ignore_lost_parent
    # after freeing this, glibc reuses the memory of images instead of asking for cleared pages
    np.empty(REUSED_BYTES, np.uint8)
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
