"""Images, videos and streams as one sequence of frames, for detection."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data.index.scan import INCOMPLETE, DecoderLog
from data.sources.capture import Capture, CaptureError, open_url, open_video, open_webcam
from data.sources.locate import SourceItem, resolve
from data.sources.streams import LiveStream, StreamConfig
from data.sources.urls import ask
from utils.errors import SourceLostError, UserError
from utils.images import ImageError, decode_image, image_format, read_bytes
from utils.terminal import warn

# Containers that store the number of frames; the others estimate it from the duration.
EXACT_COUNTS = frozenset({".avi", ".m4v", ".mov", ".mp4"})
LOCAL = frozenset({"image", "video"})
WAKE = 1.0  # seconds after which a waiting loop wakes up, so that Ctrl-C works


@dataclass(frozen=True)
class Frame:
    """One image and where it comes from."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    kind: str  # 'image', 'video' or 'stream'
    label: str  # path or URL, without credentials
    path: Path | None  # None for streams
    item: int  # number of the source, from 1, of `items`
    items: int
    number: int = 1  # of the frame within its source, from 1
    frames: int | None = None  # how many the source promises; None: unknown or endless
    fps: float | None = None


@dataclass(frozen=True)
class SourceProblem:
    """A source that was not, or not wholly, read."""

    label: str
    cause: str
    lost: bool = False  # a stream that had been alive

    def __str__(self) -> str:
        return f"{self.label}: {self.cause}"


class Sources:
    """What one or several `--source` values mean, to be iterated over once or more.

    A value is an image, a video, a directory, a glob pattern, a list file (.txt, a path per line),
    a webcam number or an http(s)/rtsp URL.  Bad ones are reported by name and cause as they come,
    kept in `problems`, and passed over.  Live streams are read last and all at once, each giving
    its newest frame.

    The constructor raises UserError when a single value is missing, empty or forbidden.  Iteration
    ends with UserError when nothing at all could be read, and with SourceLostError when a stream
    was lost for good.
    """

    def __init__(
        self,
        sources: str | Path | Sequence[str | Path],
        *,
        stride: int = 1,
        stream: StreamConfig | None = None,
        report: Callable[[str], None] = warn,
    ) -> None:
        if stride < 1:
            raise ValueError(f"Sources: the frame stride must be at least 1, got {stride}")
        values = [sources] if isinstance(sources, str | Path) else list(sources)
        self.items, self._bad = resolve([str(value) for value in values], report)
        self.problems: list[SourceProblem] = []
        self._stride = stride
        self._stream = stream or StreamConfig()
        self._report = report
        self._live: list[tuple[Callable[..., Frame], SourceItem, LiveStream]] = []
        self._changed = threading.Condition()
        if not self.items and not self._bad:
            raise UserError("no source given")

    def __len__(self) -> int:
        return len(self.items)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are to be read; they must not be written to."""
        return tuple(Path(item.text) for item in self.items if item.kind in LOCAL)

    def __iter__(self) -> Iterator[Frame]:
        self.problems = []
        for label, cause in self._bad:
            self._fail(label, cause)
        count = 0
        try:
            for frame in self._all():
                count += 1
                yield frame
        finally:
            for *_, stream in self._live:
                stream.close()
            self._live = []
        lost = [problem for problem in self.problems if problem.lost]
        if lost:
            raise SourceLostError("; ".join(map(str, lost)))
        if not count:
            total = len(self.items) + len(self._bad)
            raise UserError(f"nothing could be read: {len(self.problems)} of {total} failed")

    def _fail(self, label: str, cause: str, *, lost: bool = False) -> None:
        problem = SourceProblem(label, cause, lost)
        self.problems.append(problem)
        self._report(f"{'lost' if lost else 'skipped'}: {problem}")

    def _all(self) -> Iterator[Frame]:
        for number, item in enumerate(self.items, 1):
            path = Path(item.text) if item.kind in LOCAL else None
            make = partial(Frame, label=item.label, path=path, item=number, items=len(self.items))
            try:
                if item.kind == "image":
                    yield make(_read_image(Path(item.text)), "image", frames=1)
                elif item.kind == "video":
                    yield from self._video(make, item, open_video(Path(item.text)))
                else:
                    yield from self._remote(make, item)
            except (ImageError, CaptureError) as error:
                self._fail(item.label, str(error))
        yield from self._streams()

    def _video(
        self, make: Callable[..., Frame], item: SourceItem, capture: Capture
    ) -> Iterator[Frame]:
        """Every frame whose turn it is; a shortfall against the header's count is a problem."""
        read = 0
        fps, frames = capture.fps, capture.frames
        try:
            while capture.skip():
                read += 1
                if (read - 1) % self._stride:
                    continue
                image = capture.frame()
                if image is None:
                    read -= 1
                    break
                yield make(image, "video", number=read, frames=frames, fps=fps)
        finally:
            capture.release()
        exact = Path(item.text).suffix.lower() in EXACT_COUNTS
        tolerance = 1 if exact else max(round(fps or 1), 1)
        if not read:
            self._fail(item.label, f"read 0 of {frames} frames" if frames else "holds no frames")
        elif frames is not None and read < frames - (tolerance if frames > tolerance else 0):
            problem = SourceProblem(item.label, f"read {read} of {frames} frames")
            self.problems.append(problem)
            self._report(f"incomplete: {problem}")

    def _remote(self, make: Callable[..., Frame], item: SourceItem) -> Iterator[Frame]:
        """An image or a finite video behind a URL is read now, a live source is kept for later."""
        if item.kind == "webcam":
            reopen = partial(open_webcam, int(item.text))
            capture = reopen()
        else:
            limits = self._stream
            answer = ask(item.text, timeout=limits.timeout, total=limits.give_up)
            if answer.image is not None:
                yield make(decode_image(answer.image), "image", frames=1)
                return
            capture = open_url(answer.url, timeout=limits.timeout)
            reopen = partial(_reopen, item.text, limits)
        if capture.frames is not None:
            yield from self._video(make, item, capture)
            return
        stream = LiveStream(
            capture,
            reopen,
            self._stream,
            stride=self._stride,
            changed=self._changed,
            report=lambda line: self._report(f"{item.label}: {line}"),
        )
        self._live.append((make, item, stream))

    def _streams(self) -> Iterator[Frame]:
        """The newest frame of each live stream in turn, until all are lost."""
        waiting = list(self._live)
        while waiting:
            with self._changed:
                self._changed.wait_for(lambda: any(s.ready for *_, s in waiting), timeout=WAKE)
            for entry in tuple(waiting):
                make, item, stream = entry
                newest = stream.take()
                if newest is not None:
                    image, number = newest
                    yield make(image, "stream", number=number, fps=stream.fps)
                elif stream.lost is not None:
                    waiting.remove(entry)
                    self._fail(item.label, stream.lost, lost=True)


def _read_image(path: Path) -> np.ndarray:
    data = read_bytes(path)
    if image_format(data) == "GIF" and path.suffix.lower() != ".gif":
        raise ImageError("GIF data under another name")
    with DecoderLog() as log:
        image = decode_image(data)
        complaint = log.complaint(0) or ""
    if INCOMPLETE in complaint:
        raise ImageError(complaint)
    return image


def _reopen(url: str, limits: StreamConfig) -> Capture:
    answer = ask(url, timeout=limits.timeout, total=limits.give_up)
    return open_url(answer.url, timeout=limits.timeout)
