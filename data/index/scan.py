"""Check every image of a split: is it complete, how large is it; and report what was wrong."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from data.index.decoder_log import INCOMPLETE, DecoderLog
from data.index.labels import Entry, ImageCheck
from data.index.records import Problem
from utils.images import ImageError, cause_of, decode_image, image_format, read_bytes
from utils.ranks import is_main_rank, warn_main

MIN_SIDE = 10  # pixels; on less there is nothing to detect
SHOWN = 10  # problems written to stderr; the report file has all
_EDGE = 64 << 10  # bytes hashed at either end of a file to know it again
_MAX_THREADS = 16


def scan_images(
    entries: Sequence[Entry], known: Mapping[str, ImageCheck], *, progress: bool = True
) -> list[ImageCheck]:
    """One check for each entry, in order; `known` ones (by path) are not decoded again.

    Every other image is decoded as a whole, in threads (OpenCV and Pillow release the lock).  What
    libjpeg complained about meanwhile is decoded once more, alone, to learn which image it is.
    """

    def check(entry: Entry) -> tuple[ImageCheck, bool]:
        before, kept = log.size(), known.get(str(entry.path))
        found = check_image(entry.path, kept)
        return found, found is not kept and log.size() != before

    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    with DecoderLog() as log, ThreadPoolExecutor(threads) as pool:
        bar = tqdm(
            pool.map(check, entries),
            total=len(entries),
            desc="scan",
            unit="img",
            dynamic_ncols=True,
            disable=not progress or not is_main_rank(),
            file=log.stderr,
        )
        found = list(bar)
        return [
            _check_alone(entry.path, log) if suspect else check
            for entry, (check, suspect) in zip(entries, found, strict=True)
        ]


def _check_alone(path: Path, log: DecoderLog) -> ImageCheck:
    before = log.size()
    check = check_image(path)
    complaint = log.complaint(before)
    if complaint is None or check.cause is not None:
        return check
    if INCOMPLETE in complaint:
        return replace(check, height=0, width=0, cause=complaint)
    return replace(check, note=complaint)


def check_image(path: Path, known: ImageCheck | None = None) -> ImageCheck:
    """Size of an image as decoded, or the cause why it cannot be used.

    `known` is returned when size, time and the hash of the file's two ends are still its own.
    """
    try:
        status = path.stat()
        if known is not None and (known.size, known.mtime_ns) == (
            status.st_size,
            status.st_mtime_ns,
        ):
            with path.open("rb") as file:
                head = file.read(_EDGE)
                file.seek(max(0, status.st_size - _EDGE))
                if known.edges == _hash_ends(head, file.read(_EDGE)):
                    return known
        data = read_bytes(path)
    except Exception as error:
        return ImageCheck(0, 0, "", cause=cause_of(path, error))
    edges = _hash_ends(data[:_EDGE], data[max(0, len(data) - _EDGE) :])
    height, width, cause = _inspect(data)
    return ImageCheck(status.st_size, status.st_mtime_ns, edges, height, width, cause)


def _hash_ends(head: bytes, tail: bytes) -> str:
    return hashlib.blake2b(head + tail, digest_size=16).hexdigest()


def _inspect(data: bytes) -> tuple[int, int, str | None]:
    if image_format(data) == "GIF":
        return 0, 0, "GIF; not an image format that is read"
    try:
        height, width = decode_image(data).shape[:2]
    except ImageError as error:
        return 0, 0, error.cause
    if min(height, width) < MIN_SIDE:
        return 0, 0, f"{width}x{height} pixels; a side under {MIN_SIDE} shows nothing"
    return height, width, None


def report_problems(problems: Sequence[Problem], report: Path) -> None:
    """The first problems on stderr; all of them in the file `report`, when it can be written."""
    if not is_main_rank():
        return
    if not problems:
        with contextlib.suppress(OSError):
            report.unlink()  # of an earlier scan
        return
    for problem in problems[:SHOWN]:
        warn_main(problem.text)
    more = f"all in {report}"
    try:
        text = "".join(f"{problem.text}\n" for problem in problems)
        report.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        more = f"{report} cannot be written: {error.strerror}"
    if len(problems) > SHOWN:
        warn_main(f"... and {len(problems) - SHOWN} more; {more}")
