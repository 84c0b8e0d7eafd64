"""Matching of detections with true boxes; precision, recall and F1; the confusion matrix.

Arrays only: one row per box, whatever image it is on.  AP itself comes from coco.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

CURVE_IOU = 0.5  # P, R and F1 of table and curves
CURVE_POINTS = 1000  # of the confidence axis, 0 to 1
MATRIX_IOU = 0.45  # YOLOv5's thresholds for the confusion matrix
MATRIX_CONF = 0.25
PAIRS_AT_ONCE = 1 << 20  # bounds the memory of the overlaps: about 150 MB


@dataclass(frozen=True)
class Truth:
    """The true boxes of many images."""

    image: np.ndarray  # (M,) int64, number of the image
    labels: np.ndarray  # (M,) int64
    boxes: np.ndarray  # (M, 4) float, xyxy image pixels
    crowd: np.ndarray  # (M,) bool, a region of many objects
    areas: np.ndarray  # (M,) float, square pixels: what decides small, medium, large

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> Truth:
        """The boxes of these rows (indices or a mask)."""
        return Truth(
            self.image[rows],
            self.labels[rows],
            self.boxes[rows],
            self.crowd[rows],
            self.areas[rows],
        )


@dataclass(frozen=True)
class Found:
    """The detections of many images, best first within each image."""

    image: np.ndarray  # (N,) int64, number of the image
    labels: np.ndarray  # (N,) int64
    boxes: np.ndarray  # (N, 4) float, xyxy image pixels
    scores: np.ndarray  # (N,) float in [0, 1]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> Found:
        """The detections of these rows (indices or a mask)."""
        return Found(self.image[rows], self.labels[rows], self.boxes[rows], self.scores[rows])

    @staticmethod
    def concatenate(parts: list[Found]) -> Found:
        """All parts in their order; no part at all gives no detections."""
        if not parts:
            none = np.zeros(0, dtype=np.int64)
            return Found(none, none, np.zeros((0, 4)), np.zeros(0))
        return Found(
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in ("image", "labels", "boxes", "scores")
            )
        )


def overlaps(
    found: Found, truth: Truth, *, least: float, same_class: bool, of_found: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs on one image (and of one class) that overlap by at least `least`.

    Returns (detection row, truth row, overlap), (P,) each.  The overlap is the IoU, or, with
    `of_found`, the intersection over the detection's own area (COCO's measure for crowds).
    """
    classes = 1 + max(_highest(found.labels), _highest(truth.labels)) if same_class else 1
    keys = [table.image * classes + (table.labels if same_class else 0) for table in (found, truth)]
    parts = [
        _overlap(found, truth, pairs, least=least, of_found=of_found)
        for pairs in _joined(keys[0], keys[1])
    ]
    if not parts:
        none = np.zeros(0, dtype=np.int64)
        return none, none, np.zeros(0)
    rows, columns, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    return rows, columns, values


def _highest(labels: np.ndarray) -> int:
    return int(labels.max(initial=0))


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


def _overlap(
    found: Found,
    truth: Truth,
    pairs: tuple[np.ndarray, np.ndarray],
    *,
    least: float,
    of_found: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows, columns = pairs
    a = found.boxes[rows].astype(np.float64)
    b = truth.boxes[columns].astype(np.float64)
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    shared = sides.clip(min=0).prod(1)
    whole = (a[:, 2:] - a[:, :2]).prod(1)
    if not of_found:
        whole = whole + (b[:, 2:] - b[:, :2]).prod(1) - shared
    values = np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)
    kept = values >= least
    return rows[kept], columns[kept], values[kept]


@dataclass(frozen=True)
class Matches:
    """What became of each detection; neither of both: a false positive."""

    correct: np.ndarray  # (N,) bool, matched with a true box
    ignored: np.ndarray  # (N,) bool, unmatched and on a crowd region


def match(found: Found, truth: Truth, *, iou: float = CURVE_IOU) -> Matches:
    """COCO's matching at one threshold, over all areas.

    By falling score each detection takes the free true box of its class with the highest IoU, if
    that is `iou` or more.  One that gets none, but has at least the share `iou` of its own area on
    a crowd region of its class, is ignored: neither right nor wrong.
    """
    crowd = np.flatnonzero(truth.crowd)
    plain = np.flatnonzero(~truth.crowd)
    rows, columns, values = overlaps(found, truth.take(plain), least=iou, same_class=True)
    correct = _best_by_score(found.scores, len(plain), rows, columns, values)
    on_crowd, _, _ = overlaps(found, truth.take(crowd), least=iou, same_class=True, of_found=True)
    ignored = np.zeros(len(found), dtype=bool)
    ignored[on_crowd] = True
    return Matches(correct, ignored & ~correct)


