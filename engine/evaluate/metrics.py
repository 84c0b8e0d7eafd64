"""From what the processes found to the figures, and their plots."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.index.records import DataIndex, ImageRecord
from engine.evaluate.box_table import BoxTable
from engine.evaluate.coco import CocoMetrics, coco_metrics
from engine.evaluate.curves import plot_confusion, plot_curves, plot_precision_recall
from engine.evaluate.matching import Curves, confidence_curves, confusion_matrix
from engine.evaluate.results import ClassMetrics, DetectionMetrics, LossMeans, Speed


@dataclass(frozen=True)
class Shard:
    """What one process found."""

    parts: dict[int, BoxTable]  # by image number; a second delivery of an image replaces the first
    images: int  # delivered
    losses: tuple[float, ...]  # box, obj, cls: sums over `images`; empty without a loss
    seconds: tuple[float, ...]  # pre-process, inference, NMS: sums likewise


def by_id(index: DataIndex) -> tuple[ImageRecord, ...]:
    """The records by their ids: an image's number is its place here, for COCO's order of ties."""
    return tuple(sorted(index.records, key=lambda record: _sort_key(record.image_id)))


def _sort_key(image_id: int | str) -> tuple[bool, int | str]:
    return isinstance(image_id, str), image_id


def truth_of(records: Sequence[ImageRecord]) -> BoxTable:
    """All true boxes of `records`, numbered by their place."""
    counts = [len(record.labels) for record in records]

    def joined(name: str, empty: np.ndarray) -> np.ndarray:
        return np.concatenate([empty, *(getattr(record, name) for record in records)])

    return BoxTable.ground_truth(
        np.repeat(np.arange(len(records)), counts),
        joined("labels", np.zeros(0, dtype=np.int64)),
        joined("boxes", np.zeros((0, 4), dtype=np.float32)),
        joined("crowd", np.zeros(0, dtype=bool)),
        joined("areas", np.zeros(0, dtype=np.float32)),
    )


def metrics_of(
    shards: Sequence[Shard],
    records: Sequence[ImageRecord],
    index: DataIndex,
    *,
    plots: Path | None,
) -> DetectionMetrics:
    """All figures of `records` (numbered by place); draws them into the folder `plots`.

    Raises RuntimeError when an image was never delivered.
    """
    parts = {number: part for shard in shards for number, part in shard.parts.items()}
    if len(parts) < len(records):
        raise RuntimeError(f"the loader delivered {len(parts)} of {len(records)} images")
    found = BoxTable.concatenate([parts[number] for number in sorted(parts)])
    truth = truth_of(records)
    coco = coco_metrics(found, truth, images=len(records), classes=len(index.names))
    curves = confidence_curves(found, truth)
    if plots is not None:
        _plot(coco, curves, confusion_matrix(found, truth, len(index.names)), index.names, plots)
    if not len(curves.classes):
        sys.stderr.write("warning: no true box in this data; mAP, P and R are given as 0\n")
    delivered = max(sum(shard.images for shard in shards), 1)
    losses = [sum(part) / delivered for part in zip(*(s.losses for s in shards), strict=True)]
    stages = [
        sum(part) / delivered * 1000 for part in zip(*(s.seconds for s in shards), strict=True)
    ]
    best = curves.best
    return DetectionMetrics(
        map50=max(coco.twelve["AP50"], 0.0),
        map=max(coco.twelve["AP"], 0.0),
        precision=float(curves.precision[:, best].mean()) if len(curves.classes) else 0.0,
        recall=float(curves.recall[:, best].mean()) if len(curves.classes) else 0.0,
        confidence=float(curves.confidence[best]),
        images=len(records),
        instances=int((~truth.crowd).sum()),
        per_class=_per_class(coco, curves, truth, index.names),
        coco=coco.twelve,
        losses=LossMeans(*losses) if losses else None,
        speed=Speed(*stages),
        detections=found,
        image_ids=tuple(record.image_id for record in records),
        category_ids=index.category_ids,
    )


def _per_class(
    coco: CocoMetrics, curves: Curves, truth: BoxTable, names: Sequence[str]
) -> tuple[ClassMetrics, ...]:
    plain = truth.take(~truth.crowd)
    instances = np.bincount(plain.labels, minlength=len(names))
    together = np.unique(np.stack((plain.image, plain.labels)), axis=1)
    images = np.bincount(together[1], minlength=len(names))
    precision = np.full(len(names), np.nan)
    recall = precision.copy()
    precision[curves.classes] = curves.precision[:, curves.best]
    recall[curves.classes] = curves.recall[:, curves.best]
    return tuple(
        ClassMetrics(
            name,
            int(images[label]),
            int(instances[label]),
            float(precision[label]),
            float(recall[label]),
            float(coco.ap50[label]),
            float(coco.ap[label]),
        )
        for label, name in enumerate(names)
    )


def _plot(
    coco: CocoMetrics, curves: Curves, matrix: np.ndarray, names: Sequence[str], folder: Path
) -> None:
    plot_curves(curves, names, folder)
    plot_precision_recall(
        coco.recall_axis,
        coco.precision50[curves.classes],
        names=[names[label] for label in curves.classes],
        path=folder / "PR_curve.png",
    )
    plot_confusion(matrix, names, folder / "confusion_matrix.png")
