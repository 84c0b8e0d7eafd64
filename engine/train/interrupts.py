"""SIGTERM, SIGHUP and SIGINT while training: a flag that is read where it is safe to stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from utils.errors import STOP_SIGNALS, TerminatedError

INSISTING = 10.0  # seconds after the first signal


class StopRequest:
    """Which signal asked to stop, if any; `signal` is 0 until then."""

    def __init__(self) -> None:
        self.signal = 0
        self._since = 0.0
        self._abort = False

    def receive(self, number: int, frame: object) -> None:
        """Signal handler: note the first; one that comes more than `INSISTING` later ends the run.

        A process group and its launcher may each send one within moments.
        """
        now = time.monotonic()
        insists = self.signal != 0 and now - self._since > INSISTING
        if not self.signal:
            self.signal, self._since = number, now
        if self._abort or insists:
            self._abort = False
            self.stop()

    @contextmanager
    def may_abort(self) -> Iterator[None]:
        """While inside, a signal ends the work at once: it changes no state (an evaluation)."""
        if self.signal:
            self.stop()
        self._abort = True
        try:
            yield
        finally:
            self._abort = False

    def stop(self) -> NoReturn:
        """Leave as the signal asks: KeyboardInterrupt (130) or TerminatedError (143 or 129)."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise TerminatedError(self.signal)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Listen to `STOP_SIGNALS`, but for ignored ones (nohup); earlier handlers return afterwards.

    Only a main thread may listen; elsewhere the request simply never comes.
    """
    request = StopRequest()
    earlier: dict[signal.Signals, Any] = {}
    with suppress(ValueError):  # not the main thread
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                earlier[number] = signal.signal(number, request.receive)
    try:
        yield request
    finally:
        for listened, handler in earlier.items():
            signal.signal(listened, handler)
