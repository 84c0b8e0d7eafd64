"""Tables of boxes and their matching; precision, recall and F1; the confusion matrix.

One row per box, whatever image it is on.  AP itself comes from coco.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

DECIMALS = 3  # of pixels; gives back the numbers of COCO's JSON, which float32 corners blur
CURVE_IOU = 0.5  # P, R and F1 of table and curves
CURVE_POINTS = 1000  # of the confidence axis, 0 to 1
MATRIX_IOU = 0.45  # YOLOv5's thresholds for the confusion matrix
MATRIX_CONF = 0.25
PAIRS_AT_ONCE = 1 << 20  # bounds the memory of the overlaps: about 150 MB
MAX_DETECTIONS = 100  # of an image and class: COCO's limit
MAX_IOU = 1 - 1e-10  # COCO asks for no higher IoU than this


@dataclass(frozen=True)
class BoxTable:
    """One row per box. Detections come best first within each image."""

    image: np.ndarray  # (N,) int64, index of the image
    labels: np.ndarray  # (N,) int64
    boxes: np.ndarray  # (N, 4) float, xyxy image pixels
    scores: np.ndarray  # (N,) float in [0, 1]; ground truth: 1
    crowd: np.ndarray  # (N,) bool, a region of many objects; detections: False
    areas: np.ndarray  # (N,) float, square pixels (of the mask, if known): small, medium or large

    @staticmethod
    def detections(
        image: np.ndarray, labels: np.ndarray, boxes: np.ndarray, scores: np.ndarray
    ) -> BoxTable:
        """Detections; their areas are those of the boxes."""
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        return BoxTable(image, labels, boxes, scores, np.zeros(len(labels), dtype=bool), areas)

    @staticmethod
    def ground_truth(
        image: np.ndarray,
        labels: np.ndarray,
        boxes: np.ndarray,
        crowd: np.ndarray,
        areas: np.ndarray,
    ) -> BoxTable:
        """Ground-truth boxes."""
        return BoxTable(image, labels, boxes, np.ones(len(labels)), crowd, areas)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> BoxTable:
        """The boxes of these rows (indices or a mask)."""
        return BoxTable(*(column[rows] for column in vars(self).values()))

    @staticmethod
    def concatenate(parts: Sequence[BoxTable]) -> BoxTable:
        """All parts in their order; an empty table for no parts."""
        if not parts:
            none = np.zeros(0, dtype=np.int64)
            return BoxTable.detections(none, none, np.zeros((0, 4)), np.zeros(0))
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return BoxTable(*map(np.concatenate, columns))


def to_xywh(boxes: np.ndarray) -> np.ndarray:
    """(N, 4) xyxy -> (N, 4) float64 left, top, width, height, to 0.001, for COCO's files."""
    corners = boxes.astype(np.float64).reshape(-1, 4)
    sizes = corners[:, 2:] - corners[:, :2]
    return np.round(np.concatenate((corners[:, :2], sizes), 1), DECIMALS)


@dataclass(frozen=True)
class Pairs:
    """Detections and ground-truth boxes on the same image."""

    rows: np.ndarray  # (P,) int64, of the detections
    columns: np.ndarray  # (P,) int64, of the ground truth
    overlap: np.ndarray  # (P,) float64, IoU; on a crowd region the share of the detection's area

    def take(self, which: np.ndarray) -> Pairs:
        """Some of the pairs (indices or a mask)."""
        return Pairs(self.rows[which], self.columns[which], self.overlap[which])


