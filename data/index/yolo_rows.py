"""One YOLO label file: rows 'class cx cy w h' or 'class x1 y1 x2 y2 x3 y3 ...', as fractions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

MAX_ROWS = 10_000
_BOX = 5  # columns of a box row
_MIN_POLYGON = 7  # columns of the shortest polygon row: the class and three points
_TOLERANCE = 1e-3  # of rounding in files; what extends beyond the image is clipped anyway


@dataclass(frozen=True)
class LabelRows:
    """The N usable rows of one label file, and what is wrong with the others."""

    lines: list[int] = field(default_factory=list)  # from 1
    classes: list[int] = field(default_factory=list)
    boxes: list[tuple[float, ...]] = field(default_factory=list)  # xyxy fractions of the image
    polygons: list[np.ndarray | None] = field(default_factory=list)  # (P, 2), None for a box row
    problems: list[tuple[int, str]] = field(default_factory=list)  # line, cause


def split_lines(text: str) -> list[str]:
    """Lines ended by LF, CRLF or CR; str.splitlines would also split at form feeds and the like."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def parse_label(data: bytes, classes: int) -> LabelRows | str:
    """Bytes of a label file -> its rows, each box or polygon by its own number of columns.

    Returns the cause when it is not text or has more than MAX_ROWS rows.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return f"not UTF-8 text (byte {error.start})"
    if "\0" in text:
        return "binary data, not text"
    rows = [(n, line.split()) for n, line in enumerate(split_lines(text), start=1) if line.strip()]
    if len(rows) > MAX_ROWS:
        return f"{len(rows)} rows; more than {MAX_ROWS} are not read"
    found = LabelRows()
    for line, row in rows:
        cause = _add(found, line, row, classes)
        if cause is not None:
            found.problems.append((line, cause))
    return found


def _add(found: LabelRows, line: int, row: Sequence[str], classes: int) -> str | None:
    """Add a row to `found`, or return why it cannot be used."""
    if len(row) != _BOX and (len(row) < _MIN_POLYGON or not len(row) % 2):
        return _wrong_columns(row)
    try:
        number, *values = map(float, row)
    except ValueError:
        text = next(item for item in row if not _is_number(item))
        return f"{text[:40]!r} is not a number"
    points = None
    x, y, w, h = values[:4]
    if len(row) != _BOX:
        points = np.array(values).reshape(-1, 2)
        (left, top), (right, bottom) = points.min(0).tolist(), points.max(0).tolist()
        x, y, w, h = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
    shape = (x, y, w, h)
    finite = math.isfinite(number) and all(map(math.isfinite, values))
    cause = _cause(number, shape, classes) if finite else "nan or inf is not a position"
    if cause is not None:
        return cause
    found.lines.append(line)
    found.classes.append(int(number))
    found.boxes.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2))
    found.polygons.append(points)
    return None


def _cause(number: float, shape: tuple[float, float, float, float], classes: int) -> str | None:
    """Why class and box (centre, size) of finite numbers cannot be used."""
    x, y, w, h = shape
    if number != round(number):
        return f"class {number:g} is not a whole number"
    if not 0 <= number < classes:
        return f"class {number:g}; the data set has the classes 0 to {classes - 1}"
    if not (w > 0 and h > 0):
        return f"width {w:g} and height {h:g} must be positive"
    low, high = -_TOLERANCE, 1 + _TOLERANCE
    if not (low <= x <= high and low <= y <= high and w <= high and h <= high):
        return (
            f"centre ({x:g}, {y:g}), size ({w:g}, {h:g}): the centre must lie in the image and "
            "the size in it, as fractions of 0 to 1"
        )
    return None


def _wrong_columns(row: Sequence[str]) -> str:
    if any("," in item for item in row):
        return "commas; numbers are separated by spaces"
    hint = " (a prediction with its confidence?)" if len(row) == _BOX + 1 else ""
    return f"{len(row)} columns{hint}; a box has 5, a polygon an odd number from 7"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
