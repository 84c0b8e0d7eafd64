"""From the detections of all processes to the metrics of one evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.index.records import DataIndex, ImageRecord
from engine.evaluate.box_table import BoxTable
from engine.evaluate.coco import CocoMetrics, coco_metrics
from engine.evaluate.matching import Curves, confidence_curves
from engine.evaluate.results import ClassMetrics, DetectionMetrics, LossMeans
from engine.measure.bench import Speed
from utils.terminal import warn


@dataclass(frozen=True)
class Shard:
    """The detections of one process."""

    detections: BoxTable
    images: int  # delivered by its loader
    losses: tuple[float, ...]  # box, obj, cls: sums over `images`; empty without a loss
    seconds: tuple[float, ...]  # pre-process, inference, NMS: sums likewise


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


def metrics_of(
    shards: Sequence[Shard], records: Sequence[ImageRecord], index: DataIndex
) -> DetectionMetrics:
    """All metrics of `records`, which are those of `by_id(index)`.

    Raises RuntimeError unless each image was delivered once.
    """
    delivered = sum(shard.images for shard in shards)
    if delivered != len(records):
        raise RuntimeError(f"the loader delivered {delivered} of {len(records)} images")
    found = BoxTable.concatenate([shard.detections for shard in shards])
    found = found.take(np.argsort(found.image, kind="stable"))
    truth = truth_of(records)
    coco = coco_metrics(found, truth, images=len(records), classes=len(index.names))
    curves = confidence_curves(found, truth)
    some = len(curves.classes) > 0
    if not some:
        warn("warning: no ground-truth box in this data; mAP, P and R are given as 0")
    losses = np.sum([shard.losses for shard in shards], 0) / max(delivered, 1)
    milliseconds = np.sum([shard.seconds for shard in shards], 0) / max(delivered, 1) * 1000
    best = curves.best
    return DetectionMetrics(
        map50=max(coco.twelve["AP50"], 0.0),
        map=max(coco.twelve["AP"], 0.0),
        precision=float(curves.precision[:, best].mean()) if some else 0.0,
        recall=float(curves.recall[:, best].mean()) if some else 0.0,
        confidence=float(curves.confidence[best]),
        images=len(records),
        instances=int((~truth.crowd).sum()),
        per_class=_per_class(coco, curves, truth, index.names),
        coco=coco.twelve,
        losses=LossMeans(*losses.tolist()) if len(losses) else None,
        speed=Speed(*milliseconds.tolist()),
        detections=found,
        image_ids=tuple(record.image_id for record in records),
        category_ids=index.category_ids,
        curves=curves,
        precision50=coco.precision50,
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
    columns = (names, images, instances, precision, recall, coco.ap50, coco.ap)
    rows = zip(*(np.asarray(column).tolist() for column in columns), strict=True)
    return tuple(ClassMetrics(*row) for row in rows)
