"""Live streams: a thread keeps the newest frame and reconnects when the source drops."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data.sources.capture import Capture, CaptureError


@dataclass(frozen=True)
class StreamConfig:
    """Seconds: to wait for a connection or a frame, and to retry after frames stop."""

    timeout: float = 5.0
    give_up: float = 30.0
    first_delay: float = 0.5  # between two attempts; doubled each time
    max_delay: float = 8.0

    def __post_init__(self) -> None:
        for name in ("timeout", "give_up", "first_delay", "max_delay"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"StreamConfig.{name} must be positive, got {getattr(self, name)}")


class LiveStream:
    """The newest frame of a source that never ends by itself.

    `capture` is the open connection and `reopen` makes a new one (CaptureError when it cannot).
    `changed` is notified at every frame and at the loss; several streams may share it.  There are
    no stand-in frames: while the source is away there is nothing to take.
    """

    def __init__(
        self,
        capture: Capture,
        reopen: Callable[[], Capture],
        config: StreamConfig,
        *,
        stride: int,
        changed: threading.Condition,
        report: Callable[[str], None],
    ) -> None:
        self.fps = capture.fps
        self.lost: str | None = None  # the cause, once it is given up
        self._capture = capture
        self._reopen = reopen
        self._config = config
        self._stride = stride
        self._changed = changed
        self._report = report
        self._newest: tuple[np.ndarray, int] | None = None
        self._count = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="stream reader")
        self._thread.start()

    def take(self) -> tuple[np.ndarray, int] | None:
        """The newest frame not yet taken (RGB) and its number from 1, or None."""
        with self._changed:
            newest, self._newest = self._newest, None
        return newest

    @property
    def ready(self) -> bool:
        """Whether there is a frame to take or a loss to notice."""
        return self._newest is not None or self.lost is not None

    def close(self) -> None:
        """End the thread and the connection."""
        self._stop.set()
        self._thread.join(self._config.timeout + 1)

    def _run(self) -> None:
        cause = "closed"
        try:
            cause = self._read_until_lost()
        except Exception as error:  # a thread's error must not vanish
            cause = f"{type(error).__name__}: {error}"
        finally:
            self._capture.release()
            with self._changed:
                self.lost = cause
                self._changed.notify_all()

    def _read_until_lost(self) -> str:
        delay = self._config.first_delay
        last, away, cause = time.monotonic(), False, "no frame came"
        while not self._stop.is_set():
            if self._read_one():
                last, delay = time.monotonic(), self._config.first_delay
                if away:
                    self._report("reconnected")
                away = False
                continue
            self._capture.release()
            if not away:
                self._report(f"connection lost; retrying for {self._config.give_up:g} s")
            away = True
            left = last + self._config.give_up - time.monotonic()
            if left <= 0:
                return f"lost for {self._config.give_up:g} s, given up: {cause}"
            self._stop.wait(min(delay, left))
            delay = min(delay * 2, self._config.max_delay)
            try:
                self._capture = self._reopen()
            except CaptureError as error:
                cause = str(error)
        return "closed"

    def _read_one(self) -> bool:
        """Step one frame on and keep it if it is its turn; False when nothing came."""
        if not self._capture.skip():
            return False
        self._count += 1
        if (self._count - 1) % self._stride == 0:
            image = self._capture.frame()
            if image is None:
                return False
            with self._changed:
                self._newest = (image, self._count)
                self._changed.notify_all()
        return True