def overlaps(
    detections: BoxTable, truth: BoxTable, *, min_overlap: float, same_class: bool = True
) -> Pairs:
    """Pairs on one image (and of one class) that overlap by at least `min_overlap`.

    The arithmetic is that of pycocotools to the last bit, since an IoU of exactly 0.5 is common
    among boxes of whole pixels.
    """
    tables = (detections, truth)
    classes = 1 + max(int(table.labels.max(initial=0)) for table in tables) if same_class else 1
    keys = [table.image * classes + (table.labels if same_class else 0) for table in tables]
    boxes = [to_xywh(table.boxes) for table in tables]
    parts = [Pairs(*(np.zeros(0, dtype=kind) for kind in (np.int64, np.int64, np.float64)))]
    for rows, columns in _joined(keys[0], keys[1]):
        a, b = boxes[0][rows], boxes[1][columns]
        ends = np.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:])
        shared = (ends - np.maximum(a[:, :2], b[:, :2])).clip(min=0).prod(1)
        own = a[:, 2:].prod(1)
        whole = np.where(truth.crowd[columns], own, own + b[:, 2:].prod(1) - shared)
        values = np.divide(shared, whole, out=np.zeros_like(shared), where=shared > 0)
        parts.append(Pairs(rows, columns, values).take(values >= min_overlap))
    return Pairs(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0]))
    )


def _joined(left: np.ndarray, right: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All (i, j) with left[i] == right[j], in portions of bounded size."""
    order = np.argsort(right, kind="stable")
    ordered = right[order]
    first = np.searchsorted(ordered, left, side="left")
    counts = np.searchsorted(ordered, left, side="right") - first
    rows = np.flatnonzero(counts)
    portion = np.cumsum(counts[rows]) // PAIRS_AT_ONCE
    for some in np.split(rows, np.flatnonzero(np.diff(portion)) + 1):
        if not len(some):
            continue
        times = counts[some]
        begin = np.repeat(np.cumsum(times) - times, times)
        within = np.arange(len(begin)) - begin
        yield np.repeat(some, times), order[np.repeat(first[some], times) + within]


def coco_order(detections: BoxTable) -> np.ndarray:
    """Rows of the 100 best detections of each image and class, best first over all images.

    Ties of score are broken by the image's index, then by the order given.
    """
    order = np.lexsort((detections.image, -detections.scores))
    classes = 1 + int(detections.labels.max(initial=0))
    group = detections.image[order] * classes + detections.labels[order]
    together = np.argsort(group, kind="stable")
    _, first, sizes = np.unique(group[together], return_index=True, return_counts=True)
    rank = np.empty(len(order), dtype=np.int64)  # within the image and class
    rank[together] = np.arange(len(order)) - np.repeat(first, sizes)
    return order[rank < MAX_DETECTIONS]


@dataclass(frozen=True)
class Matching:
    """The outcome for each of N detections at each of T IoU thresholds.

    Without a target and not ignored: a false positive.
    """

    target: np.ndarray  # (T, N) int64, row of the ground-truth box that the detection has; -1: none
    ignored: np.ndarray  # (T, N) bool, without a box but on a crowd region of its class


def match(detections: BoxTable, truth: BoxTable, ious: np.ndarray) -> Matching:
    """COCO's matching over all areas, at each of the thresholds `ious` (T,).

    By falling score each detection takes the free ground-truth box of its class with the highest
    IoU, if that reaches the threshold; of equal IoU the last box, of equal scores the earlier
    detection first.  A detection that gets none, but has at least that share of its own area on a
    crowd region of its class, is ignored: neither right nor wrong.
    """
    ious = np.minimum(ious, MAX_IOU)
    pairs = overlaps(detections, truth, min_overlap=float(ious.min()))
    rank = np.empty(len(detections), dtype=np.int64)
    rank[np.argsort(-detections.scores, kind="stable")] = np.arange(len(detections))
    pairs = pairs.take(np.lexsort((-pairs.columns, -pairs.overlap, rank[pairs.rows])))
    crowd = truth.crowd[pairs.columns]
    target = np.full((len(ious), len(detections)), -1)
    ignored = np.zeros(target.shape, dtype=bool)
    for level, iou in enumerate(ious):
        enough = pairs.overlap >= iou
        ignored[level, pairs.rows[enough & crowd]] = True
        target[level] = _first_free(pairs.take(enough & ~crowd), len(detections), len(truth))
    return Matching(target, ignored & (target < 0))


def _first_free(pairs: Pairs, detections: int, boxes: int) -> np.ndarray:
    """(detections,) the box of each when, in the order of the pairs, the first free one is taken.

    A plain loop: only pairs over the threshold come here, about one for each ground-truth box.
    """
    taken, holder = [-1] * detections, [-1] * boxes
    for row, column in zip(pairs.rows.tolist(), pairs.columns.tolist(), strict=True):
        if taken[row] < 0 and holder[column] < 0:
            taken[row], holder[column] = column, row
    return np.array(taken, dtype=np.int64)


@dataclass(frozen=True)
class Curves:
    """Precision, recall and F1 over the confidence threshold, of the ground truth's classes."""

    classes: np.ndarray  # (K,) int64, class index of each row
    confidence: np.ndarray  # (1000,) thresholds
    precision: np.ndarray  # (K, 1000)
    recall: np.ndarray  # (K, 1000)
    f1: np.ndarray  # (K, 1000)

    @property
    def best(self) -> int:
        """Index on the confidence axis of the highest mean F1 (the lowest such one)."""
        return int(self.f1.mean(0).argmax()) if len(self.classes) else 0


def confidence_curves(detections: BoxTable, truth: BoxTable) -> Curves:
    """P, R and F1 at IoU 0.5 of each class in the ground truth, at 1000 thresholds from 0 to 1.

    At each threshold the detections with that score or more count.  Where none is left, precision
    is 1 (nothing is wrong), except for a class never detected at all, whose curves are 0.
    """
    matching = match(detections, truth, np.array([CURVE_IOU]))
    correct, counted = matching.target[0] >= 0, ~matching.ignored[0]
    axis = np.linspace(0, 1, CURVE_POINTS)
    classes, instances = np.unique(truth.labels[~truth.crowd], return_counts=True)
    precision = np.zeros((len(classes), CURVE_POINTS))
    recall = np.zeros_like(precision)
    for row, (label, total) in enumerate(zip(classes, instances, strict=True)):
        mine = np.flatnonzero(counted & (detections.labels == label))
        if not len(mine):
            continue
        mine = mine[np.argsort(-detections.scores[mine], kind="stable")]
        right = np.concatenate([[0], np.cumsum(correct[mine])])
        left = np.searchsorted(-detections.scores[mine], -axis, side="right")
        precision[row] = np.where(left > 0, right[left] / left.clip(min=1), 1.0)
        recall[row] = right[left] / total
    both = precision + recall
    f1 = np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0)
    return Curves(classes, axis, precision, recall, f1)


