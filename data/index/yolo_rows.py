"""One YOLO label file: rows 'class cx cy w h' or 'class x1 y1 x2 y2 x3 y3 ...', as fractions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_ROWS = 10_000
_BOX = 5  # columns of a box row
_MIN_POLYGON = 7  # columns of the shortest polygon row: the class and three points
_TOLERANCE = 1e-3  # of rounding in files; what reaches over the image's edge is clipped anyway


@dataclass(frozen=True)
class LabelRows:
    """The N usable rows of one label file, and what is wrong with the others."""

    lines: np.ndarray  # (N,) int64, from 1
    classes: np.ndarray  # (N,) int64
    boxes: np.ndarray  # (N, 4) float64, xyxy fractions of the image
    polygons: tuple[np.ndarray | None, ...]  # (P, 2) fractions, None for a box row
    problems: tuple[tuple[int, str], ...]  # line, cause


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
    problems: dict[int, str] = {}
    usable = []
    for line, row in rows:
        if len(row) == _BOX or (len(row) >= _MIN_POLYGON and len(row) % 2):
            usable.append((line, row))
        else:
            problems[line] = _wrong_columns(row)
    lines, classes_found, shapes, polygons = _convert(usable, problems)
    for i, cause in _causes(classes_found, shapes, classes).items():
        problems[lines[i]] = cause
    good = [i for i, line in enumerate(lines) if line not in problems]
    centres, half = shapes[good, :2], shapes[good, 2:] / 2
    return LabelRows(
        lines=np.array([lines[i] for i in good], np.int64),
        classes=classes_found[good].astype(np.int64),
        boxes=np.concatenate((centres - half, centres + half), 1),
        polygons=tuple(polygons[i] for i in good),
        problems=tuple(sorted(problems.items())),
    )


def _wrong_columns(row: Sequence[str]) -> str:
    if any("," in item for item in row):
        return "commas; numbers are separated by spaces"
    hint = " (a prediction with its confidence?)" if len(row) == _BOX + 1 else ""
    return f"{len(row)} columns{hint}; a box has 5, a polygon an odd number from 7"


def _convert(
    rows: Sequence[tuple[int, list[str]]], problems: dict[int, str]
) -> tuple[list[int], np.ndarray, np.ndarray, list[np.ndarray | None]]:
    """Rows -> lines, classes (N,), centre-size (N, 4), polygons; those of text -> problems."""
    try:  # nearly every file: boxes only, all of them numbers
        table = np.array([row for _, row in rows], np.float64).reshape(-1, _BOX)
        if len(table) == len(rows):
            return [line for line, _ in rows], table[:, 0], table[:, 1:], [None] * len(rows)
    except ValueError:
        pass
    lines: list[int] = []
    classes: list[float] = []
    shapes: list[np.ndarray] = []
    polygons: list[np.ndarray | None] = []
    for line, row in rows:
        try:
            numbers = np.array(row, np.float64)
        except ValueError:
            text = next((item for item in row if not _is_number(item)), row[0])
            problems[line] = f"{text[:40]!r} is not a number"
            continue
        points = None if len(row) == _BOX else numbers[1:].reshape(-1, 2)
        lines.append(line)
        classes.append(float(numbers[0]))
        shapes.append(numbers[1:] if points is None else _box_of(points))
        polygons.append(points)
    return lines, np.array(classes, np.float64), np.array(shapes).reshape(-1, 4), polygons


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _box_of(points: np.ndarray) -> np.ndarray:
    """(P, 2) -> centre x, centre y, width, height of the box around them."""
    low, high = points.min(0), points.max(0)
    if not np.isfinite(points).all():
        return np.full(4, np.nan)
    return np.concatenate(((low + high) / 2, high - low))


def _causes(classes: np.ndarray, shapes: np.ndarray, count: int) -> dict[int, str]:
    """Why a row cannot be used, by its index; the first cause counts."""
    finite = np.asarray(np.isfinite(classes) & np.isfinite(shapes).all(1))
    whole = finite & (classes == np.round(classes))
    known = whole & (classes >= 0) & (classes < count)
    centre, size = shapes[:, :2], shapes[:, 2:]
    area = np.asarray((size > 0).all(1))
    inside = ((centre >= -_TOLERANCE) & (centre <= 1 + _TOLERANCE)).all(1)
    fraction = inside & (size <= 1 + _TOLERANCE).all(1)
    causes: dict[int, str] = {}
    for i in np.flatnonzero(~(known & area & fraction)).tolist():
        x, y, w, h = (f"{value:g}" for value in shapes[i])
        if not finite[i]:
            causes[i] = "nan or inf is not a position"
        elif not whole[i]:
            causes[i] = f"class {classes[i]:g} is not a whole number"
        elif not known[i]:
            causes[i] = f"class {classes[i]:g}; the data set has the classes 0 to {count - 1}"
        elif not area[i]:
            causes[i] = f"width {w} and height {h} must be positive"
        else:
            causes[i] = (
                f"centre ({x}, {y}), size ({w}, {h}): the centre must lie in the image and "
                "the size in it, as fractions of 0 to 1"
            )
    return causes
