"""Images, videos and streams as one sequence of frames, for detection."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data.index.decoder import decode_whole
from data.sources.capture import (
    Capture,
    CaptureError,
    LiveStream,
    StreamConfig,
    open_url,
    open_video,
    open_webcam,
)
from data.sources.locate import SourceItem, resolve
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


class Sources:
    """What one or several `--source` values mean, to be iterated over once or more.

    A value is an image, a video, a directory, a glob pattern, a list file (.txt, a path per line),
    a webcam number or an http(s)/rtsp URL.  Bad ones are reported by name and cause as they come,
    kept in `problems`, and passed over.  Live streams are read last and all at once, each giving
    its newest frame.

    The constructor raises UserError when a single value is missing, empty or forbidden.  Iteration
    ends with UserError when nothing at all could be read, and with SourceLostError when a stream
    could not be recovered.
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
        self.problems: list[str] = []  # 'label: cause' of what was not, or not wholly, read
        self._stride = stride
        self._limits = stream or StreamConfig()
        self._report = report
        self._live: list[tuple[Callable[..., Frame], str, LiveStream]] = []
        self._changed = threading.Condition()
        if not self.items and not self._bad:
            raise UserError("no source given")

    def __len__(self) -> int:
        return len(self.items)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are to be read; they must not be written to."""
        return tuple(Path(item.text) for item in self.items if item.kind in LOCAL)

    def has_at_least(self, count: int) -> bool:
        """Whether `count` frames or more are to be expected, by what the files state.

        A webcam or an RTSP stream has them, another URL counts as one.
        """
        for item in self.items:
            frames = 1
            if item.kind == "webcam" or item.text.startswith("rtsp"):
                return True
            if item.kind == "video":
                with contextlib.suppress(CaptureError):  # reported when its turn comes
                    capture = open_video(Path(item.text))
                    frames = capture.frames or count
                    capture.release()
            count -= frames
        return count <= 0

    def __iter__(self) -> Iterator[Frame]:
        self.problems = []
        for label, cause in self._bad:
            self._fail("skipped", label, cause)
        count = 0
        try:
            for frame in self._all():
                count += 1
                yield frame
        finally:
            for *_, stream in self._live:
                stream.close()
            self._live = []
        if not count:
            total = len(self.items) + len(self._bad)
            raise UserError(f"nothing could be read: {len(self.problems)} of {total} failed")

    def _fail(self, how: str, label: str, cause: str) -> None:
        self.problems.append(f"{label}: {cause}")
        self._report(f"{how}: {label}: {cause}")

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
                self._fail("skipped", item.label, str(error))
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
            cause = f"read 0 of {frames} frames" if frames else "holds no frames"
            self._fail("skipped", item.label, cause)
        elif frames is not None and read < frames - (tolerance if frames > tolerance else 0):
            self._fail("incomplete", item.label, f"read {read} of {frames} frames")

    def _remote(self, make: Callable[..., Frame], item: SourceItem) -> Iterator[Frame]:
        """An image or a finite video behind a URL is read now, a live source is kept for later."""
        if item.kind == "webcam":
            reopen = partial(open_webcam, int(item.text))
            capture = reopen()
        else:
            reopen = partial(_reopen, item.text, self._limits)
            answer = ask(item.text, self._limits)
            if isinstance(answer, bytes):
                yield make(decode_image(answer), "image", frames=1)
                return
            capture = open_url(answer, timeout=self._limits.timeout)
        if capture.frames is not None:
            yield from self._video(make, item, capture)
            return
        stream = LiveStream(
            capture,
            reopen,
            self._limits,
            self._stride,
            self._changed,
            report=lambda line: self._report(f"{item.label}: {line}"),
        )
        self._live.append((partial(make, kind="stream", fps=capture.fps), item.label, stream))

    def _streams(self) -> Iterator[Frame]:
        """The newest frame of each live stream in turn, until all are lost: SourceLostError."""
        waiting, lost = list(self._live), []
        while waiting:
            with self._changed:
                self._changed.wait_for(
                    lambda: any(s.newest is not None or s.lost for *_, s in waiting), timeout=WAKE
                )
            for entry in tuple(waiting):
                make, label, stream = entry
                newest = stream.take()
                if newest is not None:
                    yield make(newest[0], number=newest[1])
                elif stream.lost is not None:
                    waiting.remove(entry)
                    self._fail("lost", label, stream.lost)
                    lost.append(self.problems[-1])
        if lost:
            raise SourceLostError("; ".join(lost))


def _read_image(path: Path) -> np.ndarray:
    data = read_bytes(path)
    if image_format(data) == "GIF" and path.suffix.lower() != ".gif":
        raise ImageError("GIF data under another name")
    return decode_whole(data)[0]


def _reopen(url: str, limits: StreamConfig) -> Capture:
    answer = ask(url, limits)
    return open_url(url if isinstance(answer, bytes) else answer, timeout=limits.timeout)
