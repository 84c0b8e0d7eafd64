"""COCO's average precision and recall, from arrays, by a compiled engine.

hotcoco (Rust, MIT) does the work: bit-identical to pycocotools in the tests and in a fuzz of random
cases, and the fastest of those compared (docs/metrics.md; benchmarks/coco_engines.py measures).
Where it cannot be imported, pycocotools takes its place.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.evaluate.matching import MAX_DETECTIONS, BoxTable, to_xywh

try:
    import hotcoco
except ImportError:  # no build for this machine
    hotcoco = None  # type: ignore[assignment]

NOT_DEFINED = -1.0  # COCO's value without ground truth
AREAS = ("all", "small", "medium", "large")
MAX_DETS = (1, 10, MAX_DETECTIONS)  # for each image and class

# key: (average precision, not recall; IoU or None for the mean over .50:.95; area; index in
# MAX_DETS), in COCO's order
METRICS: dict[str, tuple[bool, float | None, int, int]] = {
    "AP": (True, None, 0, 2),
    "AP50": (True, 0.5, 0, 2),
    "AP75": (True, 0.75, 0, 2),
    "APs": (True, None, 1, 2),
    "APm": (True, None, 2, 2),
    "APl": (True, None, 3, 2),
    "AR1": (False, None, 0, 0),
    "AR10": (False, None, 0, 1),
    "AR100": (False, None, 0, 2),
    "ARs": (False, None, 1, 2),
    "ARm": (False, None, 2, 2),
    "ARl": (False, None, 3, 2),
}


@dataclass(frozen=True)
class CocoMetrics:
    """COCO's metrics of one set of detections."""

    twelve: dict[str, float]  # keys of METRICS, in COCO's order; -1 without ground truth
    ap: np.ndarray  # (classes,) mean over IoU .50:.95; NaN for a class without ground truth
    ap50: np.ndarray  # (classes,) at IoU .50; NaN likewise
    precision50: np.ndarray  # (classes, 101 recalls) interpolated, at IoU .50; NaN likewise


def coco_metrics(
    detections: BoxTable, truth: BoxTable, *, images: int, classes: int
) -> CocoMetrics:
    """COCO's protocol on all `images` (numbered from 0) and `classes`.

    Of each image and class the 100 best detections count.  Ties of score are broken by the image's
    index, then by the order given, so index the images in the order of their ids.
    """
    engine = _pycocotools if hotcoco is None else _hotcoco
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what it does
        evaluation = engine(detections, truth, images, classes)
        evaluation.evaluate()
        evaluation.accumulate()
    precision, recall = (np.asarray(evaluation.eval[key]) for key in ("precision", "recall"))
    ious = np.linspace(0.5, 0.95, len(precision))
    twelve = {}
    for key, (is_precision, iou, area, limit) in METRICS.items():
        values = (precision if is_precision else recall)[..., area, limit]
        if iou is not None:
            values = values[np.isclose(ious, iou)]
        values = values[values > NOT_DEFINED]
        twelve[key] = float(values.mean()) if values.size else NOT_DEFINED
    ap = precision[:, :, :, 0, 2]  # IoU, recall, class
    ap = np.where(ap > NOT_DEFINED, ap, np.nan)  # of a class either all or none
    return CocoMetrics(twelve, ap.mean((0, 1)), ap[0].mean(0), ap[0].T)


def _hotcoco(detections: BoxTable, truth: BoxTable, images: int, classes: int) -> Any:
    reference = hotcoco.COCO.from_arrays(
        [{"id": number} for number in range(images)],
        [{"id": number, "name": str(number)} for number in range(classes)],
        truth.image,
        truth.labels,
        to_xywh(truth.boxes),
        area=truth.areas.astype(np.float64),
        iscrowd=truth.crowd.astype(bool),
    )
    columns = (detections.image, to_xywh(detections.boxes), detections.scores, detections.labels)
    rows = np.column_stack([column.astype(np.float64) for column in columns])
    return hotcoco.COCOeval(reference, reference.load_res(rows), "bbox")


def _pycocotools(detections: BoxTable, truth: BoxTable, images: int, classes: int) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return from_tables(detections, truth, images, classes, COCO, COCOeval)


def from_tables(
    detections: BoxTable, truth: BoxTable, images: int, classes: int, coco: Any, evaluation: Any
) -> Any:
    """An `evaluation` of two `coco`, classes with the interface of pycocotools."""
    keys = ("image_id", "category_id", "bbox", "area", "iscrowd", "score")
    tables = (coco(), coco())
    for table, item in zip(tables, (truth, detections), strict=True):
        boxes = to_xywh(item.boxes)
        areas = truth.areas if item is truth else boxes[:, 2:].prod(1)
        columns = (item.image, item.labels, boxes, areas, item.crowd, item.scores)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        table.dataset = {
            "images": [{"id": number} for number in range(images)],
            "categories": [{"id": number} for number in range(classes)],
            "annotations": [
                {"id": n, **dict(zip(keys, r, strict=True))} for n, r in enumerate(rows, 1)
            ],
        }
        table.createIndex()
    return evaluation(*tables, "bbox")


def twelve_lines(twelve: dict[str, float]) -> str:
    """The twelve metrics as pycocotools prints them."""
    lines = []
    for key, (is_precision, iou, area, limit) in METRICS.items():
        title = "Average Precision  (AP)" if is_precision else "Average Recall     (AR)"
        span = "0.50:0.95" if iou is None else f"{iou:.2f}     "
        lines.append(
            f" {title} @[ IoU={span} | area={AREAS[area]:>6} | maxDets={MAX_DETS[limit]:>3} ]"
            f" = {twelve[key]:0.3f}"
        )
    return "\n".join(lines)
