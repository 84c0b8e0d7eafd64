"""Decode images one at a time, and learn what libjpeg complains about meanwhile."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import threading
from typing import IO

import numpy as np

from utils.images import ImageError, decode_image

INCOMPLETE = "remature end"  # in complaints about an image whose rest was filled with grey
_COMPLAINT = re.compile(rb"(?:Corrupt JPEG data|Premature end of JPEG file)[^\n]*\n?")
_STDERR = 2  # file descriptor


class DecoderLog:
    """What libjpeg writes to the process's stderr, where no line names its image.

    While entered, file descriptor 2 leads into a file in memory; at the end libjpeg's complaints
    are dropped and the rest is passed on.  One thread enters at a time; others wait.  Where the
    system has no room for that, nothing is redirected and nothing is found; nor on Windows, which
    cannot read at a place of a file.
    """

    turn = threading.RLock()  # two at once would restore descriptor 2 in the wrong order

    def __enter__(self) -> DecoderLog:
        self._mine = self.turn
        self._mine.acquire()
        self.stderr: IO[str] = sys.stderr  # for a progress bar: the terminal
        self._saved: int | None = None
        if not hasattr(os, "pread"):
            return self
        with contextlib.suppress(OSError, ValueError):  # no descriptor, or no temporary folder
            if hasattr(os, "memfd_create"):
                self._file: IO[bytes] = os.fdopen(os.memfd_create("stderr"), "w+b")
            else:
                self._file = tempfile.TemporaryFile()
            self._saved = os.dup(_STDERR)
            os.dup2(self._file.fileno(), _STDERR)
            if sys.stderr.fileno() == _STDERR:
                self.stderr = os.fdopen(os.dup(self._saved), "w")
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._restore()
        finally:
            self._mine.release()

    def _restore(self) -> None:
        if self._saved is None:
            return
        os.dup2(self._saved, _STDERR)
        os.close(self._saved)
        if self.stderr is not sys.stderr:
            self.stderr.close()
        rest = _COMPLAINT.sub(b"", os.pread(self._file.fileno(), self.size(), 0))
        self._file.close()
        if rest:
            os.write(_STDERR, rest)

    def size(self) -> int:
        """Bytes written so far."""
        return 0 if self._saved is None else os.fstat(self._file.fileno()).st_size

    def complaint(self, start: int) -> str | None:
        """The first complaint since there were `start` bytes."""
        if self.size() == start:
            return None
        found = _COMPLAINT.search(os.pread(self._file.fileno(), self.size() - start, start))
        return found[0].decode().strip() if found else None


def decode_whole(data: bytes, *, reduce: int = 1) -> tuple[np.ndarray, str | None]:
    """`decode_image`, and libjpeg's complaint if there is one.

    Raises ImageError also where the rest of the image was filled with grey.
    """
    with DecoderLog() as log:
        image = decode_image(data, reduce=reduce)
        complaint = log.complaint(0)
    if complaint is not None and INCOMPLETE in complaint:
        raise ImageError(complaint)
    return image, complaint
