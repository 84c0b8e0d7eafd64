"""What a detector's AP50 is lost to: the errors of TIDE (Bolya et al., arXiv:2008.08115).

Each detection that is not right at IoU 0.5 is of one kind, and each kind has an oracle that repairs
it and nothing else (sections 2.2 and 2.3).  What AP50 gains by that repair alone is the kind's
weight; the weights do not add up to what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from engine.compare.bootstrap import interpolated_ap
from engine.evaluate.matching import BoxTable, Pairs, coco_order, match, overlaps

FOREGROUND = 0.5  # t_f of the paper
BACKGROUND = 0.1  # t_b
KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND_KIND, MISSED = KINDS
SPECIAL = ("false positives", "false negatives")
NO_ERROR = ""


@dataclass(frozen=True)
class ErrorSplit:
    """The errors of one detector; plain values, `dataclasses.asdict` gives JSON."""

    ap50: float  # COCO's
    delta: dict[str, float]  # of KINDS: how much higher AP50 is with this kind alone repaired
    special: dict[str, float]  # of SPECIAL: likewise without false positives, or without misses
    counts: dict[str, float]  # of KINDS: detections of the kind; for "missed" ground-truth boxes

    @staticmethod
    def mean(splits: Sequence[ErrorSplit]) -> ErrorSplit:
        """The mean over seeds, at least one."""

        def mean(parts: Sequence[dict[str, float]]) -> dict[str, float]:
            return {key: fmean(part[key] for part in parts) for key in parts[0]}

        ap50, *parts = zip(*(vars(split).values() for split in splits), strict=True)
        return ErrorSplit(fmean(ap50), *map(mean, parts))


@dataclass(frozen=True)
class Diagnosis:
    """The detections of all images, best first, with the kind of every error."""

    labels: np.ndarray  # (N,) int64
    right: np.ndarray  # (N,) bool
    counted: np.ndarray  # (N,) bool, not ignored
    kind: np.ndarray  # (N,) str, of KINDS without "missed"; NO_ERROR: right, or rightly ignored
    repaired: np.ndarray  # (N,) int64, label of the box that the detection would get; -1: none
    totals: np.ndarray  # (classes,) ground-truth boxes; -1: a class that has none
    missed: np.ndarray  # (classes,) boxes that no detection has and no repaired one would get


def _ap50(labels: np.ndarray, right: np.ndarray, counted: np.ndarray, totals: np.ndarray) -> float:
    """Mean over the classes of a ranking as in `Diagnosis`; totals: -1 leaves a class out.

    Where nothing is to be found, AP is 1 if nothing is reported as found, and else 0: only an
    oracle takes away a class's last ground-truth box.
    """
    values = []
    for label in np.flatnonzero(totals >= 0):
        mine = right[counted & (labels == label)]
        seen = 1 + np.flatnonzero(mine)
        hits = np.arange(1, 1 + len(seen))
        if totals[label]:
            values.append(interpolated_ap(hits[None], seen[None], totals[[label]])[0])
        else:
            values.append(float(not len(mine)))
    return float(np.mean(values))


def split_errors(found: BoxTable, truth: BoxTable) -> ErrorSplit:
    """The error split of one detector on one data set.

    found: as the evaluator keeps it (`DetectionMetrics.detections`); truth:
    `truth_of(by_id(index))`, with at least one ground-truth box.  Of each image and class the 100
    best detections count, and the classes that have ground-truth boxes, as in COCO's AP50.
    """
    diagnosis = diagnose(found, truth)
    labels, right, counted = diagnosis.labels, diagnosis.right, diagnosis.counted
    totals, missed = diagnosis.totals, diagnosis.missed
    ap50 = _ap50(labels, right, counted, totals)
    without = {}
    for kind in KINDS[:-1]:  # section 2.3: what can be repaired is, all else of the kind goes
        of_kind = diagnosis.kind == kind
        mended = of_kind & (diagnosis.repaired >= 0)
        repaired = np.where(mended, diagnosis.repaired, labels)
        without[kind] = _ap50(repaired, right | mended, (counted & ~of_kind) | mended, totals)
    without[MISSED] = _ap50(labels, right, counted, totals - missed)
    had = np.bincount(labels[right], minlength=len(totals))[: len(totals)]
    special = {
        SPECIAL[0]: _ap50(labels, right, right, totals),
        SPECIAL[1]: _ap50(labels, right, counted, np.where(totals < 0, -1, had)),
    }
    delta, special = ({k: ap - ap50 for k, ap in part.items()} for part in (without, special))
    counts = {kind: float((diagnosis.kind == kind).sum()) for kind in KINDS[:-1]}
    return ErrorSplit(ap50, delta, special, {**counts, MISSED: float(missed.sum())})


def diagnose(found: BoxTable, truth: BoxTable) -> Diagnosis:
    """Section 2.2, and where several kinds fit their order in the authors' tool (tidecv 1.0.1).

    With the IoU to the nearest box of the same and of another class: localisation, if the
    former is from 0.1 to 0.5; else classification, if the latter is 0.5 or more; else duplicate, if
    the former is; else background, if both are at most 0.1; else both.  A detection that COCO
    ignores (on a crowd region) is an error only where its repair would find a box.
    """
    truth = truth.take(np.argsort(truth.crowd, kind="stable"))  # crowd regions last
    plain = truth.take(~truth.crowd)
    found = found.take(coco_order(found))
    matching = match(found, truth, np.array([FOREGROUND]))
    box, ignored = matching.target[0], matching.ignored[0]
    pairs = overlaps(found, plain, min_overlap=BACKGROUND, same_class=False)
    same = found.labels[pairs.rows] == plain.labels[pairs.columns]
    mine, nearest_mine = _nearest(pairs.take(same), len(found))
    other, nearest_other = _nearest(pairs.take(~same), len(found))
    tests = {
        LOCALISATION: (mine >= BACKGROUND) & (mine < FOREGROUND),
        CLASSIFICATION: other >= FOREGROUND,
        DUPLICATE: mine >= FOREGROUND,
        BACKGROUND_KIND: other <= BACKGROUND,
    }
    kind = np.select([box >= 0, *tests.values()], [NO_ERROR, *tests], default=BOTH)
    wanted = np.select(
        [kind == LOCALISATION, kind == CLASSIFICATION], [nearest_mine, nearest_other], default=-1
    )
    kind[ignored & (wanted < 0)] = NO_ERROR
    free = np.ones(len(plain), dtype=bool)
    free[box[box >= 0]] = False
    claims = np.flatnonzero((wanted >= 0) & free[wanted])
    boxes, first = np.unique(wanted[claims], return_index=True)  # of several claims the best-scored
    repaired = np.full(len(found), -1)
    repaired[claims[first]] = plain.labels[boxes]
    free[boxes] = False
    totals = np.bincount(plain.labels)
    missed = np.bincount(plain.labels[free], minlength=len(totals))
    totals = np.where(totals > 0, totals, -1)
    return Diagnosis(found.labels, box >= 0, ~ignored, kind, repaired, totals, missed)


def _nearest(pairs: Pairs, detections: int) -> tuple[np.ndarray, np.ndarray]:
    """(detections,) highest overlap, 0 without a pair, and the column it is with, -1 likewise."""
    pairs = pairs.take(np.lexsort((pairs.columns, -pairs.overlap, pairs.rows)))
    rows, first = np.unique(pairs.rows, return_index=True)
    overlap, column = np.zeros(detections), np.full(detections, -1)
    overlap[rows], column[rows] = pairs.overlap[first], pairs.columns[first]
    return overlap, column
