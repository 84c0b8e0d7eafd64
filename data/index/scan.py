"""Check every image of a split: is it complete, how large is it; and report what was wrong.

Where there is little to decode, images are decoded; else headers and ends of files are read, which
shows what was cut off, but no damage in between.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.index.columns import ImageCheck, ImageChecks, Texts
from data.index.decoder import INCOMPLETE, DecoderLog
from data.index.files import file_states, map_files
from data.index.records import Problem
from utils.headers import size_by_header
from utils.images import (
    MAX_BYTES,
    cause_of,
    image_format,
    image_size,
    read_bytes,
)
from utils.terminal import is_main_rank, warn_main

MIN_SIDE = 10  # pixels; on less there is nothing to detect
SHOWN = 10  # problems written to stderr; the report file has all
DECODED = 1 << 30  # bytes of images; a core decodes as many in about ten seconds
_EDGE = 16 << 10  # bytes hashed at either end of a file to know it again


def scan_images(
    paths: Texts, known_paths: Texts, known: ImageChecks, *, decode: bool = False
) -> ImageChecks:
    """One check for each path; `known` ones whose file has not changed are not read again.

    Other images are decoded if they have at most DECODED bytes together.  With `decode` all images
    are, known or not.  What libjpeg complained about meanwhile is decoded once more, alone, to
    learn which image it is.
    """
    checks = ImageChecks.of(file_states(paths))
    old = np.arange(len(paths))
    if known_paths != paths:
        places = {path: i for i, path in enumerate(known_paths)}
        old = np.array([places.get(path, -1) for path in paths], np.int64)
    if decode:
        old[:] = -1
    kept = np.flatnonzero((old >= 0) & (checks.states[:, 2] > 0))
    kept = kept[(checks.states[kept] == known.states[old[kept]]).all(1)]
    checks.edges[kept], checks.sizes[kept] = known.edges[old[kept]], known.sizes[old[kept]]
    now = np.full(len(known_paths), -1)
    now[old[kept]] = kept
    checks.causes.update({int(now[i]): text for i, text in known.causes.items() if now[i] >= 0})
    todo = np.delete(np.arange(len(paths)), kept)
    decode = decode or checks.states[todo, 0].sum() <= DECODED
    _look_at(
        todo, paths, checks, lambda i: known[int(old[i])] if old[i] >= 0 else None, decode=decode
    )
    return checks


def _look_at(
    todo: np.ndarray,
    paths: Texts,
    checks: ImageChecks,
    known: Callable[[int], ImageCheck | None],
    *,
    decode: bool,
) -> None:
    """Check the images `todo`, of which a former scan may have known some."""

    def check(i: int) -> tuple[int, ImageCheck, bool]:
        printed, before = log.size(), known(i)
        found = check_image(paths[i], before, decode=decode)
        return i, found, found is not before and log.size() != printed

    def check_alone(path: str) -> ImageCheck:
        start = log.size()
        found = check_image(path, decode=True)
        complaint = log.complaint(start)
        if complaint is None or found.cause is not None:
            return found
        usable = replace(found, cause=complaint)
        return replace(usable, height=0, width=0) if INCOMPLETE in complaint else usable

    with DecoderLog() as log:
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
        for i, found, suspect in map_files(check, todo.tolist(), parallel=decode):
            checks[i] = found
            if suspect:
                suspects.append(i)
            bar.update()
        bar.close()
        for i in suspects:
            checks[i] = check_alone(paths[i])


def check_image(path: str, known: ImageCheck | None = None, *, decode: bool) -> ImageCheck:
    """Size of an image as decoded, or the cause why it cannot be used.

    `known` is returned when size, time and the hash of the file's two ends are still its own.
    Without `decode` only files are decoded whose header and end do not show that they are whole.
    """
    found, sides = ImageCheck(0, 0, ""), None
    try:
        status = os.stat(path)  # noqa: PTH116  a Path for each image takes time
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            read_bytes(path)  # names the cause
        with open(path, "rb", buffering=_EDGE) as file:  # noqa: PTH123
            head = file.read(_EDGE)
            file.seek(max(0, status.st_size - _EDGE))
            tail = file.read(_EDGE)
            edges = hashlib.blake2b(head + tail, digest_size=16).hexdigest()
            found = ImageCheck(status.st_size, status.st_mtime_ns, edges)
            if known is not None and found == replace(known, height=0, width=0, cause=None):
                return known
            if not decode:
                sides = size_by_header(file, tail)
        if sides is None:
            data = read_bytes(path)
            if image_format(data) == "GIF":
                return replace(found, cause="GIF; not an image format that is read")
            sides = image_size(data)
    except Exception as error:
        return replace(found, cause=cause_of(path, error))
    height, width = sides
    if min(height, width) < MIN_SIDE:
        cause = f"{width}x{height} pixels; a side under {MIN_SIDE} shows nothing"
        return replace(found, cause=cause)
    return replace(found, height=height, width=width)


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
