"""What the readers of label files return, and the step from there to one record an image."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.index.columns import Entries, ImageChecks, ImageRecord, Records

CLIP_TOLERANCE = 0.1  # pixels; what rounding in label files causes is not counted as clipping

SKIPPED_IMAGE = "image"
SKIPPED_ROW = "row"
NOTE = "note"  # reported, but nothing was left out
_AT_ONCE = 65_536  # boxes
_LINES = 1024  # of the fingerprint
# Of the golden ratio; odd, so that no multiple loses a bit of the column
_MULTIPLES = np.uint64(0x9E3779B97F4A7C15) ** np.arange(1, 8, dtype=np.uint64)


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
class DataIndex:
    """A scanned split: everything about it but the pixels."""

    records: Sequence[ImageRecord]
    names: tuple[str, ...]
    category_ids: tuple[int, ...]  # the data set's own id of class i
    problems: tuple[Problem, ...]
    fingerprint: str  # of names, labels and image contents; equal data have equal fingerprints
    clipped: int = 0  # boxes cut at the image's edge
    duplicates: int = 0  # repeated boxes that were removed
    boxes: int = 0  # that are trained on; crowd regions not counted
    crowds: int = 0  # crowd regions
    backgrounds: int = 0  # images without any annotation

    def __len__(self) -> int:
        return len(self.records)

    def skipped(self, kind: str = SKIPPED_IMAGE) -> int:
        """How many images (or, with SKIPPED_ROW, boxes) were left out."""
        return sum(problem.kind == kind for problem in self.problems)

    def file_names(self, image_ids: Iterable[int | str]) -> list[str]:
        """The names, without folders, of the files of these images."""
        records = Records.of(self.records)
        rows = {image_id: row for row, image_id in enumerate(records.ids)}
        return [Path(records.paths[rows[str(image_id)]]).name for image_id in image_ids]

    def describe(self) -> str:
        """The scan line: what there is, and what was left out or changed."""
        return (
            f"{len(self.records)} images, {self.boxes} boxes of {len(self.names)} classes, "
            f"{self.backgrounds} background, {self.crowds} crowd; skipped: "
            f"{self.skipped()} images, {self.skipped(SKIPPED_ROW)} boxes; "
            f"{self.clipped} boxes clipped, {self.duplicates} duplicates removed"
        )


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

    @staticmethod
    def concatenate(parts: Iterable[Labels]) -> Labels:
        """The rows of all parts."""
        none = vars(Labels.of(())) | {"starts": np.zeros(0, np.int64)}
        grown = {name: bytearray() for name in none}  # many small arrays would leave holes
        for part in parts:
            for name, column in (vars(part) | {"starts": np.diff(part.starts)}).items():
                grown[name] += column.astype(none[name].dtype, copy=False).tobytes()
        columns = {
            name: np.frombuffer(grown[name], column.dtype).reshape(-1, *column.shape[1:])
            for name, column in none.items()
        }
        lengths = columns.pop("starts")
        return Labels(**columns, starts=np.append(0, np.cumsum(lengths)))


@dataclass(frozen=True)
class Parsed:
    """The content of a split's label files; images have not been opened."""

    entries: Entries
    labels: Labels
    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    problems: tuple[Problem, ...]
    annotations: Path | None  # the COCO JSON; None for YOLO, whose boxes are fractions
    stamp: str  # of the files' names, sizes and times; '' where they may change unnoticed


def build_index(parsed: Parsed, checks: ImageChecks, *, single_cls: bool = False) -> DataIndex:
    """Bring labels and image sizes together: pixels, clipping, duplicates, one record an image.

    Boxes with nothing left inside the image are rejected. An image whose annotations were all
    rejected is skipped: it shows objects, so it must not be trained as background.
    """
    labels, paths = parsed.labels, parsed.entries.paths
    if single_cls:
        labels = replace(labels, classes=np.zeros_like(labels.classes))
    boxes = np.empty(labels.boxes.shape, np.float32)
    beyond = np.empty(len(boxes), bool)
    for start in range(0, len(boxes), _AT_ONCE):  # in float64 and all at once they are large
        some = slice(start, start + _AT_ONCE)
        pixels, limits = _pixels(parsed, checks, some)
        boxes[some] = clipped = np.clip(pixels, 0, limits)
        beyond[some] = (np.abs(clipped - pixels) > CLIP_TOLERANCE).any(1)
    unreadable = {p.image for p in parsed.problems if p.kind == SKIPPED_IMAGE}  # label files
    usable = checks.sizes[:, 0] > 0
    usable[[i for i in unreadable if i is not None]] = False
    inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
    candidates = np.flatnonzero(usable[labels.image] & inside)
    rows = candidates[_first_of_equals(labels, boxes, candidates)]
    images = labels.image[rows]
    if (images[1:] < images[:-1]).any():
        rows = rows[np.argsort(images, kind="stable")]
    del images
    problems = [*parsed.problems, *_image_problems(parsed, checks, unreadable)]
    for row in np.flatnonzero(usable[labels.image] & ~inside).tolist():
        image, source = int(labels.image[row]), labels.sources[row]
        where = f"{parsed.annotations}: annotation {source} ({Path(paths[image]).name})"
        if parsed.annotations is None:
            where = f"{parsed.entries.label_files[image]}:{source}"
        corners = ", ".join(f"{value:.1f}" for value in _pixels(parsed, checks, row)[0])
        cause = f"box ({corners}) has no area inside the image"
        problems.append(Problem(where, cause, SKIPPED_ROW, image))
    rejected = Counter(p.image for p in problems if p.kind == SKIPPED_ROW and p.image is not None)
    counts = np.bincount(labels.image[rows], minlength=len(paths))
    for i in sorted(rejected):
        if usable[i] and not counts[i]:
            cause = f"none of its {rejected[i]} annotations is usable"
            problems.append(Problem(paths[i], cause))
            usable[i] = False
    crowds = int(labels.crowd[rows].sum())
    return DataIndex(
        records=_records(parsed, checks, labels=labels, boxes=boxes, rows=rows, usable=usable),
        names=("object",) if single_cls else parsed.names,
        category_ids=parsed.category_ids[:1] if single_cls else parsed.category_ids,
        problems=tuple(problems),
        fingerprint=_fingerprint(parsed, checks, single_cls),
        clipped=int(beyond[rows].sum()),
        duplicates=len(candidates) - len(rows),
        boxes=len(rows) - crowds,
        crowds=crowds,
        backgrounds=int((usable & (counts == 0)).sum()),
    )


