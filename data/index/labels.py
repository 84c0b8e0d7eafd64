"""Labels in columns, as the files state them, and the step from there to records."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.index.records import NOTE, SKIPPED_IMAGE, SKIPPED_ROW, DataIndex, ImageRecord, Problem

CLIP_TOLERANCE = 0.1  # pixels; what rounding in label files causes is not counted as clipping


@dataclass(frozen=True)
class Entry:
    """An image that a split names, before its file has been opened."""

    path: Path
    image_id: int | str
    size: tuple[int, int] | None = None  # height, width as a COCO JSON claims them
    label_file: Path | None = None  # its YOLO label file


@dataclass(frozen=True)
class Labels:
    """N annotations of a whole split, in columns. Boxes are xyxy, pixels or fractions."""

    image: np.ndarray  # (N,) int64, index of the entry
    classes: np.ndarray  # (N,) int64
    boxes: np.ndarray  # (N, 4) float64
    crowd: np.ndarray  # (N,) bool
    areas: np.ndarray  # (N,) float64, NaN where the file gives none
    sources: np.ndarray  # (N,) int64, annotation id or line
    points: np.ndarray  # (P, 2) float32, all polygons one after another
    starts: np.ndarray  # (N + 1,) int64: polygon i is points[starts[i]:starts[i + 1]], maybe empty


@dataclass(frozen=True)
class Parsed:
    """The content of a split's label files; images have not been opened."""

    entries: tuple[Entry, ...]
    labels: Labels
    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    problems: tuple[Problem, ...]
    rejected: np.ndarray  # (entries,) int64, rows of each image that were left out
    unreadable: np.ndarray  # (entries,) bool: the whole label file is, for a cause in `problems`
    annotations: Path | None  # the COCO JSON; None for YOLO, whose boxes are fractions
    digest: str  # of the bytes all this was read from


@dataclass(frozen=True)
class ImageCheck:
    """An image file's identity, and its size or why it cannot be used."""

    size: int  # bytes
    mtime_ns: int
    edges: str  # hash of the first and the last bytes
    height: int = 0
    width: int = 0
    cause: str | None = None
    note: str | None = None  # what is wrong with an image that is used nevertheless


def make_labels(
    *,
    image: np.ndarray,
    classes: np.ndarray,
    boxes: np.ndarray,
    sources: np.ndarray,
    polygons: Sequence[np.ndarray | None],
    crowd: np.ndarray | None = None,
    areas: np.ndarray | None = None,
) -> Labels:
    """Columns from arrays and one polygon (P, 2) or None for each box."""
    lengths = [0 if item is None else len(item) for item in polygons]
    present = [item for item in polygons if item is not None]
    return Labels(
        image=image,
        classes=classes,
        boxes=boxes,
        crowd=np.zeros(len(image), bool) if crowd is None else crowd,
        areas=np.full(len(image), np.nan) if areas is None else areas,
        sources=sources,
        points=np.concatenate(present).astype(np.float32) if present else np.zeros((0, 2), "f4"),
        starts=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
    )


def build_index(
    parsed: Parsed, checks: Sequence[ImageCheck], *, single_cls: bool = False
) -> DataIndex:
    """Bring labels and image sizes together: pixels, clipping, duplicates, one record an image.

    Boxes with nothing left inside the image are rejected. An image whose annotations were all
    rejected is skipped: it shows objects, so it must not be trained as background.
    """
    sizes = np.array([(item.width, item.height) for item in checks], np.float64).reshape(-1, 2)
    usable = np.array([item.cause is None for item in checks], bool) & ~parsed.unreadable
    labels = parsed.labels
    if single_cls:
        labels = replace(labels, classes=np.zeros_like(labels.classes))
    scale = sizes[labels.image] if parsed.annotations is None else np.ones((len(labels.image), 2))
    pixels = labels.boxes * np.tile(scale, 2)
    limits = np.tile(sizes[labels.image], 2)
    boxes = np.clip(pixels, 0, limits).astype(np.float32)
    inside = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)
    candidates = usable[labels.image] & inside
    first = _first_of_equals(labels, boxes, candidates)
    outside = usable[labels.image] & ~inside
    rejected = parsed.rejected + np.bincount(labels.image[outside], minlength=len(checks))
    spoilt = (
        usable & (rejected > 0) & (np.bincount(labels.image[first], minlength=len(checks)) == 0)
    )
    problems = (
        *parsed.problems,
        *_image_problems(parsed, checks),
        *(_outside(parsed, int(row), pixels[row]) for row in np.flatnonzero(outside)),
        *(
            Problem(str(parsed.entries[i].path), f"none of its {rejected[i]} annotations is usable")
            for i in np.flatnonzero(spoilt)
        ),
    )
    beyond = (np.abs(np.clip(pixels, 0, limits) - pixels) > CLIP_TOLERANCE).any(1)
    return DataIndex(
        records=_records(
            parsed, checks, labels=labels, boxes=boxes, rows=first, use=usable & ~spoilt
        ),
        names=("object",) if single_cls else parsed.names,
        category_ids=parsed.category_ids[:1] if single_cls else parsed.category_ids,
        problems=problems,
        fingerprint=_fingerprint(parsed, checks, single_cls),
        clipped=int(beyond[first].sum()),
        duplicates=int(candidates.sum()) - len(first),
    )


