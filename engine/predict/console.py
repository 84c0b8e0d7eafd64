"""What detection prints: results on stdout, problems and bars on stderr."""

from __future__ import annotations

import math
import sys
from types import TracebackType
from typing import Any

from tqdm import tqdm

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
        self._sums = [0.0, 0.0, 0.0]
        self._count = 0

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_video()
        if self._count:
            say(Speed(*(value / self._count for value in self._sums)).text())

    def problem(self, text: str) -> None:
        """One line on stderr that does not break a progress bar."""
        self._end_video()
        tqdm.write(readable(text), file=sys.stderr)

    def show(self, result: Result) -> None:
        """Report one frame."""
        frame = result.frame
        assert frame is not None  # of a source
        self._sums = [total + value for total, value in zip(self._sums, result.speed, strict=True)]
        self._count += 1
        head = f"{frame.kind} {frame.item}/{frame.items} {frame.label}:"
        if frame.kind == "video":
            if self._video is None or self._video.head != head:
                self._end_video()
                self._video = _Video(head, frame.frames, self._stride)
            self._video.add(result)
            return
        self._end_video()
        number = f" frame {frame.number}" if frame.kind == "stream" else ""
        size = "x".join(map(str, result.network_size))
        say(f"{head}{number} {size} {result.text}, {result.speed.inference:.1f}ms")

    def _end_video(self) -> None:
        if self._video is not None:
            text, self._video = self._video.end(), None
            say(text)


class _Video:
    """Counts over one video."""

    def __init__(self, head: str, frames: int | None, stride: int) -> None:
        self.head = head
        self._frames = self._objects = self._with_objects = 0
        self._inference = 0.0
        self._size = ""
        self._bar: tqdm[Any] = tqdm(
            total=math.ceil(frames / stride) if frames else None,
            desc=head.rstrip(":"),
            unit="frame",
            dynamic_ncols=True,
            leave=False,
            disable=None,  # only on a terminal
        )

    def add(self, result: Result) -> None:
        self._frames += 1
        self._objects += len(result.detections)
        self._with_objects += len(result.detections) > 0
        self._inference += result.speed.inference
        self._size = "x".join(map(str, result.network_size))
        self._bar.update()

    def end(self) -> str:
        self._bar.close()
        return (
            f"{self.head} {self._frames} frames {self._size} {self._objects} detections in "
            f"{self._with_objects} of them, {self._inference / self._frames:.1f}ms per frame"
        )
