"""What the readers of label files return, and the step from there to one record an image."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

CLIP_TOLERANCE = 0.1  # pixels; what rounding in label files causes is not counted as clipping

SKIPPED_IMAGE = "image"
SKIPPED_ROW = "row"
NOTE = "note"  # reported, but nothing was left out


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a data set: where, why, and what was left out because of it."""

    where: str  # file, file:line, or 'file: annotation 7 (image.jpg)'
    cause: str
    kind: str = SKIPPED_IMAGE  # or SKIPPED_ROW, NOTE
    image: int | None = None  # index of the entry whose label file or annotation this is

    @property
    def text(self) -> str:
        """'where: cause; what was skipped'."""
        skipped = {SKIPPED_IMAGE: "; image skipped", SKIPPED_ROW: "; box skipped"}
        return f"{self.where}: {self.cause}{skipped.get(self.kind, '')}"


@dataclass(frozen=True)
class ImageRecord:
    """One image file and its N boxes."""

    path: Path
    height: int  # as decoded, EXIF orientation applied
    width: int
    image_id: int | str  # the data set's own
    boxes: np.ndarray  # (N, 4) float32, xyxy pixels, inside the image, area > 0
    labels: np.ndarray  # (N,) int64, index into DataIndex.names
    crowd: np.ndarray  # (N,) bool: ignore regions of the evaluation, never training targets
    areas: np.ndarray  # (N,) float32: COCO's 'area' where given, else the box's
    segments: tuple[np.ndarray | None, ...]  # per box (P, 2) float32 pixels, or None


@dataclass(frozen=True)
class DataIndex:
    """A scanned split: everything about it but the pixels."""

    records: tuple[ImageRecord, ...]
    names: tuple[str, ...]
    category_ids: tuple[int, ...]  # the data set's own id of class i
    problems: tuple[Problem, ...]
    fingerprint: str  # of names, labels and image contents; equal data have equal fingerprints
    clipped: int = 0  # boxes cut at the image's edge
    duplicates: int = 0  # repeated boxes that were removed

    def __len__(self) -> int:
        return len(self.records)

    def skipped(self, kind: str = SKIPPED_IMAGE) -> int:
        """How many images (or, with SKIPPED_ROW, boxes) were left out."""
        return sum(problem.kind == kind for problem in self.problems)

    @property
    def boxes(self) -> int:
        """Boxes that are trained on; crowd regions not counted."""
        return sum(len(record.labels) for record in self.records) - self.crowds

    @property
    def crowds(self) -> int:
        """Crowd regions."""
        return sum(int(record.crowd.sum()) for record in self.records)

    @property
    def backgrounds(self) -> int:
        """Images without any annotation."""
        return sum(not len(record.labels) for record in self.records)

    def describe(self) -> str:
        """The scan line: what there is, and what was left out or changed."""
        return (
            f"{len(self.records)} images, {self.boxes} boxes of {len(self.names)} classes, "
            f"{self.backgrounds} background, {self.crowds} crowd; skipped: "
            f"{self.skipped()} images, {self.skipped(SKIPPED_ROW)} boxes; "
            f"{self.clipped} boxes clipped, {self.duplicates} duplicates removed"
        )


@dataclass(frozen=True)
class Entry:
    """An image that a split names, before its file has been opened."""

    path: Path
    image_id: int | str
    size: tuple[int, int] | None = None  # height, width as a COCO JSON claims them
    label_file: Path | None = None  # of YOLO


class Row(NamedTuple):
    """A usable annotation, as its file states it."""

    image: int  # index of the entry
    label: int
    box: Sequence[float]  # xyxy, pixels or fractions
    source: int  # annotation id or line
    polygon: np.ndarray | None = None  # (P, 2)
    crowd: bool = False
    area: float = math.nan  # NaN where the file gives none


@dataclass(frozen=True)
class Labels:
    """The N rows of a whole split, in columns."""

    image: np.ndarray  # (N,) int64
    classes: np.ndarray  # (N,) int64
    boxes: np.ndarray  # (N, 4) float64
    crowd: np.ndarray  # (N,) bool
    areas: np.ndarray  # (N,) float64
    sources: np.ndarray  # (N,) int64
    points: np.ndarray  # (P, 2) float32, all polygons one after another
    starts: np.ndarray  # (N + 1,) int64: polygon i is points[starts[i]:starts[i + 1]], maybe empty

    @staticmethod
    def of(rows: Sequence[Row]) -> Labels:
        """The columns of `rows`."""
        lengths = [0 if row.polygon is None else len(row.polygon) for row in rows]
        polygons = [row.polygon for row in rows if row.polygon is not None]
        return Labels(
            image=np.array([row.image for row in rows], np.int64),
            classes=np.array([row.label for row in rows], np.int64),
            boxes=np.array([row.box for row in rows], np.float64).reshape(-1, 4),
            crowd=np.array([row.crowd for row in rows], bool),
            areas=np.array([row.area for row in rows], np.float64),
            sources=np.array([row.source for row in rows], np.int64),
            points=np.concatenate([np.zeros((0, 2), "f4"), *polygons]).astype(np.float32),
            starts=np.cumsum([0, *lengths], dtype=np.int64),
        )


@dataclass(frozen=True)
class Parsed:
    """The content of a split's label files; images have not been opened."""

    entries: tuple[Entry, ...]
    labels: Labels
    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    problems: tuple[Problem, ...]
    annotations: Path | None  # the COCO JSON; None for YOLO, whose boxes are fractions
    digest: str  # of the bytes all this was read from


@dataclass(frozen=True)
class ImageCheck:
    """An image file's identity, and its size or why it cannot be used."""

    size: int  # bytes
    mtime_ns: int
    edges: str  # hash of the first and the last bytes
    height: int = 0  # 0: cannot be used
    width: int = 0
    cause: str | None = None  # what is wrong with it


