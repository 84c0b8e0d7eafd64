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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data.loading.sample import Batch, Sample, collate
from utils.boxes import Letterbox
from utils.errors import DEAD_WORKER, STOP_SIGNALS, FeatherDetError, UserError, cause_of
from utils.terminal import warn, warn_once

TOO_MANY_WORKERS = ".*worker processes in total"  # torch's warning; the user asked for that many
REUSED_BYTES = 31 << 20  # under glibc's DEFAULT_MMAP_THRESHOLD_MAX
TOO_MANY_FILES = "Too many open files"

MakeBatch = Callable[[Any], Batch]


@contextlib.contextmanager
def dead_workers_named() -> Iterator[None]:
    """Turn the error that torch raises for a lost worker into a FeatherDetError.

    torch raises it wherever the program is when the signal comes.
    """
    try:
        yield
    except (EOFError, ConnectionError) as error:
        # the worker died while it handed over a batch, and torch did not see it yet
        for worker in _workers():
            worker.join(0.1)
        dead = [str(worker.pid) for worker in _workers() if worker.exitcode is not None]
        if not dead:
            raise
        raise _lost(f"worker (pid(s) {', '.join(dead)}) exited unexpectedly") from error
    except RuntimeError as error:
        if TOO_MANY_FILES in str(error):
            raise UserError(f"{TOO_MANY_FILES}: try ulimit -n 4096 or fewer --workers") from error
        found = DEAD_WORKER.search(str(error))
        if found is None:
            raise
        raise _lost(found[0]) from error


def _lost(cause: str) -> FeatherDetError:
    return FeatherDetError(
        f"a process that loads images has died: {cause}; fewer --workers, more memory or more"
        " shared memory (/dev/shm) may help"
    )


class BatchLoader:
    """torch's DataLoader for whole batches, with its failures as one-line errors.

    `keys` has one item per batch; `make` turns it into the batch, in the workers.
    Iterating raises UserError for a file that cannot be read or decoded and FeatherDetError,
    naming the process, when a worker has died (torch may raise that between two batches as well:
    see dead_workers_named).
    """

    def __init__(self, make: MakeBatch, keys: Any, *, workers: int, pin_memory: bool) -> None:
        self._keys = keys
        self._started: Iterator[Batch] | None = None
        warnings.filterwarnings("ignore", message=TOO_MANY_WORKERS)
        if not workers:
            _reuse_memory()
        self._loader = DataLoader(
            _Batches(make),
            batch_size=None,  # an item of `keys` is a whole batch
            sampler=keys,
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


class _Batches(Dataset):
    def __init__(self, make: MakeBatch) -> None:
        self._make = make

    def __getitem__(self, key: Any) -> Batch | UserError:
        """The batch, or the error: torch would wrap an exception in a traceback."""
        try:
            return self._make(key)
        except UserError as error:
            return error


def stack(rows: Iterable[tuple[Sample, Letterbox]], count: int) -> Batch:
    """A batch of `count` samples of one size."""
    kept: list[tuple[Sample, Letterbox]] = []
    for sample, letterbox in rows:
        if not kept:
            images = batch_memory(count, *sample.image.shape)
            pixels = images.numpy()
        # the sample's own memory is used again for the next one
        pixels[len(kept)] = sample.image
        kept.append((replace(sample, image=pixels[len(kept)]), letterbox))
    return collate(kept, images)


def batch_memory(*shape: int) -> Tensor:
    """Uninitialised bytes; those of a worker are shared, if /dev/shm (64 MB in Docker) has room."""
    if get_worker_info() is not None and all(shape):
        with contextlib.suppress(RuntimeError):  # full, read-only or missing
            empty = torch.empty(0, dtype=torch.uint8)  # the rest as torch's default_collate
            return empty.set_(empty.untyped_storage()._new_shared(math.prod(shape))).view(shape)
    return torch.from_numpy(np.empty(shape, np.uint8))  # NumPy asks for large pages


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


def _ignore_lost_parent(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """A parent that ends while it fetches a batch resets the connection of the worker's thread."""
    if not issubclass(kind, ConnectionError):
        sys.__excepthook__(kind, error, trace)


def _start_worker(number: int) -> None:
    cv2.setNumThreads(0)  # the processes are the parallelism
    for number in STOP_SIGNALS:  # sent to whole groups
        signal.signal(number, signal.SIG_IGN)  # the parent decides when to stop
    sys.excepthook = _ignore_lost_parent
    _reuse_memory()
    # multiprocessing would print a traceback, drop the batch and leave the parent waiting
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_cannot_send)  # type: ignore[attr-defined]


def _reuse_memory() -> None:
    """After freeing this, glibc reuses the memory of images instead of asking for cleared pages."""
    np.empty(REUSED_BYTES, np.uint8)


def _cannot_send(error: Exception, batch: object) -> NoReturn:
    warn(f"loader process {os.getpid()}: a batch cannot be sent: {cause_of(error)}")
    os._exit(1)
