"""Work on many files, in threads where the disk or the network is slow."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

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
