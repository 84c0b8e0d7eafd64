"""SIGTERM and SIGINT while training: a flag that is read where it is safe to stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from utils.errors import TerminatedError

INSISTING = 10.0  # seconds after the first signal


class StopRequest:
    """Which signal asked to stop, if any; `signal` is 0 until then."""

    def __init__(self) -> None:
        self.signal = 0
        self._since = 0.0
        self._abort = False

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: note the first, obey one that insists at once.

        A process group and its launcher may each send one within moments: that is not insisting.
        """
        now = time.monotonic()
        insists = self.signal != 0 and now - self._since > INSISTING
        if not self.signal:
            self.signal, self._since = number, now
        if self._abort or insists:
            self._abort = False
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
    raise TerminatedError(number)


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
