"""The metrics of one evaluation: computed from all detections; as values, text and files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.index.columns import ImageRecord
from data.index.records import DataIndex
from engine.evaluate.coco import coco_metrics, twelve_lines
from engine.evaluate.matching import BoxTable, Curves, confidence_curves, to_xywh
from engine.measure.bench import Speed
from utils.boxes import yolo_rows
from utils.files import write_text, writing
from utils.terminal import printable, warn

NAME_WIDTH = 22
HEADS = ("Images", "Instances", "P", "R", "mAP50", "mAP50-95")


@dataclass(frozen=True)
class Shard:
    """The detections of one process."""

    detections: BoxTable
    images: int  # delivered by its loader
    losses: Mapping[str, float]  # by part, sums over `images`; empty without a loss
    seconds: tuple[float, ...]  # pre-process, inference, NMS: sums likewise


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
    losses: Mapping[str, float]  # by part, with gains, means over images; empty without a loss
    speed: Speed
    detections: BoxTable  # best first within each image; `image` is an index of `by_id`
    curves: Curves | None = None  # for the plots
    precision50: np.ndarray | None = None  # (classes, 101 recalls) of COCO, for the plots
    other_branch: Mapping[str, float] = field(default_factory=dict)  # map50, map; {}: it has none

    @property
    def fitness(self) -> float:
        """What chooses the best checkpoint: 0.1 mAP50 + 0.9 mAP."""
        return 0.1 * self.map50 + 0.9 * self.map

    def table(self, *, absent: bool = False) -> str:
        """The class table, 'all' first; with `absent` also the classes without ground truth."""
        totals = (self.images, self.instances, self.precision, self.recall, self.map50, self.map)
        rows = [ClassMetrics("all", *totals)]
        rows += [item for item in self.per_class if item.instances or absent]
        width = max(NAME_WIDTH, *(len(item.name) + 1 for item in rows))
        lines = [f"{'Class':>{width}}" + "".join(f"{head:>11}" for head in HEADS)]
        for item in rows:
            values = (item.precision, item.recall, item.ap50, item.ap)
            cells = "".join(f"{'-' if math.isnan(x) else f'{x:.3f}':>11}" for x in values)
            lines.append(
                f"{printable(item.name):>{width}}{item.images:>11}{item.instances:>11}{cells}"
            )
        return "\n".join(lines)

    def with_branch(self, other: DetectionMetrics) -> DetectionMetrics:
        """These, and the mAP of the head's other branch."""
        return replace(self, other_branch={"map50": other.map50, "map": other.map})

    def branches_text(self, *, nms: bool) -> str:
        """A line for both branches; `nms`: whether these metrics are of the one for NMS."""
        own, other = {"map50": self.map50, "map": self.map}, self.other_branch
        one, many = (other, own) if nms else (own, other)
        return (
            f"end to end: mAP50 {one['map50']:.3f}, mAP50-95 {one['map']:.3f};"
            f" with NMS (--nms): mAP50 {many['map50']:.3f}, mAP50-95 {many['map']:.3f}"
        )

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
            "losses": dict(self.losses) or None,
            **({"other_branch": dict(self.other_branch)} if self.other_branch else {}),
            "speed_ms": self.speed._asdict(),
        }


def by_id(index: DataIndex) -> tuple[ImageRecord, ...]:
    """The records by their ids, for COCO's order of ties: `BoxTable.image` is an index of these."""
    records = index.records
    return tuple(sorted(records, key=lambda item: (isinstance(item.image_id, str), item.image_id)))


def truth_of(records: Sequence[ImageRecord]) -> BoxTable:
    """The ground truth of `records`."""
    return BoxTable.concatenate(
        [
            BoxTable.ground_truth(np.full(len(r.labels), n), r.labels, r.boxes, r.crowd, r.areas)
            for n, r in enumerate(records)
        ]
    )


