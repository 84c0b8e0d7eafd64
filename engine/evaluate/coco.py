"""COCO's average precision and recall, from arrays, by a compiled engine.

hotcoco (Rust, MIT) does the work: bit-identical to pycocotools in the tests and in a fuzz of random
cases, and the fastest of those compared (docs/metrics.md; benchmarks/coco_engines.py measures).
"""

from __future__ import annotations

from dataclasses import dataclass

import hotcoco
import numpy as np

from engine.evaluate.box_table import BoxTable, to_xywh
from engine.evaluate.matching import MAX_DETECTIONS

NOT_DEFINED = -1.0  # COCO's figure where there is no true box
AREAS = ("all", "small", "medium", "large")
MAX_DETS = (1, 10, MAX_DETECTIONS)  # for each image and class

# key: (average precision, not recall; IoU or None for the mean over .50:.95; area; position in
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
    """COCO's figures of one set of detections."""

    twelve: dict[str, float]  # keys of METRICS, in COCO's order; -1 where there is no true box
    ap: np.ndarray  # (classes,) mean over IoU .50:.95; NaN for a class without true boxes
    ap50: np.ndarray  # (classes,) at IoU .50; NaN likewise
    recall_axis: np.ndarray  # (101,)
    precision50: np.ndarray  # (classes, 101) interpolated, at IoU .50; NaN likewise


def coco_metrics(found: BoxTable, truth: BoxTable, *, images: int, classes: int) -> CocoMetrics:
    """COCO's protocol on all `images` (numbered from 0) and `classes`.

    Of each image and class the 100 best detections count.  Ties of score are broken by the image's
    number, then by the order given, so number the images in the order of their ids.
    """
    reference = hotcoco.COCO.from_arrays(
        [{"id": number} for number in range(images)],
        [{"id": number, "name": str(number)} for number in range(classes)],
        truth.image,
        truth.labels,
        to_xywh(truth.boxes),
        area=truth.areas.astype(np.float64),
        iscrowd=truth.crowd.astype(bool),
    )
    columns = (found.image, to_xywh(found.boxes), found.scores, found.labels)
    rows = np.column_stack([column.astype(np.float64) for column in columns])
    judge = hotcoco.COCOeval(reference, reference.load_res(rows), "bbox")
    judge.evaluate()
    judge.accumulate()
    result = judge.eval
    if result is None:
        raise RuntimeError("hotcoco accumulated nothing")
    precision, recall = np.asarray(result["precision"]), np.asarray(result["recall"])
    thresholds = np.asarray(judge.params.iou_thrs)
    ap = precision[:, :, :, 0, 2]  # IoU, recall, class
    return CocoMetrics(
        {key: _metric(precision, recall, thresholds, *what) for key, what in METRICS.items()},
        _defined(ap.mean((0, 1))),
        _defined(ap[0].mean(0)),
        np.asarray(judge.params.rec_thrs),
        _defined(ap[0].T),
    )


def _metric(
    precision: np.ndarray,
    recall: np.ndarray,
    thresholds: np.ndarray,
    is_precision: bool,
    iou: float | None,
    area: int,
    limit: int,
) -> float:
    values = precision[:, :, :, area, limit] if is_precision else recall[:, :, area, limit]
    if iou is not None:
        values = values[np.isclose(thresholds, iou)]
    values = values[values > NOT_DEFINED]
    return float(values.mean()) if values.size else NOT_DEFINED


def _defined(values: np.ndarray) -> np.ndarray:
    return np.where(values > NOT_DEFINED, values, np.nan)


def twelve_lines(twelve: dict[str, float]) -> str:
    """The twelve figures as pycocotools prints them."""
    lines = []
    for key, (is_precision, iou, area, limit) in METRICS.items():
        title = "Average Precision  (AP)" if is_precision else "Average Recall     (AR)"
        span = "0.50:0.95" if iou is None else f"{iou:.2f}     "
        lines.append(
            f" {title} @[ IoU={span} | area={AREAS[area]:>6} | maxDets={MAX_DETS[limit]:>3} ]"
            f" = {twelve[key]:0.3f}"
        )
    return "\n".join(lines)