def _best_by_score(
    scores: np.ndarray, targets: int, rows: np.ndarray, columns: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """Which detections get a box when they choose one after another by falling score.

    Instead of a loop over detections, all propose to the best box that has not refused them, and a
    box keeps the highest score (Gale and Shapley's deferred acceptance).  As all boxes prefer by
    score, the result is that of choosing in turn; the rounds are few.  Of equal IoU the later box
    is taken, of equal scores the earlier detection chooses first, as in COCO's evaluation.
    """
    rank = np.empty(len(scores), dtype=np.int64)
    rank[np.argsort(-scores, kind="stable")] = np.arange(len(scores))
    order = np.lexsort((-columns, -values, rank[rows]))
    rows, columns = rows[order], columns[order]
    people, first = np.unique(rank[rows], return_index=True)
    last = np.append(first[1:], len(rows))
    place = first.copy()  # the pair each one proposes now
    holder = np.full(targets, len(scores))
    bidding = np.arange(len(people))
    while len(bidding):
        wanted = columns[place[bidding]]
        np.minimum.at(holder, wanted, people[bidding])
        refused = bidding[holder[wanted] != people[bidding]]
        place[refused] += 1
        bidding = bidding[place[bidding] < last[bidding]]
        if not len(refused):
            break
    result = np.zeros(len(scores), dtype=bool)
    result[rows[first[bidding]]] = True
    return result


@dataclass(frozen=True)
class Curves:
    """Precision, recall and F1 over the confidence threshold, for the classes with true boxes."""

    classes: np.ndarray  # (K,) int64, class index of each row
    confidence: np.ndarray  # (1000,) thresholds
    precision: np.ndarray  # (K, 1000)
    recall: np.ndarray  # (K, 1000)
    f1: np.ndarray  # (K, 1000)

    @property
    def best(self) -> int:
        """Position on the confidence axis of the highest mean F1 (the lowest such one)."""
        return int(self.f1.mean(0).argmax()) if len(self.classes) else 0


def confidence_curves(found: Found, truth: Truth, *, iou: float = CURVE_IOU) -> Curves:
    """P, R and F1 of each class with at least one true box, at 1000 thresholds from 0 to 1.

    At a threshold count the detections with that score or more.  Where none is left, precision is
    1 (nothing wrong was said), except for a class never detected at all, whose curves are 0.
    """
    matches = match(found, truth, iou=iou)
    counted = ~matches.ignored
    axis = np.linspace(0, 1, CURVE_POINTS)
    classes, instances = np.unique(truth.labels[~truth.crowd], return_counts=True)
    precision = np.zeros((len(classes), CURVE_POINTS))
    recall = np.zeros_like(precision)
    for row, (label, total) in enumerate(zip(classes, instances, strict=True)):
        mine = np.flatnonzero(counted & (found.labels == label))
        if not len(mine):
            continue
        mine = mine[np.argsort(-found.scores[mine], kind="stable")]
        right = np.concatenate([[0], np.cumsum(matches.correct[mine])])
        left = np.searchsorted(-found.scores[mine], -axis, side="right")
        precision[row] = np.where(left > 0, right[left] / left.clip(min=1), 1.0)
        recall[row] = right[left] / total
    both = precision + recall
    f1 = np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0)
    return Curves(classes, axis, precision, recall, f1)


def confusion_matrix(
    found: Found,
    truth: Truth,
    classes: int,
    *,
    conf: float = MATRIX_CONF,
    iou: float = MATRIX_IOU,
) -> np.ndarray:
    """(classes + 1, classes + 1) int64 counts: row = predicted, column = true, last = background.

    Detections with score `conf` or more and true boxes pair off across classes by falling IoU, down
    to `iou`; of equal IoU the higher score first.  What stays alone is paired with background,
    except for detections on a crowd region of their class (see `match`) and the regions themselves.
    """
    found = found.take(found.scores >= conf)
    plain = truth.take(~truth.crowd)
    crowd = truth.take(truth.crowd)
    rows, columns, values = overlaps(found, plain, least=iou, same_class=False)
    order = np.lexsort((rows, -found.scores[rows], -values))
    rows, columns = _pair_off(rows[order], columns[order])
    alone = np.ones(len(found), dtype=bool)
    alone[rows] = False
    alone[overlaps(found, crowd, least=iou, same_class=True, of_found=True)[0]] = False
    missed = np.ones(len(plain), dtype=bool)
    missed[columns] = False
    nothing = np.full(max(len(found), len(plain)), classes)
    predicted = (found.labels[rows], found.labels[alone], nothing[: missed.sum()])
    true = (plain.labels[columns], nothing[: alone.sum()], plain.labels[missed])
    side = classes + 1
    cells = np.concatenate(predicted) * side + np.concatenate(true)
    return np.bincount(cells, minlength=side * side).reshape(side, side)


def _pair_off(rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One to one from pairs in order of preference, as if taken one by one from the top.

    Each round takes the pairs that stand first for both of their members.
    """
    taken: list[tuple[np.ndarray, np.ndarray]] = []
    while len(rows):
        first = np.zeros(len(rows), dtype=np.int64)
        for side in (rows, columns):
            first[np.unique(side, return_index=True)[1]] += 1
        now = first == 2
        taken.append((rows[now], columns[now]))
        free = ~np.isin(rows, rows[now]) & ~np.isin(columns, columns[now])
        rows, columns = rows[free], columns[free]
    if not taken:
        return rows, columns
    left, right = (np.concatenate(side) for side in zip(*taken, strict=True))
    return left, right
