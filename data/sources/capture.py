"""OpenCV's video capture, opened with limits (protocols, time, size), and live streams of it."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.images import MAX_PIXELS

LOCAL_PROTOCOLS = "file"
REMOTE_PROTOCOLS = "http,https,tcp,tls,crypto,rtsp,rtp,udp,httpproxy"
# FFmpeg's names of formats that hold their own data. Playlists (HLS, DASH, ffconcat, SDP) are not
# among them, whatever a file calls itself: they would make FFmpeg read other files and hosts.
FORMATS = (
    "asf,avi,flv,matroska,mov,mpeg,mpegts,mpegvideo,m4v,h264,hevc,ogg,gif,mjpeg,mpjpeg,rtsp,"
    "jpeg_pipe,png_pipe,bmp_pipe,webp_pipe"
)
OPTIONS = "OPENCV_FFMPEG_CAPTURE_OPTIONS"  # read by OpenCV each time a capture is opened

_environment_lock = threading.Lock()


class CaptureError(Exception):
    """A video, camera or URL that cannot be opened; the text is the cause, without the name."""


class Capture:
    """Frames of one video, one after another, as RGB. CaptureError with `cause` if not open."""

    def __init__(self, capture: cv2.VideoCapture, cause: str) -> None:
        if not capture.isOpened():
            raise CaptureError(cause)
        self._capture = capture
        width, height = (
            capture.get(key) for key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)
        )
        if width * height > MAX_PIXELS:
            capture.release()
            raise CaptureError(
                f"{width:.0f}x{height:.0f} pixels; more than {MAX_PIXELS} are not decoded"
            )
        fps = capture.get(cv2.CAP_PROP_FPS)
        frames = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.fps: float | None = fps if math.isfinite(fps) and 0 < fps <= 1000 else None
        self.frames: int | None = int(frames) if 0 < frames < 1e12 else None  # None: endless

    def skip(self) -> bool:
        """Step over one frame without decoding its colours; False at the end."""
        return bool(self._capture.grab())

    def frame(self) -> np.ndarray | None:
        """The frame that `skip` stepped to, (H, W, 3) uint8 RGB."""
        done, image = self._capture.retrieve()
        if not done or image is None or not image.size:
            return None
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB if image.ndim == 2 else cv2.COLOR_BGR2RGB)

    def release(self) -> None:
        """Close it; may be called twice."""
        self._capture.release()


def open_video(path: Path) -> Capture:
    """Open a video file. Raises CaptureError with the cause."""
    try:
        if path.stat().st_size == 0:
            raise CaptureError("empty file")
    except OSError as error:
        raise CaptureError(error.strerror or str(error)) from error
    capture = _open(str(path), LOCAL_PROTOCOLS, [])
    return Capture(capture, "no readable video (truncated, or of an unknown format)")


def open_url(url: str, *, timeout: float) -> Capture:
    """Open an http(s) or rtsp URL within `timeout` seconds; redirects are not followed.

    Raises CaptureError with the cause.
    """
    wait = round(timeout * 1000)
    limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, wait, cv2.CAP_PROP_READ_TIMEOUT_MSEC, wait]
    capture = _open(url, REMOTE_PROTOCOLS, limits)
    return Capture(capture, f"sent no readable video within {timeout:g} s")


def open_webcam(index: int) -> Capture:
    """Open the camera of this number. Raises CaptureError."""
    _quiet()
    return Capture(cv2.VideoCapture(index), "no such camera, or it is in use")


def _open(name: str, protocols: str, limits: list[int]) -> cv2.VideoCapture:
    _quiet()
    with _environment_lock:
        before = os.environ.get(OPTIONS)
        own = f"protocol_whitelist;{protocols}|format_whitelist;{FORMATS}|max_redirects;0"
        os.environ[OPTIONS] = f"{before or 'rtsp_transport;tcp'}|{own}"
        try:
            return cv2.VideoCapture(name, cv2.CAP_FFMPEG, limits)
        finally:
            if before is None:
                del os.environ[OPTIONS]
            else:
                os.environ[OPTIONS] = before


def _quiet() -> None:
    """Keep the libraries' own messages off stderr: every failure is reported here in one line."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


@dataclass(frozen=True)
class StreamConfig:
    """Seconds: to wait for a connection or a frame, and to retry after frames stop."""

    timeout: float = 5.0
    give_up: float = 30.0
    first_delay: float = 0.5  # between two attempts; doubled each time
    max_delay: float = 8.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"StreamConfig.{name} must be positive, got {value}")


@dataclass(eq=False)
class LiveStream:
    """A thread that keeps the newest frame of a source without end and reconnects when it drops.

    There are no stand-in frames: while the source is away there is nothing to take.
    """

    capture: Capture  # the open connection
    reopen: Callable[[], Capture]  # CaptureError when it cannot
    config: StreamConfig
    stride: int
    changed: threading.Condition  # notified at every frame and at the loss; streams may share it
    report: Callable[[str], None]
    newest: tuple[np.ndarray, int] | None = None  # not yet taken: RGB, and its number from 1
    lost: str | None = None  # the cause, once it is given up

    def __post_init__(self) -> None:
        self._count = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="stream reader")
        self._thread.start()

    def take(self) -> tuple[np.ndarray, int] | None:
        """The newest frame and its number if it has not been taken yet."""
        with self.changed:
            newest, self.newest = self.newest, None
        return newest

    def close(self) -> None:
        """End the thread and the connection."""
        self._stop.set()
        self._thread.join(self.config.timeout + 1)

    def _run(self) -> None:
        cause = "closed"
        try:
            cause = self._read_until_lost()
        except Exception as error:  # a thread's error must not vanish
            cause = f"{type(error).__name__}: {error}"
        finally:
            self.capture.release()
            with self.changed:
                self.lost = cause
                self.changed.notify_all()

    def _read_until_lost(self) -> str:
        delay = self.config.first_delay
        last, away, cause = time.monotonic(), False, "no frame came"
        while not self._stop.is_set():
            if self._read_one():
                last, delay = time.monotonic(), self.config.first_delay
                if away:
                    self.report("reconnected")
                away = False
                continue
            self.capture.release()
            if not away:
                self.report(f"connection lost; retrying for {self.config.give_up:g} s")
            away = True
            left = last + self.config.give_up - time.monotonic()
            if left <= 0:
                return f"lost for {self.config.give_up:g} s, given up: {cause}"
            self._stop.wait(min(delay, left))
            delay = min(delay * 2, self.config.max_delay)
            try:
                self.capture = self.reopen()
            except CaptureError as error:
                cause = str(error)
        return "closed"

    def _read_one(self) -> bool:
        """Step one frame on and keep it if it is its turn; False when nothing came."""
        if not self.capture.skip():
            return False
        self._count += 1
        if (self._count - 1) % self.stride == 0:
            image = self.capture.frame()
            if image is None:
                return False
            with self.changed:
                self.newest = (image, self._count)
                self.changed.notify_all()
        return True
