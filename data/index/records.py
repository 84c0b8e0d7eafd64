"""The result of a scan: one record per usable image, and what was wrong with the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

SKIPPED_IMAGE = "image"
SKIPPED_ROW = "row"
NOTE = "note"  # reported, but nothing was left out


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a data set: where, why, and what was left out because of it."""

    where: str  # file, file:line, or 'file: annotation 7 (image.jpg)'
    cause: str
    kind: str = SKIPPED_IMAGE  # or SKIPPED_ROW, NOTE

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
    sources: np.ndarray = field(  # (N,) int64: COCO annotation id, or line of the label file;
        default_factory=lambda: np.zeros(0, np.int64)  # empty when the boxes have no source
    )


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
