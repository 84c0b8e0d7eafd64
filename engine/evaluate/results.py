"""The results of an evaluation, as values, as text and as files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.index.records import DataIndex, ImageRecord
from engine.evaluate.box_table import BoxTable, to_xywh
from engine.evaluate.coco import twelve_lines
from engine.evaluate.matching import Curves
from engine.measure.bench import Speed
from utils.boxes import yolo_rows
from utils.files import write_text, writing
from utils.terminal import printable

NAME_WIDTH = 22


class LossMeans(NamedTuple):
    """The parts of the loss, with their gains, as means over images."""

    box: float
    obj: float
    cls: float


@dataclass(frozen=True)
class ClassMetrics:
    """One class; NaN where it has no ground truth."""

    name: str
    images: int  # that have at least one instance
    instances: int  # ground-truth boxes, crowd regions not counted
    precision: float
    recall: float
    ap50: float
    ap: float


@dataclass(frozen=True)
class DetectionMetrics:
    """All metrics of one evaluation; the means are over the classes that have ground truth."""

    map50: float  # COCO's AP50; 0 without any ground truth
    map: float  # COCO's AP over IoU .50:.95
    precision: float  # at `confidence`
    recall: float
    confidence: float  # of the highest mean F1 at IoU 0.5
    images: int
    instances: int
    per_class: tuple[ClassMetrics, ...]
    coco: dict[str, float]  # the twelve, keys of engine.evaluate.coco.METRICS; -1: no ground truth
    losses: LossMeans | None
    speed: Speed
    detections: BoxTable  # sorted by image
    image_ids: tuple[int | str, ...]  # of the image indices in `detections`
    category_ids: tuple[int, ...]  # of the labels in `detections`
    curves: Curves | None = None  # for the plots
    precision50: np.ndarray | None = None  # (classes, 101 recalls) of COCO, for the plots

    @property
    def fitness(self) -> float:
        """What chooses the best checkpoint: 0.1 mAP50 + 0.9 mAP."""
        return 0.1 * self.map50 + 0.9 * self.map

    def table(self, *, absent: bool = False) -> str:
        """The class table, 'all' first; with `absent` also the classes without ground truth."""
        rows = [item for item in self.per_class if item.instances or absent]
        total = ClassMetrics(
            "all",
            self.images,
            self.instances,
            self.precision,
            self.recall,
            self.map50,
            self.map,
        )
        width = max(NAME_WIDTH, *(len(item.name) + 1 for item in (total, *rows)))
        heads = ("Images", "Instances", "P", "R", "mAP50", "mAP50-95")
        lines = [f"{'Class':>{width}}" + "".join(f"{head:>11}" for head in heads)]
        for item in (total, *rows):
            values = (item.precision, item.recall, item.ap50, item.ap)
            cells = "".join(f"{'-' if math.isnan(x) else f'{x:.3f}':>11}" for x in values)
            lines.append(
                f"{printable(item.name):>{width}}{item.images:>11}{item.instances:>11}{cells}"
            )
        return "\n".join(lines)

    def coco_text(self) -> str:
        """COCO's twelve lines."""
        return twelve_lines(self.coco)

    def to_dict(self) -> dict[str, Any]:
        """Plain values without the detections; None where a metric is not defined."""
        names = ("map50", "map", "precision", "recall", "confidence", "fitness", "images")
        classes = [vars(item).items() for item in self.per_class]
        return {
            **{name: getattr(self, name) for name in (*names, "instances")},
            "coco": dict(self.coco),
            "per_class": [{key: None if v != v else v for key, v in item} for item in classes],
            "losses": self.losses._asdict() if self.losses else None,
            "speed_ms": self.speed._asdict(),
        }


def save_metrics(metrics: DetectionMetrics, path: Path, settings: Mapping[str, Any]) -> None:
    """Write the metrics and the settings they were measured with as JSON."""
    document = {**metrics.to_dict(), "settings": dict(settings)}
    write_text(path, json.dumps(document, indent=2) + "\n")


def save_predictions(metrics: DetectionMetrics, path: Path) -> None:
    """Write COCO results JSON with the data set's own ids: the very numbers that were evaluated."""
    found = metrics.detections
    boxes = to_xywh(found.boxes).tolist()
    scores = found.scores.astype(np.float64).tolist()
    rows = zip(found.image.tolist(), found.labels.tolist(), boxes, scores, strict=True)
    results = [
        {
            "image_id": metrics.image_ids[image],
            "category_id": metrics.category_ids[label],
            "bbox": box,
            "score": score,
        }
        for image, label, box, score in rows
    ]
    write_text(path, json.dumps(results))


def save_labels(
    metrics: DetectionMetrics, index: DataIndex, folder: Path, *, scores: bool = False
) -> None:
    """Write one YOLO label file per image: class cx cy w h, normalised, and the score if asked.

    Each image gets a file, empty without detections.  Images of several folders keep their
    folders below the common one, so that equal names do not meet.  UserError names a file that
    cannot be written.
    """
    found = metrics.detections
    numbers = {image_id: number for number, image_id in enumerate(metrics.image_ids)}
    starts = np.searchsorted(found.image, np.arange(len(numbers) + 1))
    for record, name in zip(index.records, _label_names(index.records), strict=True):
        number = numbers[record.image_id]
        rows = slice(starts[number], starts[number + 1])
        text = yolo_rows(
            found.boxes[rows],
            found.labels[rows].tolist(),
            (record.height, record.width),
            scores=found.scores[rows] if scores else None,
            digits=".6g",
        )
        path = folder / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def _label_names(records: Sequence[ImageRecord]) -> list[Path]:
    """Paths below the common folder, .txt for the image's suffix.

    A data set's file names may go up by `..`: without resolving them the labels would, too.
    """
    if not records:
        return []
    absolute = [Path(os.path.normpath(record.path.absolute())) for record in records]
    common = os.path.commonpath([path.parent for path in absolute])
    paths = [path.relative_to(common) for path in absolute]
    names = [path.with_suffix(".txt") for path in paths]
    if len(set(names)) < len(names):  # a.jpg and a.png
        names = [path.with_name(path.name + ".txt") for path in paths]
    return names
