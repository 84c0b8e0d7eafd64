"""SIGTERM and SIGINT while training: a flag that is read where it is safe to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from utils.errors import TerminatedError


class StopRequest:
    """Which signal asked to stop, if any; `signal` is 0 until then."""

    def __init__(self) -> None:
        self.signal = 0
        self._abort = False

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: note the first, obey the second at once."""
        again = self.signal != 0
        self.signal = self.signal or number
        if self._abort or again:
            stop(self.signal)

    @contextmanager
    def may_abort(self) -> Iterator[None]:
        """While inside, a signal ends the work at once: it changes no state (an evaluation)."""
        if self.signal:
            stop(self.signal)
        self._abort = True
        try:
            yield
        finally:
            self._abort = False


def stop(number: int) -> NoReturn:
    """Leave as the signal asks: KeyboardInterrupt (exit 130) or TerminatedError (exit 143)."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise TerminatedError("terminated; the run's state is in weights/last.pt, go on with --resume")


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Listen to SIGTERM and SIGINT; the earlier handlers return afterwards.

    Only a main thread may listen; elsewhere the request simply never comes.
    """
    request = StopRequest()
    numbers = (signal.SIGTERM, signal.SIGINT)
    try:
        earlier = {number: signal.signal(number, request.receive) for number in numbers}
    except ValueError:  # not the main thread
        earlier = {}
    try:
        yield request
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
