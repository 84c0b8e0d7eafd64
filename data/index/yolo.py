"""Image folders and lists with YOLO label files -> columns.

Rows are 'class cx cy w h' or 'class x1 y1 x2 y2 x3 y3 ...', as fractions of the image.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.index.records import NOTE, SKIPPED_ROW, Entry, Labels, Parsed, Problem, Row
from utils.errors import UserError
from utils.images import IMAGE_SUFFIXES, MACOS, ImageError, read_bytes

MAX_LABEL_BYTES = 32 << 20
MAX_ROWS = 10_000
_MAX_LIST_BYTES = 1 << 30
_BOX = 5  # columns of a box row
_MIN_POLYGON = 7  # columns of the shortest polygon row: the class and three points
_TOLERANCE = 1e-3  # of rounding in files; what extends beyond the image is clipped anyway
# Images by name, in formats that are not read: reported, rather than silently left out.
_OTHER_SUFFIXES = frozenset({".avif", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".psd", ".svg"})


@dataclass(frozen=True)
class YoloSource:
    """A split in YOLO's form, as a data set YAML names it."""

    paths: tuple[Path, ...]  # folders and list files (.txt)
    where: tuple[str, ...]  # file:line of the YAML, one for each path
    root: Path  # image ids that need a path are relative to it


def read_yolo(source: YoloSource, names: tuple[str, ...], *, known: Parsed | None = None) -> Parsed:
    """Find the images of a split and read their labels.

    `known` is returned when it was read from the same bytes of the same files. Rows that cannot
    be used are listed in `problems`; a file that cannot be read spoils its image. Raises UserError
    for a path that does not exist and for a label path that is a directory.
    """
    paths, problems = list_images(source)
    stems = [path.stem for path in paths]
    ids = [int(s) if s.isascii() and s.isdecimal() and len(s) < 19 else s for s in stems]
    uses = Counter(ids)
    label_folder = functools.cache(_label_folder)
    entries = []
    for path, image_id in zip(paths, ids, strict=True):
        if uses[image_id] > 1:
            inside = path.is_relative_to(source.root)
            image_id = (path.relative_to(source.root) if inside else path).as_posix()
        label_file = label_folder(path.parent) / f"{path.stem}.txt"
        entries.append(Entry(path, image_id, label_file=label_file))
    contents = [_content(entry.label_file) for entry in entries]
    digest = hashlib.blake2b(f"{names}\n{problems}".encode("utf-8", "replace"), digest_size=16)
    for entry, content in zip(entries, contents, strict=True):
        mark = hashlib.blake2b(content).digest() if isinstance(content, bytes) else repr(content)
        text = f"\n{entry.path}\n{entry.label_file}\n{mark!r}"
        digest.update(text.encode("utf-8", "surrogateescape"))
    if known is not None and known.digest == digest.hexdigest():
        return known
    rows: list[Row] = []
    for i, (entry, content) in enumerate(zip(entries, contents, strict=True)):
        try:
            lines = split_rows(content)
        except (ValueError, ImageError) as error:
            problems.append(Problem(str(entry.label_file), str(error), image=i))
            continue
        for number, columns in lines:
            try:
                label, box, polygon = parse_row(columns, len(names))
                rows.append(Row(i, label, box, number, polygon))
            except ValueError as error:
                where = f"{entry.label_file}:{number}"
                problems.append(Problem(where, str(error), SKIPPED_ROW, i))
    return Parsed(
        entries=tuple(entries),
        labels=Labels.of(rows),
        names=names,
        category_ids=tuple(range(len(names))),
        problems=tuple(problems),
        annotations=None,
        digest=digest.hexdigest(),
    )


