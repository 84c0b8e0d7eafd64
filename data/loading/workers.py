"""torch's worker processes for whole batches, with their failures as one-line errors."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import multiprocessing
import multiprocessing.queues
import os
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

import cv2
import numpy as np
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data.index.decoder import DecoderLog
from data.loading.memory import Allocate, BatchMemory, images_at
from data.loading.sample import Batch, Sample, collate
from utils.boxes import Letterbox
from utils.errors import DEAD_WORKER, STOP_SIGNALS, FeatherDetError, UserError, cause_of
from utils.terminal import warn, warn_once

TOO_MANY_WORKERS = ".*worker processes in total"  # torch's warning; the user asked for that many
REUSED_BYTES = 31 << 20  # under glibc's DEFAULT_MMAP_THRESHOLD_MAX
TOO_MANY_FILES = "Too many open files"

MakeBatch = Callable[[Any, Allocate], Batch]


@contextlib.contextmanager
def dead_workers_named() -> Iterator[None]:
    """Turn the error that torch raises for a lost worker into a FeatherDetError.

    torch raises it wherever the program is when the signal comes.
    """
    try:
        yield
    except RuntimeError as error:
        if TOO_MANY_FILES in str(error):
            raise UserError(f"{TOO_MANY_FILES}: try ulimit -n 4096 or fewer --workers") from error
        found = DEAD_WORKER.search(str(error))
        if found is None:
            raise
        raise FeatherDetError(
            f"a loader process died: {found[0]}; fewer --workers or more memory may help"
        ) from error


class BatchLoader:
    """torch's DataLoader for whole batches, with its failures as one-line errors.

    `keys` has one item per batch; `make` turns it into the batch, in the workers, with images of at
    most `size` bytes.  These are used again when nobody holds the batch any more.
    Iterating raises UserError for a file that cannot be read or decoded and FeatherDetError,
    naming the process, when a worker has died (torch may raise that between two batches as well:
    see dead_workers_named).
    """

    def __init__(
        self, make: MakeBatch, keys: Any, *, size: int, workers: int, pin_memory: bool
    ) -> None:
        self._keys = keys
        # two for each worker, one that is used and one that is fetched meanwhile
        memory = BatchMemory(size, 2 * workers + 2)
        self._started: Iterator[Batch] | None = None
        warnings.filterwarnings("ignore", message=TOO_MANY_WORKERS)
        if not workers:
            _reuse_memory()
        self._loader = DataLoader(
            _Batches(make, memory),
            batch_size=None,  # an item of `keys` is a whole batch
            sampler=_Places(keys, memory),
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
            persistent_workers=workers > 0,
        )

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        return len(self._keys)

    def start(self) -> None:
        """Let the workers make the first batches of the next iteration: two each."""
        if self._loader.num_workers and self._started is None:
            self._started = self._start()

    def __iter__(self) -> Iterator[Batch]:
        batches, self._started = self._started or self._start(), None
        return batches

    @dead_workers_named()
    def _start(self) -> Iterator[Batch]:
        """Begin an iteration; without worker processes where the system cannot start them."""
        if self._loader.num_workers:
            try:
                multiprocessing.Lock()  # what torch's queues need first: a semaphore in /dev/shm
                batches = iter(self._loader)
            except OSError as error:
                self._loader.num_workers = 0
                warn_once(
                    f"warning: no loader processes ({error.strerror}): images are loaded in the"
                    " main process, which is slower; docker run --shm-size 1g, ulimit -n 4096 or"
                    " fewer --workers may help"
                )
            else:
                _workers().update(batches._workers)  # type: ignore[attr-defined]  # of torch's iterator
                return _delivered(batches)
        return _delivered(iter(self._loader))


def _delivered(items: Iterator[Batch | UserError]) -> Iterator[Batch]:
    with dead_workers_named():
        for item in items:
            if isinstance(item, UserError):
                try:
                    raise item
                finally:
                    del item  # or its traceback keeps this frame, and torch waits for the workers
            yield item


class _Places:
    """Each key with a place for its images, found when torch asks for it."""

    def __init__(self, keys: Any, memory: BatchMemory) -> None:
        self._keys, self._memory = keys, memory

    def __iter__(self) -> Iterator[tuple[Any, int | None]]:
        return ((key, self._memory.lend()) for key in self._keys)


class _Batches(Dataset):
    def __init__(self, make: MakeBatch, memory: BatchMemory) -> None:
        self._make, self._memory = make, memory

    def __getitem__(self, item: tuple[Any, int | None]) -> Batch | _Sent | UserError:
        """The batch, or the error: torch would wrap an exception in a traceback."""
        key, place = item
        try:
            batch = self._make(key, functools.partial(self._memory.images, place))
        except UserError as error:
            return error
        if place is None or get_worker_info() is None:
            return batch
        return _Sent(batch, self._memory.number, place)


@dataclass(frozen=True)
class _Sent:
    """A batch on its way from a worker to its parent, where it is a Batch again."""

    batch: Batch
    memory: int
    place: int

    def __reduce__(self) -> tuple[Any, ...]:
        """All but the images, which stay where they are."""
        rest = replace(self.batch, images=self.batch.images[:0])
        shape = tuple(self.batch.images.permute(0, 2, 3, 1).shape)
        return _received, (rest, self.memory, self.place, shape)


def _received(rest: Batch, memory: int, place: int, shape: tuple[int, ...]) -> Batch:
    return replace(rest, images=images_at(memory, place, shape).permute(0, 3, 1, 2))


def stack(rows: Iterable[tuple[Sample, Letterbox]], count: int, allocate: Allocate) -> Batch:
    """A batch of `count` samples of one size."""
    kept: list[tuple[Sample, Letterbox]] = []
    for sample, letterbox in rows:
        if not kept:
            images = allocate((count, *sample.image.shape))
            pixels = images.numpy()
        # the sample's own memory is used again for the next one
        pixels[len(kept)] = sample.image
        kept.append((replace(sample, image=pixels[len(kept)]), letterbox))
    return collate(kept, images)


@functools.cache
def _workers() -> weakref.WeakSet[BaseProcess]:
    """The started processes, to be ended at exit: multiprocessing would wait for its children,
    which ignore its SIGTERM."""
    started: weakref.WeakSet[BaseProcess] = weakref.WeakSet()
    atexit.register(_kill_workers)
    return started


def _kill_workers() -> None:
    if hasattr(signal, "SIGCHLD"):  # torch's handler would report them as lost
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in _workers():
        worker.kill()


def _start_worker(number: int) -> None:
    gc.freeze()  # to collect the parent's objects would write to all of them, and so copy them
    cv2.setNumThreads(0)  # the processes are the parallelism
    DecoderLog.turn = threading.RLock()  # a thread of the parent may hold the other
    for number in STOP_SIGNALS:  # sent to whole groups
        signal.signal(number, signal.SIG_IGN)  # the parent decides when to stop
    _reuse_memory()
    # multiprocessing would print a traceback, drop the batch and leave the parent waiting
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_cannot_send)  # type: ignore[attr-defined]


def _reuse_memory() -> None:
    """After freeing this, glibc reuses the memory of images instead of asking for cleared pages."""
    np.empty(REUSED_BYTES, np.uint8)


def _cannot_send(error: Exception, batch: object) -> NoReturn:
    warn(f"loader process {os.getpid()}: a batch cannot be sent: {cause_of(error)}")
    os._exit(1)
