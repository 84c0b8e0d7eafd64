"""What detection prints: results on stdout, problems and bars on stderr."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
from tqdm import tqdm

from data.sources.frames import Frame
from engine.measure.bench import Speed
from engine.predict.predictor import Result
from utils.terminal import readable, say


class Console:
    """A line per image and per stream frame; for a video a bar, and one line at its end.

    Sizes are what the network saw, height x width; the times are inference.  A context manager:
    leaving it ends the bar and prints the mean times per image.
    """

    def __init__(self, *, stride: int = 1) -> None:
        self._stride = stride
        self._video: _Video | None = None
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
        tqdm.write(readable(text), file=sys.stderr)

    def show(self, result: Result) -> None:
        """Report one frame."""
        frame = result.frame
        assert frame is not None  # of a source
        self._sums += result.speed
        self._count += 1
        head = f"{frame.kind} {frame.item}/{frame.items} {frame.label}:"
        if self._video is not None and self._video.head != head:
            self._end_video()
        if frame.kind == "video":
            self._video = self._video or _Video(head, frame, self._stride)
            self._video.results.append((len(result.detections), result.speed.inference))
            self._video.size = _size(result)
            self._video.bar.update()
            return
        number = f" frame {frame.number}" if frame.kind == "stream" else ""
        say(f"{head}{number} {_size(result)} {result.text}, {result.speed.inference:.1f}ms")

    def _end_video(self) -> None:
        video, self._video = self._video, None
        if video is None:
            return
        video.bar.close()
        objects, times = zip(*video.results, strict=True)
        say(
            f"{video.head} {len(times)} frames {video.size} {sum(objects)} detections in "
            f"{np.count_nonzero(objects)} of them, {np.mean(times):.1f}ms per frame"
        )


class _Video:
    """What is shown of one video at its end, and its bar."""

    def __init__(self, head: str, frame: Frame, stride: int) -> None:
        self.head = head
        self.size = ""
        self.results: list[tuple[int, float]] = []  # number of detections, inference in ms
        self.bar: tqdm[Any] = tqdm(
            total=math.ceil(frame.frames / stride) if frame.frames else None,
            desc=head.rstrip(":"),
            unit="frame",
            dynamic_ncols=True,
            leave=False,
            disable=None,  # only on a terminal
        )


def _size(result: Result) -> str:
    return "x".join(map(str, result.network_size))