def split_rows(content: bytes | ImageError) -> list[tuple[int, list[str]]]:
    """The line number, from 1, and the columns of each row of a label file.

    Raises ValueError with the cause when it is not text or has more than MAX_ROWS rows, and an
    ImageError that is given instead of the content.
    """
    if isinstance(content, ImageError):
        raise content
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start})") from error
    if "\0" in text:
        raise ValueError("binary data, not text")
    rows = [(n, line.split()) for n, line in _lines(text)]
    if len(rows) > MAX_ROWS:
        raise ValueError(f"{len(rows)} rows; more than {MAX_ROWS} are not read")
    return rows


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, each with its number; ended by LF, CRLF or CR."""
    # str.splitlines would also split at form feeds and the like
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return ((n, line.strip()) for n, line in enumerate(lines, start=1) if line.strip())


def parse_row(row: Sequence[str], classes: int) -> tuple[int, tuple[float, ...], np.ndarray | None]:
    """Columns -> class, box (xyxy) and polygon (P, 2) or None. Raises ValueError with the cause."""
    if any("," in text for text in row):
        raise ValueError("commas; numbers are separated by spaces")
    if len(row) != _BOX and (len(row) < _MIN_POLYGON or not len(row) % 2):
        hint = " (a prediction with its confidence?)" if len(row) == _BOX + 1 else ""
        raise ValueError(f"{len(row)} columns{hint}; a box has 5, a polygon an odd number from 7")
    number, *values = map(_number, row)
    polygon = None
    x, y, w, h = values[:4]
    if len(row) != _BOX:
        polygon = np.array(values).reshape(-1, 2)
        (left, top), (right, bottom) = polygon.min(0).tolist(), polygon.max(0).tolist()
        x, y, w, h = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
    if number != round(number):
        raise ValueError(f"class {number:g} is not a whole number")
    if not 0 <= number < classes:
        raise ValueError(f"class {number:g}; the data set has the classes 0 to {classes - 1}")
    if not (w > 0 and h > 0):
        raise ValueError(f"width {w:g} and height {h:g} must be positive")
    low, high = -_TOLERANCE, 1 + _TOLERANCE
    if not (low <= x <= high and low <= y <= high and w <= high and h <= high):
        raise ValueError(
            f"centre ({x:g}, {y:g}), size ({w:g}, {h:g}): the centre must lie in the image and "
            "the size in it, as fractions of 0 to 1"
        )
    return int(number), (x - w / 2, y - h / 2, x + w / 2, y + h / 2), polygon


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ValueError(f"{text[:40]!r} is not a number") from None
    if not math.isfinite(number):
        raise ValueError("nan or inf is not a position")
    return number


def list_images(source: YoloSource) -> tuple[list[Path], list[Problem]]:
    """All images of a split in a fixed order, each once, and what was passed over."""
    problems: list[Problem] = []
    found: dict[Path, None] = {}
    for start, where in zip(source.paths, source.where, strict=True):
        for path, origin in _listed(start, where, problems):
            suffix = path.suffix.lower()
            if suffix not in IMAGE_SUFFIXES:
                if suffix in _OTHER_SUFFIXES or origin != str(path):
                    kind = suffix[1:].upper() or "a file without suffix"
                    problems.append(Problem(origin, f"{kind}; not an image format that is read"))
            elif path in found:
                problems.append(Problem(origin, f"{path} is listed twice; used once", NOTE))
            else:
                found[path] = None
    return list(found), problems


def _listed(path: Path, where: str, problems: list[Problem]) -> Iterator[tuple[Path, str]]:
    """Paths in a folder or a list file, each with where it was found."""
    try:
        if path.is_dir():
            return ((file, str(file)) for file in _walk(path, problems))
        if path.is_file() and path.suffix == ".txt":
            return _read_list(path)
        known = path.exists()
        cause = (
            "neither a folder nor a list file (.txt)" if known else "no such folder or list file"
        )
    except OSError as error:
        cause = str(error.strerror)
    raise UserError(f"{where}: {path}: {cause}")


def _walk(folder: Path, problems: list[Problem]) -> Iterator[Path]:
    """Files below a folder, sorted; linked folders are followed, each once."""
    seen: set[tuple[int, int]] = set()

    def unreadable(error: OSError) -> None:
        problems.append(Problem(str(error.filename), f"folder: {error.strerror}"))

    for here, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        status = Path(here).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        for name in sorted(files):
            if not name.startswith(MACOS):
                yield Path(here, name)


def _read_list(file: Path) -> Iterator[tuple[Path, str]]:
    """Paths in a list file, one a line, relative to the file's folder; with 'file:line'."""
    try:
        text = read_bytes(file, limit=_MAX_LIST_BYTES).decode("utf-8-sig")
    except (ImageError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a list of image paths: {error}") from error
    if "\0" in text:
        raise UserError(f"{file}: not a list of image paths: it holds zero bytes")
    for number, line in _lines(text):
        yield Path(os.path.normpath(file.parent / line)), f"{file}:{number}"


def _label_folder(folder: Path) -> Path:
    """With its last part 'images' as 'labels', if there is such a folder; else the same folder."""
    parts = folder.parts
    if "images" not in parts:
        return folder
    last = len(parts) - 1 - parts[::-1].index("images")
    labels = Path(*parts[:last], "labels", *parts[last + 1 :])
    return labels if os.path.isdir(labels) else folder  # noqa: PTH112  is_dir may raise


def _content(path: Path | None) -> bytes | ImageError:
    """A label file's bytes, none where there is no file, or why it cannot be read."""
    if path is None or not os.path.lexists(path):
        return b""
    try:
        return read_bytes(path, limit=MAX_LABEL_BYTES)
    except ImageError as error:
        if path.is_dir():
            text = f"{path}: is a folder, but a label file is expected there; move it away"
            raise UserError(text) from error
        return error
