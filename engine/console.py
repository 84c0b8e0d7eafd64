"""What detection tells on the terminal: results on stdout, problems and bars on stderr."""

from __future__ import annotations

import math
import sys
from types import TracebackType
from typing import Any

from tqdm import tqdm

from data.sources import Frame
from engine.predictor import Result, Speed


class Console:
    """A line per image and per stream frame; for a video a bar, and one line at its end.

    A context manager: leaving it ends the bar and prints the mean times.
    """

    def __init__(self, *, stride: int = 1) -> None:
        self._stride = stride
        self._bar: tqdm[Any] | None = None
        self._video: list[Result] = []  # only the last one, with its counts beside it
        self._frames = self._objects = 0
        self._sums = [0.0, 0.0, 0.0]
        self.count = 0

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_video()
        if self.count:
            mean = Speed(*(value / self.count for value in self._sums))
            _out(
                f"Speed: {mean.pre_process:.1f} ms pre-process, {mean.inference:.1f} ms inference, "
                f"{mean.nms:.1f} ms NMS per image"
            )

    def problem(self, line: str) -> None:
        """A line on stderr that does not tear the bar."""
        tqdm.write(line, file=sys.stderr)
