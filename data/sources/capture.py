"""OpenCV's video capture, opened with limits: which protocols, how long, how large."""

from __future__ import annotations

import math
import os
import threading
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
MILLISECONDS = 1000

_environment_lock = threading.Lock()


class CaptureError(Exception):
    """A video, camera or URL that cannot be opened; the text is the cause, without the name."""


class Capture:
    """Frames of one opened video, one after another, as RGB."""

    def __init__(self, capture: cv2.VideoCapture) -> None:
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
    capture = _open(str(path), LOCAL_PROTOCOLS, timeout=None)
    if not capture.isOpened():
        raise CaptureError("no readable video (truncated, or of an unknown format)")
    return Capture(capture)


def open_url(url: str, *, timeout: float) -> Capture:
    """Open an http(s) or rtsp URL within `timeout` seconds; redirects are not followed.

    Raises CaptureError with the cause.
    """
    capture = _open(url, REMOTE_PROTOCOLS, timeout=timeout)
    if not capture.isOpened():
        raise CaptureError(f"sent no readable video within {timeout:g} s")
    return Capture(capture)


def open_webcam(index: int) -> Capture:
    """Open the camera of this number. Raises CaptureError."""
    _quiet()
    capture = cv2.VideoCapture(index)
    if not capture.isOpened():
        raise CaptureError("no such camera, or it is in use")
    return Capture(capture)


def _open(name: str, protocols: str, *, timeout: float | None) -> cv2.VideoCapture:
    _quiet()
    limits = []
    if timeout is not None:
        wait = round(timeout * MILLISECONDS)
        limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, wait, cv2.CAP_PROP_READ_TIMEOUT_MSEC, wait]
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
