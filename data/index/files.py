"""Work on many files: in threads where the disk or the network is slow; what tells a change."""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from data.index.columns import Texts

A = TypeVar("A")
B = TypeVar("B")

_SETTLED = 2_000_000_000  # ns; a file system's clock may stand still for that long
MAX_THREADS = 16
_AT_ONCE = 256
_OFTEN = 0.5  # waits for each item


def map_files(
    function: Callable[[A], B], items: Iterable[A], *, parallel: bool = False
) -> Iterator[B]:
    """`map`, in threads once every other item has to wait for its file.

    While files are in memory, threads would only wait for the interpreter's lock: twice the time.
    With `parallel` the function is known to release it, and there is a thread for each core.
    """
    rest = iter(items)
    parts = iter(lambda: [*itertools.islice(rest, _AT_ONCE)], [])
    for part in () if parallel else parts:
        before = _waits()
        results = [function(item) for item in part]
        often = _waits() - before > _OFTEN * len(part)
        yield from results
        if often:
            break
    threads = os.cpu_count() or 1 if parallel else MAX_THREADS
    with ThreadPoolExecutor(min(MAX_THREADS, threads)) as pool:
        for part in parts:
            yield from pool.map(function, part)


def _waits() -> int:
    """How often this thread has stopped until something arrived."""
    try:
        import resource  # not on every system
    except ImportError:
        return 0
    return resource.getrusage(getattr(resource, "RUSAGE_THREAD", 0)).ru_nvcsw


def file_states(paths: Iterable[str]) -> np.ndarray:
    """(N, 3) int64: bytes and the times, in ns, of the last write and the last change of a file.

    The time of a change cannot be set back; it is -1 where the next change could have the same
    time.  All are 0 where there is no file; the first is -1 for a link that leads nowhere.
    """
    settled = time.time_ns() - _SETTLED
    numbers = itertools.chain.from_iterable(map_files(_state, paths))
    states = np.fromiter(numbers, np.int64).reshape(-1, 3)
    states[states[:, 2] > settled, 2] = -1
    return states


def stamp_of(names: object, paths: Texts) -> str:
    """A hash of `names`, `paths` and their files' states; '' if a file could change unnoticed."""
    states = file_states(paths)
    digest = hashlib.blake2b(repr(names).encode("utf-8", "replace"), digest_size=16)
    for column in (paths.data, paths.ends, states):
        digest.update(column.data)
    return "" if (states[:, 2] < 0).any() else digest.hexdigest()


def _state(path: str) -> tuple[int, int, int]:
    try:
        status = os.stat(path)  # noqa: PTH116  a Path for each would take longer than the call
    except OSError:
        return -int(os.path.lexists(path)), 0, 0
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