def _pixels(
    parsed: Parsed, checks: ImageChecks, rows: slice | int
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes in pixels of float64, unclipped, and the sides of their images in the same form."""
    limits = checks.sizes[parsed.labels.image[rows]][..., [1, 0, 1, 0]].astype(np.float64)
    boxes = parsed.labels.boxes[rows]
    return boxes * limits if parsed.annotations is None else boxes, limits


def _first_of_equals(labels: Labels, boxes: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """(candidates,) bool: no earlier candidate has the same image, box, class and crowd."""
    columns = (labels.image, *boxes.view(np.int32).T, labels.crowd, labels.classes)
    # To sort whole rows is slow: only those can be equal that have equal sums of odd multiples
    sums = np.zeros(len(candidates), np.uint64)
    for start in range(0, len(sums), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        for column, multiple in zip(columns, _MULTIPLES, strict=True):
            sums[some] += column[candidates[some]].astype(np.int64).view(np.uint64) * multiple
    ordered = np.sort(sums)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    suspects = np.flatnonzero(np.isin(sums, repeated))  # few are compared one by one, in place
    table = np.column_stack([column[candidates[suspects]] for column in columns])
    _, first = np.unique(table, axis=0, return_index=True)
    chosen = np.ones(len(candidates), bool)
    chosen[np.delete(suspects, first)] = False
    return chosen


def _image_problems(
    parsed: Parsed, checks: ImageChecks, unreadable: Container[int | None]
) -> Iterator[Problem]:
    claims = parsed.entries.sizes
    differs = (claims != checks.sizes).any(1) & (claims[:, 0] > 0)
    for i in sorted({*checks.causes, *np.flatnonzero(differs).tolist()}):
        where, check = parsed.entries.paths[i], checks[i]
        if not check.height:
            kind = NOTE if i in unreadable else SKIPPED_IMAGE  # skipped once is enough
            yield Problem(where, str(check.cause), kind)
            continue
        if check.cause is not None:
            yield Problem(where, f"{check.cause}; used as decoded", NOTE)
        if differs[i]:
            cause = (
                f"is {check.width}x{check.height} pixels, but {claims[i, 1]}x{claims[i, 0]} in "
                f"{parsed.annotations}; boxes are used unchanged"
            )
            yield Problem(where, cause, NOTE)


def _records(
    parsed: Parsed,
    checks: ImageChecks,
    *,
    labels: Labels,
    boxes: np.ndarray,
    rows: np.ndarray,
    usable: np.ndarray,
) -> Records:
    entries, chosen = parsed.entries, np.flatnonzero(usable)
    every = len(rows) == len(boxes) and (rows[1:] > rows[:-1]).all()
    taken = slice(None) if every else rows  # a view, not a copy
    boxes, areas = boxes[taken], labels.areas[taken].astype(np.float32)
    np.copyto(areas, (boxes[:, 2:] - boxes[:, :2]).prod(1), where=np.isnan(areas))
    limits = np.repeat(labels.image, np.diff(labels.starts))
    limits = checks.sizes[:, ::-1].astype(np.float32)[limits]
    points = labels.points * limits if parsed.annotations is None else labels.points
    return Records(
        paths=entries.paths.take(chosen),
        ids=entries.ids.take(chosen),
        numeric=entries.numeric[chosen],
        sizes=checks.sizes[chosen],
        starts=np.searchsorted(labels.image[taken], np.append(chosen, len(usable))),
        boxes=boxes,
        labels=labels.classes[taken],
        crowd=labels.crowd[taken],
        areas=areas,
        points=np.clip(points, 0, limits),
        begins=labels.starts[:-1][taken],
        ends=labels.starts[1:][taken],
    )


def _fingerprint(parsed: Parsed, checks: ImageChecks, single_cls: bool) -> str:
    digest = hashlib.blake2b(f"{parsed.names}{single_cls}".encode(), digest_size=16)
    labels = parsed.labels
    for column in (labels.image, labels.classes, labels.boxes, labels.crowd, labels.areas):
        digest.update(column.data)
    digest.update(labels.points.data)
    sizes, edges = checks.states[:, 0].tolist(), map(bytes, checks.edges)
    lines = (
        f"{image_id}:{size}:{ends.hex() if any(ends) else ''}\n"
        for image_id, size, ends in zip(parsed.entries.ids, sizes, edges, strict=True)
    )
    for some in iter(lambda: "".join(itertools.islice(lines, _LINES)), ""):
        digest.update(some.encode("utf-8", "replace"))
    return digest.hexdigest()