def _first_of_equals(labels: Labels, boxes: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Indices of the candidates, by image and then in file order, without later copies."""
    rows = np.flatnonzero(candidates)
    keys = np.column_stack(
        (boxes[rows].view(np.int32).astype(np.int64), labels.crowd[rows], labels.classes[rows])
    )
    order = np.lexsort((*keys.T, labels.image[rows]))  # stable: the first of equals stays first
    key, image = keys[order], labels.image[rows][order]
    new = np.ones(len(rows), bool)
    new[1:] = (key[1:] != key[:-1]).any(1) | (image[1:] != image[:-1])
    kept = np.sort(rows[order[new]])
    return kept[np.argsort(labels.image[kept], kind="stable")]


def _records(
    parsed: Parsed,
    checks: Sequence[ImageCheck],
    *,
    labels: Labels,
    boxes: np.ndarray,
    rows: np.ndarray,
    use: np.ndarray,
) -> tuple[ImageRecord, ...]:
    boxes = boxes[rows]
    classes, crowd, sources = labels.classes[rows], labels.crowd[rows], labels.sources[rows]
    given = labels.areas[rows]
    areas = np.where(np.isnan(given), (boxes[:, 2:] - boxes[:, :2]).prod(1), given).astype("f4")
    segments = _segments(parsed, labels, rows, checks)
    bounds = np.searchsorted(labels.image[rows], np.arange(len(checks) + 1)).tolist()
    return tuple(
        ImageRecord(
            path=entry.path,
            height=check.height,
            width=check.width,
            image_id=entry.image_id,
            boxes=boxes[a:b],
            labels=classes[a:b],
            crowd=crowd[a:b],
            areas=areas[a:b],
            segments=tuple(segments[a:b]),
            sources=sources[a:b],
        )
        for entry, check, a, b, used in zip(
            parsed.entries, checks, bounds, bounds[1:], use.tolist(), strict=False
        )
        if used
    )


def _segments(
    parsed: Parsed, labels: Labels, rows: np.ndarray, checks: Sequence[ImageCheck]
) -> list[np.ndarray | None]:
    """Polygons of `rows` in pixels, clamped to their images."""
    lengths = np.diff(labels.starts)
    sizes = np.array([(item.width, item.height) for item in checks], np.float32).reshape(-1, 2)
    limits = np.repeat(sizes[labels.image], lengths, axis=0)
    points = labels.points * limits if parsed.annotations is None else labels.points
    points = np.clip(points, 0, limits).astype(np.float32)
    starts, ends = labels.starts[rows].tolist(), labels.starts[rows + 1].tolist()
    return [points[a:b] if b > a else None for a, b in zip(starts, ends, strict=True)]


def _image_problems(parsed: Parsed, checks: Sequence[ImageCheck]) -> list[Problem]:
    problems = []
    for i, (entry, check) in enumerate(zip(parsed.entries, checks, strict=True)):
        if check.cause is not None:
            kind = NOTE if parsed.unreadable[i] else SKIPPED_IMAGE  # skipped once is enough
            problems.append(Problem(str(entry.path), check.cause, kind))
            continue
        if check.note is not None:
            problems.append(Problem(str(entry.path), f"{check.note}; used as decoded", NOTE))
        if entry.size is not None and entry.size != (check.height, check.width):
            cause = (
                f"is {check.width}x{check.height} pixels, but {entry.size[1]}x{entry.size[0]} in "
                f"{parsed.annotations}; boxes are used unchanged"
            )
            problems.append(Problem(str(entry.path), cause, NOTE))
    return problems


def _outside(parsed: Parsed, row: int, box: np.ndarray) -> Problem:
    entry, source = parsed.entries[parsed.labels.image[row]], parsed.labels.sources[row]
    where = f"{parsed.annotations}: annotation {source} ({entry.path.name})"
    if parsed.annotations is None:
        where = f"{entry.label_file}:{source}"
    corners = ", ".join(f"{value:.1f}" for value in box)
    return Problem(where, f"box ({corners}) has no area inside the image", SKIPPED_ROW)


def _fingerprint(parsed: Parsed, checks: Sequence[ImageCheck], single_cls: bool) -> str:
    digest = hashlib.blake2b(f"{parsed.names}{single_cls}".encode(), digest_size=16)
    labels = parsed.labels
    for column in (labels.image, labels.classes, labels.boxes, labels.crowd, labels.areas):
        digest.update(np.ascontiguousarray(column).tobytes())
    digest.update(labels.points.tobytes())
    for entry, check in zip(parsed.entries, checks, strict=True):
        digest.update(f"{entry.image_id}:{check.size}:{check.edges}\n".encode("utf-8", "replace"))
    return digest.hexdigest()