def build_index(
    parsed: Parsed, checks: Sequence[ImageCheck], *, single_cls: bool = False
) -> DataIndex:
    """Bring labels and image sizes together: pixels, clipping, duplicates, one record an image.

    Boxes with nothing left inside the image are rejected. An image whose annotations were all
    rejected is skipped: it shows objects, so it must not be trained as background.
    """
    labels = parsed.labels
    if single_cls:
        labels = replace(labels, classes=np.zeros_like(labels.classes))
    sizes = np.array([(check.width, check.height) for check in checks], np.float64).reshape(-1, 2)
    limits = np.tile(sizes[labels.image], 2)
    pixels = labels.boxes * limits if parsed.annotations is None else labels.boxes
    clipped = np.clip(pixels, 0, limits)
    boxes = clipped.astype(np.float32)
    unreadable = {p.image for p in parsed.problems if p.kind == SKIPPED_IMAGE}  # label files
    usable = np.array([c.height > 0 and i not in unreadable for i, c in enumerate(checks)], bool)
    inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
    candidates = np.flatnonzero(usable[labels.image] & inside)
    # Of equal boxes the first stays; the others by image, and then in the order of the file
    columns = (labels.image, boxes.view(np.int32), labels.crowd, labels.classes)
    _, first = np.unique(np.column_stack(columns)[candidates], axis=0, return_index=True)
    rows = candidates[first]
    rows = rows[np.lexsort((rows, labels.image[rows]))]
    problems = [*parsed.problems, *_image_problems(parsed, checks, unreadable)]
    for row in np.flatnonzero(usable[labels.image] & ~inside).tolist():
        entry, source = parsed.entries[labels.image[row]], labels.sources[row]
        where = f"{parsed.annotations}: annotation {source} ({entry.path.name})"
        if parsed.annotations is None:
            where = f"{entry.label_file}:{source}"
        corners = ", ".join(f"{value:.1f}" for value in pixels[row])
        cause = f"box ({corners}) has no area inside the image"
        problems.append(Problem(where, cause, SKIPPED_ROW, int(labels.image[row])))
    rejected = Counter(p.image for p in problems if p.kind == SKIPPED_ROW and p.image is not None)
    for i in sorted(rejected.keys() - set(labels.image[rows].tolist())):
        if usable[i]:
            cause = f"none of its {rejected[i]} annotations is usable"
            problems.append(Problem(str(parsed.entries[i].path), cause))
            usable[i] = False
    beyond = (np.abs(clipped - pixels) > CLIP_TOLERANCE).any(1)
    return DataIndex(
        records=_records(parsed, checks, labels=labels, boxes=boxes, rows=rows, usable=usable),
        names=("object",) if single_cls else parsed.names,
        category_ids=parsed.category_ids[:1] if single_cls else parsed.category_ids,
        problems=tuple(problems),
        fingerprint=_fingerprint(parsed, checks, single_cls),
        clipped=int(beyond[rows].sum()),
        duplicates=len(candidates) - len(rows),
    )


def _image_problems(
    parsed: Parsed, checks: Sequence[ImageCheck], unreadable: Container[int | None]
) -> Iterator[Problem]:
    for i, (entry, check) in enumerate(zip(parsed.entries, checks, strict=True)):
        where = str(entry.path)
        if not check.height:
            kind = NOTE if i in unreadable else SKIPPED_IMAGE  # skipped once is enough
            yield Problem(where, str(check.cause), kind)
            continue
        if check.cause is not None:
            yield Problem(where, f"{check.cause}; used as decoded", NOTE)
        if entry.size is not None and entry.size != (check.height, check.width):
            cause = (
                f"is {check.width}x{check.height} pixels, but {entry.size[1]}x{entry.size[0]} in "
                f"{parsed.annotations}; boxes are used unchanged"
            )
            yield Problem(where, cause, NOTE)


def _records(
    parsed: Parsed,
    checks: Sequence[ImageCheck],
    *,
    labels: Labels,
    boxes: np.ndarray,
    rows: np.ndarray,
    usable: np.ndarray,
) -> tuple[ImageRecord, ...]:
    boxes, classes, crowd = boxes[rows], labels.classes[rows], labels.crowd[rows]
    areas = np.where(
        np.isnan(labels.areas[rows]), (boxes[:, 2:] - boxes[:, :2]).prod(1), labels.areas[rows]
    ).astype(np.float32)
    sizes = np.array([(check.width, check.height) for check in checks], "f4").reshape(-1, 2)
    limits = np.repeat(sizes[labels.image], np.diff(labels.starts), axis=0)
    points = labels.points * limits if parsed.annotations is None else labels.points
    points = np.clip(points, 0, limits)
    ends = zip(labels.starts[rows].tolist(), labels.starts[rows + 1].tolist(), strict=True)
    segments = [points[a:b] if b > a else None for a, b in ends]
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
        )
        for entry, check, a, b, used in zip(
            parsed.entries, checks, bounds, bounds[1:], usable.tolist(), strict=False
        )
        if used
    )


def _fingerprint(parsed: Parsed, checks: Sequence[ImageCheck], single_cls: bool) -> str:
    digest = hashlib.blake2b(f"{parsed.names}{single_cls}".encode(), digest_size=16)
    labels = parsed.labels
    for column in (labels.image, labels.classes, labels.boxes, labels.crowd, labels.areas):
        digest.update(column.tobytes())
    digest.update(labels.points.tobytes())
    for entry, check in zip(parsed.entries, checks, strict=True):
        digest.update(f"{entry.image_id}:{check.size}:{check.edges}\n".encode("utf-8", "replace"))
    return digest.hexdigest()
