"""A window for --view-img, where the machine has a display."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import cv2
import numpy as np

from engine.predict.predictor import Result
from utils.errors import UserError

PROBE = "import cv2; cv2.namedWindow('probe'); cv2.destroyAllWindows()"
PROBE_SECONDS = 20
QUIT_KEYS = frozenset({ord("q"), 27})  # q, Escape


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


def show(result: Result, drawn: np.ndarray) -> bool:
    """Show an annotated RGB frame, an image until a key is pressed; False for q or Escape."""
    frame = result.frame
    cv2.imshow(frame.label if frame else "image", cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
    moving = frame is not None and frame.kind != "image"
    return cv2.waitKey(1 if moving else 0) & 0xFF not in QUIT_KEYS
