"""What detection shows: results on stdout, problems and bars on stderr, images in a window."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from engine.measure.bench import Speed
from engine.predict.result import Result
from utils.errors import UserError
from utils.terminal import say, warn

PROBE = "import cv2; cv2.namedWindow('probe'); cv2.destroyAllWindows()"
PROBE_SECONDS = 20
QUIT_KEYS = frozenset({ord("q"), 27})  # q, Escape


class Console:
    """A line per image and per stream frame; for a video a bar, and one line at its end.

    Sizes are what the network saw, height x width; the times are inference.  A context manager:
    leaving it ends the bar and prints the mean times per image.
    """

    def __init__(self, *, stride: int = 1) -> None:
        self._stride = stride
        self._bar: tqdm[Any] | None = None  # of the present video
        self._head = self._size = ""  # of the last frame
        self._video: list[tuple[int, float]] = []  # detections and inference in ms of its frames
        self._sums = np.zeros(3)
        self._count = 0

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end_video()
        if self._count:
            say(Speed(*(self._sums / self._count)).text())

    def problem(self, text: str) -> None:
        """One line on stderr that does not break a progress bar."""
        self._end_video()
        warn(text)

    def show(self, result: Result) -> None:
        """Report one frame."""
        frame = result.frame
        assert frame is not None  # of a source
        self._sums += result.speed
        self._count += 1
        head = f"{frame.kind} {frame.item}/{frame.items} {frame.label}:"
        if head != self._head:
            self._end_video()
        self._head, self._size = head, "x".join(map(str, result.network_size))
        if frame.kind != "video":
            number = f" frame {frame.number}" if frame.kind == "stream" else ""
            say(f"{head}{number} {self._size} {result.text}, {result.speed.inference:.1f}ms")
            return
        self._video.append((len(result.detections), result.speed.inference))
        if self._bar is None:
            self._bar = tqdm(
                total=math.ceil(frame.frames / self._stride) if frame.frames else None,
                desc=head.rstrip(":"),
                unit="frame",
                dynamic_ncols=True,
                leave=False,
                disable=None,  # only on a terminal
            )
        self._bar.update()

    def _end_video(self) -> None:
        if self._bar is None:
            return
        self._bar.close()
        objects, times = zip(*self._video, strict=True)
        self._bar, self._video = None, []
        say(
            f"{self._head} {len(times)} frames {self._size} {sum(objects)} detections in "
            f"{np.count_nonzero(objects)} of them, {np.mean(times):.1f}ms per frame"
        )


def require_display() -> None:
    """Raise UserError unless a window can be opened here.

    The attempt is made in another process: without a display the window library does not raise, it
    ends the process.
    """
    reason = "this OpenCV cannot open one (a headless build, or the display refuses)"
    if sys.platform.startswith("linux") and not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    ):
        reason = "this machine has no display (DISPLAY is not set)"
    else:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = [sys.executable, "-c", PROBE]
            subprocess.run(command, capture_output=True, timeout=PROBE_SECONDS, check=True)
            return
    raise UserError(f"--view-img needs a window, and {reason}; leave it out, the copies are saved")


def show_window(result: Result, drawn: np.ndarray) -> bool:
    """Show an annotated RGB frame, an image until a key is pressed; False for q or Escape."""
    frame = result.frame
    assert frame is not None  # of a source
    cv2.imshow(frame.label, cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
    return cv2.waitKey(0 if frame.kind == "image" else 1) & 0xFF not in QUIT_KEYS