def confusion_matrix(detections: BoxTable, truth: BoxTable, classes: int) -> np.ndarray:
    """(classes + 1, classes + 1) int64 counts: row = predicted, column = true, last = background.

    Detections with score 0.25 or more and ground-truth boxes are paired across classes by falling
    IoU, down to 0.45; of equal IoU the higher score first.  What stays alone is paired with
    background, except for detections on a crowd region of their class (see `match`) and the
    regions themselves.
    """
    sure = detections.take(detections.scores >= MATRIX_CONF)
    pairs = overlaps(sure, truth, min_overlap=MATRIX_IOU, same_class=False)
    pairs = pairs.take(np.lexsort((pairs.rows, -sure.scores[pairs.rows], -pairs.overlap)))
    crowd = truth.crowd[pairs.columns]
    target = _first_free(pairs.take(~crowd), len(sure), len(truth))
    paired = target >= 0
    alone = ~paired
    same_class = sure.labels[pairs.rows] == truth.labels[pairs.columns]
    alone[pairs.rows[crowd & same_class]] = False
    missed = ~truth.crowd
    missed[target[paired]] = False
    matrix = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    np.add.at(matrix, (sure.labels[paired], truth.labels[target[paired]]), 1)
    matrix[:classes, classes] = np.bincount(sure.labels[alone], minlength=classes)
    matrix[classes, :classes] = np.bincount(truth.labels[missed], minlength=classes)
    return matrix
