"""Check every image of a split: is it complete, how large is it; and report what was wrong."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import IO

from tqdm import tqdm

from data.index.records import Entry, ImageCheck, Problem
from utils.images import ImageError, cause_of, decode_image, image_format, read_bytes
from utils.terminal import is_main_rank, warn_main

INCOMPLETE = "remature end"  # in complaints about an image whose rest was filled with grey
MIN_SIDE = 10  # pixels; on less there is nothing to detect
SHOWN = 10  # problems written to stderr; the report file has all
_COMPLAINT = re.compile(rb"(?:Corrupt JPEG data|Premature end of JPEG file)[^\n]*\n?")
_STDERR = 2  # file descriptor
_EDGE = 64 << 10  # bytes hashed at either end of a file to know it again
_MAX_THREADS = 16


class DecoderLog:
    """What libjpeg writes to the process's stderr, where no line names its image.

    While entered, file descriptor 2 leads into a temporary file; at the end libjpeg's complaints
    are dropped and the rest is passed on.  Where the system has no room for that, nothing is
    redirected and nothing is found.
    """

    def __enter__(self) -> DecoderLog:
        self.stderr: IO[str] = sys.stderr  # for a progress bar: the terminal
        self._saved: int | None = None
        with contextlib.suppress(OSError, ValueError):  # no descriptor, or no temporary folder
            self._file = tempfile.TemporaryFile()
            self._saved = os.dup(_STDERR)
            os.dup2(self._file.fileno(), _STDERR)
            if sys.stderr.fileno() == _STDERR:
                self.stderr = os.fdopen(os.dup(self._saved), "w")
        return self

    def __exit__(self, *exception: object) -> None:
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


def scan_images(entries: Sequence[Entry], known: Mapping[str, ImageCheck]) -> list[ImageCheck]:
    """One check for each entry, in order; `known` ones (by path) are not decoded again.

    Every other image is decoded as a whole, in threads (OpenCV and Pillow release the lock).  What
    libjpeg complained about meanwhile is decoded once more, alone, to learn which image it is.
    """

    def check(entry: Entry) -> tuple[ImageCheck, bool]:
        before, kept = log.size(), known.get(str(entry.path))
        found = check_image(entry.path, kept)
        return found, found is not kept and log.size() != before

    def check_alone(path: Path) -> ImageCheck:
        before = log.size()
        found = check_image(path)
        complaint = log.complaint(before)
        if complaint is None or found.cause is not None:
            return found
        usable = replace(found, cause=complaint)
        return replace(usable, height=0, width=0) if INCOMPLETE in complaint else usable

    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    with DecoderLog() as log, ThreadPoolExecutor(threads) as pool:
        bar = tqdm(
            pool.map(check, entries),
            total=len(entries),
            desc="scan",
            unit="img",
            dynamic_ncols=True,
            disable=not is_main_rank(),
            file=log.stderr,
        )
        return [
            check_alone(entry.path) if suspect else found
            for entry, (found, suspect) in zip(entries, list(bar), strict=True)
        ]


def check_image(path: Path, known: ImageCheck | None = None) -> ImageCheck:
    """Size of an image as decoded, or the cause why it cannot be used.

    `known` is returned when size, time and the hash of the file's two ends are still its own.
    """
    try:
        status = path.stat()
        size, time = status.st_size, status.st_mtime_ns
        if known is not None and (known.size, known.mtime_ns) == (size, time):
            with path.open("rb") as file:
                if known.edges == _hash_ends(file, size):
                    return known
        data = read_bytes(path)
    except Exception as error:
        return ImageCheck(0, 0, "", cause=cause_of(path, error))
    found = ImageCheck(size, time, _hash_ends(BytesIO(data), len(data)))
    if image_format(data) == "GIF":
        return replace(found, cause="GIF; not an image format that is read")
    try:
        height, width = decode_image(data).shape[:2]
    except ImageError as error:
        return replace(found, cause=str(error))
    if min(height, width) < MIN_SIDE:
        cause = f"{width}x{height} pixels; a side under {MIN_SIDE} shows nothing"
        return replace(found, cause=cause)
    return replace(found, height=height, width=width)


def _hash_ends(file: IO[bytes], size: int) -> str:
    head = file.read(_EDGE)
    file.seek(max(0, size - _EDGE))
    return hashlib.blake2b(head + file.read(_EDGE), digest_size=16).hexdigest()


def report_problems(problems: Sequence[Problem], report: Path) -> None:
    """The first problems on stderr; all of them in the file `report`, when it can be written."""
    if not is_main_rank():
        return
    for problem in problems[:SHOWN]:
        warn_main(problem.text)
    more = f"all in {report}"
    text = "".join(f"{problem.text}\n" for problem in problems)
    try:
        report.unlink(missing_ok=True)  # of an earlier scan
        if problems:
            report.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        more = f"{report} cannot be written: {error.strerror}"
    if len(problems) > SHOWN:
        warn_main(f"... and {len(problems) - SHOWN} more; {more}")