def metrics_of(shards: Sequence[Shard], index: DataIndex) -> DetectionMetrics:
    """All metrics of an evaluation on the images of `index`.

    Raises RuntimeError unless each image was delivered once.
    """
    records, names = by_id(index), index.names
    delivered = sum(shard.images for shard in shards)
    if delivered != len(records):
        raise RuntimeError(f"the loader delivered {delivered} of {len(records)} images")
    found = BoxTable.concatenate([shard.detections for shard in shards])
    found = found.take(np.argsort(found.image, kind="stable"))
    truth = truth_of(records)
    coco = coco_metrics(found, truth, images=len(records), classes=len(names))
    curves = confidence_curves(found, truth)
    best, some = curves.best, len(curves.classes) > 0
    if not some:
        warn("warning: no ground-truth box in this data; mAP, P and R are given as 0")
    milliseconds = np.sum([shard.seconds for shard in shards], 0) / max(delivered, 1) * 1000
    plain = truth.take(~truth.crowd)
    image_classes = np.unique(np.stack((plain.image, plain.labels)), axis=1)[1]
    images, instances = (
        np.bincount(x, minlength=len(names)) for x in (image_classes, plain.labels)
    )
    precision, recall = np.full((2, len(names)), np.nan)
    precision[curves.classes] = curves.precision[:, best]
    recall[curves.classes] = curves.recall[:, best]
    columns = (images, instances, precision, recall, coco.ap50, coco.ap)
    rows = zip(names, *(column.tolist() for column in columns), strict=True)
    return DetectionMetrics(
        map50=max(coco.twelve["AP50"], 0.0),
        map=max(coco.twelve["AP"], 0.0),
        precision=float(curves.precision[:, best].mean()) if some else 0.0,
        recall=float(curves.recall[:, best].mean()) if some else 0.0,
        confidence=float(curves.confidence[best]),
        images=len(records),
        instances=len(plain),
        per_class=tuple(ClassMetrics(*row) for row in rows),
        coco=coco.twelve,
        losses={
            name: sum(shard.losses[name] for shard in shards) / max(delivered, 1)
            for name in shards[0].losses
        },
        speed=Speed(*milliseconds.tolist()),
        detections=found,
        curves=curves,
        precision50=coco.precision50,
    )


def save_metrics(metrics: DetectionMetrics, path: Path, settings: Mapping[str, Any]) -> None:
    """Write the metrics and the settings they were measured with as JSON."""
    document = {**metrics.to_dict(), "settings": dict(settings)}
    write_text(path, json.dumps(document, indent=2) + "\n")


def save_predictions(metrics: DetectionMetrics, index: DataIndex, path: Path) -> None:
    """Write COCO results JSON with the data set's own ids: the very numbers that were evaluated."""
    found, records = metrics.detections, by_id(index)
    columns = (found.image, found.labels, to_xywh(found.boxes), found.scores.astype(np.float64))
    rows = zip(*(column.tolist() for column in columns), strict=True)
    keys = ("image_id", "category_id", "bbox", "score")
    results = [
        dict(zip(keys, (records[n].image_id, index.category_ids[label], *row), strict=True))
        for n, label, *row in rows
    ]
    write_text(path, json.dumps(results))


def save_labels(
    metrics: DetectionMetrics, index: DataIndex, folder: Path, *, scores: bool = False
) -> None:
    """Write one YOLO label file per image: class cx cy w h, normalised, and the score if asked.

    Each image gets a file, empty without detections.  Images of several folders keep their folders
    below the common one, so that equal names do not meet; `..` in a data set's file names is
    resolved, or the labels would leave `folder`.  UserError names a file that cannot be written.
    """
    records = by_id(index)
    if not records:
        return
    absolute = [Path(os.path.normpath(record.path.absolute())) for record in records]
    common = os.path.commonpath([path.parent for path in absolute])
    images = [path.relative_to(common) for path in absolute]
    names = [path.with_suffix(".txt") for path in images]
    if len(set(names)) < len(names):  # a.jpg and a.png
        names = [path.with_name(path.name + ".txt") for path in images]
    starts = np.searchsorted(metrics.detections.image, np.arange(len(records) + 1))
    for record, name, begin, end in zip(records, names, starts, starts[1:], strict=False):
        found = metrics.detections.take(np.arange(begin, end))
        text = yolo_rows(
            found.boxes,
            found.labels.tolist(),
            (record.height, record.width),
            scores=found.scores if scores else None,
            digits=".6g",
        )
        path = folder / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
