"""Check every image of a split: is it complete, how large is it; and report what was wrong."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from data.index.columns import ImageCheck, ImageChecks, Texts, file_states
from data.index.records import Problem
from utils.images import ImageError, cause_of, image_format, image_size, read_bytes
from utils.terminal import is_main_rank, warn_main

INCOMPLETE = "remature end"  # in complaints about an image whose rest was filled with grey
MIN_SIDE = 10  # pixels; on less there is nothing to detect
SHOWN = 10  # problems written to stderr; the report file has all
_COMPLAINT = re.compile(rb"(?:Corrupt JPEG data|Premature end of JPEG file)[^\n]*\n?")
_STDERR = 2  # file descriptor
_EDGE = 16 << 10  # bytes hashed at either end of a file to know it again
_MAX_THREADS = 16
_AT_ONCE = 64  # images that a thread takes at a time


class DecoderLog:
    """What libjpeg writes to the process's stderr, where no line names its image.

    While entered, file descriptor 2 leads into a temporary file; at the end libjpeg's complaints
    are dropped and the rest is passed on.  Where the system has no room for that, nothing is
    redirected and nothing is found; nor on Windows, which cannot read at a place of a file.
    """

    def __enter__(self) -> DecoderLog:
        self.stderr: IO[str] = sys.stderr  # for a progress bar: the terminal
        self._saved: int | None = None
        if not hasattr(os, "pread"):
            return self
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


def scan_images(paths: Texts, known_paths: Texts, known: ImageChecks) -> ImageChecks:
    """One check for each path; `known` ones whose file has not changed are not read again.

    Every other image is decoded, in threads (OpenCV and Pillow release the lock).  What libjpeg
    complained about meanwhile is decoded once more, alone, to learn which image it is.
    """
    checks = ImageChecks.of(file_states(paths))
    old = np.arange(len(paths))
    if known_paths != paths:
        places = {path: i for i, path in enumerate(known_paths)}
        old = np.array([places.get(path, -1) for path in paths], np.int64)
    kept = np.flatnonzero((old >= 0) & (checks.states[:, 2] > 0))
    kept = kept[(checks.states[kept] == known.states[old[kept]]).all(1)]
    checks.edges[kept], checks.sizes[kept] = known.edges[old[kept]], known.sizes[old[kept]]
    now = np.full(len(known_paths), -1)
    now[old[kept]] = kept
    checks.causes.update({int(now[i]): text for i, text in known.causes.items() if now[i] >= 0})
    _look_at(np.delete(np.arange(len(paths)), kept), paths, checks, known, old)
    return checks


def _look_at(
    todo: np.ndarray, paths: Texts, checks: ImageChecks, known: ImageChecks, old: np.ndarray
) -> None:
    """Check the images `todo`; image i is number old[i] in `known`, or -1."""

    def check(some: Sequence[int]) -> list[tuple[int, ImageCheck, bool]]:
        results = []
        for i in some:
            printed = log.size()
            kept = known[int(old[i])] if old[i] >= 0 else None
            found = check_image(Path(paths[i]), kept)
            results.append((i, found, found is not kept and log.size() != printed))
        return results

    def check_alone(path: Path) -> ImageCheck:
        before = log.size()
        found = check_image(path)
        complaint = log.complaint(before)
        if complaint is None or found.cause is not None:
            return found
        usable = replace(found, cause=complaint)
        return replace(usable, height=0, width=0) if INCOMPLETE in complaint else usable

    chunks = [todo[start : start + _AT_ONCE].tolist() for start in range(0, len(todo), _AT_ONCE)]
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    with DecoderLog() as log, ThreadPoolExecutor(threads) as pool:
        bar = tqdm(
            total=len(paths),
            initial=len(paths) - len(todo),
            desc="scan",
            unit="img",
            dynamic_ncols=True,
            disable=not is_main_rank(),
            file=log.stderr,
        )
        suspects = []
        for some in pool.map(check, chunks):
            for i, found, suspect in some:
                checks[i] = found
                if suspect:
                    suspects.append(i)
            bar.update(len(some))
        bar.close()
        for i in suspects:
            checks[i] = check_alone(Path(paths[i]))


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
        height, width = image_size(data)
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
