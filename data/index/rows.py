"""The text of YOLO label files -> columns.

Rows are 'class cx cy w h' or 'class x1 y1 x2 y2 x3 y3 ...', as fractions of the image.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data.index.columns import Entries
from data.index.files import map_files
from data.index.records import SKIPPED_ROW, Labels, Problem, Row
from utils.errors import UserError
from utils.images import ImageError, read_bytes

MAX_LABEL_BYTES = 32 << 20
MAX_ROWS = 10_000
_PLAIN = b"0123456789.+-eE \t\n"  # of numbers and what separates them
_BOX = 5  # columns of a box row
_MIN_POLYGON = 7  # columns of the shortest polygon row: the class and three points
_TOLERANCE = 1e-3  # of rounding in files; what extends beyond the image is clipped anyway


def read_rows(
    images: range,
    entries: Entries,
    names: tuple[str, ...],
    problems: list[Problem],
    contents: Sequence[bytes | ImageError] = (),
) -> Labels:
    """Rows of the label files of `images`: all at once, or where anything is odd line by line."""
    contents = contents or [*map_files(_content, (entries.label_files[i] for i in images))]
    with contextlib.suppress(DeprecationWarning, ValueError):
        return _plain_rows(images, contents, len(names))
    half = len(images) // 2
    if half:
        parts = (slice(0, half), slice(half, None))
        return Labels.concatenate(
            [read_rows(images[part], entries, names, problems, contents[part]) for part in parts]
        )
    (i,) = images
    rows: list[Row] = []
    label_file = entries.label_files[i]
    try:
        lines = split_rows(contents[0])
    except (ValueError, ImageError) as error:
        problems.append(Problem(label_file, str(error), image=i))
        lines = []
    for number, columns in lines:
        try:
            label, box, polygon = parse_row(columns, len(names))
            rows.append(Row(i, label, box, number, polygon))
        except ValueError as error:
            problems.append(Problem(f"{label_file}:{number}", str(error), SKIPPED_ROW, i))
    return Labels.of(rows)


def _content(path: str) -> bytes | ImageError:
    """A label file's bytes, none where there is no file, or why it cannot be read."""
    if not os.path.lexists(path):
        return b""
    try:
        return read_bytes(path, limit=MAX_LABEL_BYTES)
    except ImageError as error:
        if Path(path).is_dir():
            text = f"{path}: is a folder, but a label file is expected there; move it away"
            raise UserError(text) from error
        return error


def _plain_rows(images: range, contents: Sequence[bytes | ImageError], classes: int) -> Labels:
    """What split_rows and parse_row make of many files, in arrays.

    Raises ValueError or DeprecationWarning where they would complain, and at unusual characters.
    """
    texts = [
        content.replace(b"\r\n", b"\n").replace(b"\r", b"\n") + b"\n"
        for content in contents
        if isinstance(content, bytes)
    ]
    whole = b"".join(texts)
    if len(texts) < len(images) or whole.translate(None, _PLAIN):
        raise ValueError
    if not whole.strip():
        return Labels.of(())
    text = np.frombuffer(whole, np.uint8)
    word = text > ord(" ")
    line = np.cumsum(text == ord("\n"))[word & ~np.append(False, word[:-1])]  # of each number
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # where it cannot go on, it only warns
        values = np.fromstring(whole, sep=" ")
    lines, counts = np.unique(line, return_counts=True)
    polygon, starts = counts > _BOX, np.cumsum(counts) - counts
    shapes_fit = len(values) == len(line) and (counts >= _BOX).all() and (counts % 2).all()
    if not (shapes_fit and np.isfinite(values).all()):
        raise ValueError
    number = values[starts]
    box = values[starts[:, None] + np.arange(1, _BOX)]
    inner = np.repeat(polygon, counts)
    inner[starts] = False  # the class
    points, lengths = values[inner].reshape(-1, 2), np.where(polygon, counts // 2, 0)
    if len(points):
        first = (np.cumsum(lengths) - lengths)[polygon]
        low, high = np.minimum.reduceat(points, first), np.maximum.reduceat(points, first)
        with np.errstate(over="ignore"):
            box[polygon] = np.column_stack(((low + high) / 2, high - low))
    owners = np.cumsum([text.count(b"\n") for text in texts])
    image = np.searchsorted(owners, lines, side="right")
    usable = (number == np.rint(number)) & (number >= 0) & (number < classes)
    usable &= (box >= [-_TOLERANCE, -_TOLERANCE, 0, 0]).all(1) & (box <= 1 + _TOLERANCE).all(1)
    if not (usable.all() and (box[:, 2:] > 0).all() and np.bincount(image).max() <= MAX_ROWS):
        raise ValueError
    centre, half = box[:, :2], box[:, 2:] / 2
    return Labels(
        image=image + images.start,
        classes=number.astype(np.int64),
        boxes=np.column_stack((centre - half, centre + half)),
        crowd=np.zeros(len(box), bool),
        areas=np.full(len(box), math.nan),
        sources=lines - np.append(0, owners)[image] + 1,
        points=points.astype(np.float32),
        starts=np.append(0, np.cumsum(lengths)),
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
    rows = [(n, line.split()) for n, line in text_lines(text)]
    if len(rows) > MAX_ROWS:
        raise ValueError(f"{len(rows)} rows; more than {MAX_ROWS} are not read")
    return rows


def text_lines(text: str) -> Iterator[tuple[int, str]]:
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
        raise ValueError(
            f"{len(row)} columns{hint}; a box has 5, a polygon an odd number of at least 7"
        )
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
        raise ValueError("nan and inf are not coordinates")
    return number
