"""Reading and writing in threads of their own, beside the network."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from data.sources.frames import Frame, Sources

DEPTH = 4  # frames that wait between two threads, besides those of a batch
WAKE = 1.0  # seconds after which a waiting loop wakes up, so that Ctrl-C works


class ReadAhead:
    """The frames of files, read by a thread a few ahead, and what is reported in its turn.

    `report` is for the Sources; it calls `problem` in the thread that iterates.  Leaving the
    context ends the thread.
    """

    def __init__(self, problem: Callable[[str], None], *, depth: int) -> None:
        self._problem = problem
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def report(self, text: str) -> None:
        """Call `problem`, or let it wait behind the frames that were read before."""
        if threading.current_thread() is self._thread:
            self._put(text)
        else:
            self._problem(text)

    def frames(self, sources: Sources) -> Iterator[Frame]:
        """All frames; raises what reading raises."""
        self._thread = threading.Thread(target=self._read, args=(sources,), daemon=True)
        self._thread.start()
        while True:
            with contextlib.suppress(queue.Empty):
                item = self._queue.get(timeout=WAKE)
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                if isinstance(item, str):
                    self._problem(item)
                else:
                    yield item

    def _read(self, sources: Sources) -> None:
        end: BaseException | None = None
        try:
            for frame in sources:
                if not self._put(frame):
                    return
        except BaseException as error:
            end = error
        self._put(end)

    def _put(self, item: Any) -> bool:
        """Whether it is still wanted."""
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=WAKE / 10)
                return True
        return False


class WriteBehind:
    """Calls made by a thread in their order; their errors come at a later call, or at the end."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1)
        self._pending: deque[Future[Any]] = deque()

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._executor.shutdown()  # what was found is written, after an error too
        while kind is None and self._pending:
            self._pending.popleft().result()

    def __call__(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Do `work` later; waits where too much is waiting."""
        self._pending.append(self._executor.submit(work, *arguments))
        while len(self._pending) > DEPTH:
            self._pending.popleft().result()
