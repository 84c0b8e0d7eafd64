"""Whether one model's AP is really higher: a paired bootstrap over the images of one data set.

Images are drawn with replacement, the same ones for every model, and AP is computed again each time
(Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 6 and 13).  Which detection
is right does not depend on the draw, so COCO's matching is done once for each image and IoU; a
draw then only counts how often each image is in it.  The ranking stays, too: sorted once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.evaluate.matching import BoxTable, coco_order, match
from utils.seeding import generator

IOUS = np.linspace(0.5, 0.95, 10)  # COCO's thresholds, with COCO's last digits
RECALLS = np.linspace(0, 1, 101)
METRICS: dict[str, slice] = {"AP": slice(None), "AP50": slice(0, 1), "AP75": slice(5, 6)}  # of IOUS
LEVEL = 0.95  # of the intervals
ELEMENTS_AT_ONCE = 1 << 18  # of the weights: some MB, which fit in the cache


def interpolated_ap(hits: np.ndarray, seen: np.ndarray, total: np.ndarray) -> np.ndarray:
    """COCO's average precision at 101 recalls, for B rankings at once: (B,), 0 where `total` is 0.

    hits, seen: (B, M) right detections, and all that count, up to and with each of the M right
    ones in the ranking; total: (B,) ground-truth boxes.
    """
    precision = hits / seen.clip(min=1)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    reached = RECALLS.searchsorted(hits / total.clip(min=1)[:, None], side="right")
    gained = np.diff(reached, axis=1, prepend=0)  # recalls that each right detection is first at
    return np.where(total > 0, (envelope * gained).sum(1) / len(RECALLS), 0.0)


def weighted_ap(found: BoxTable, truth: BoxTable, times: np.ndarray) -> np.ndarray:
    """AP at each of IOUS, (B, 10), of B data sets that hold image i `times[b, i]` times.

    As in COCO the mean over the classes that have ground-truth boxes; NaN where none has.  With all
    ones it is COCO's AP.  Only detections of one image with equal scores could be ordered
    differently than in a data set with copied images.  found: the detections on all images, as the
    evaluator keeps them; truth: `truth_of(by_id(index))`; times: of `draw`.
    """
    found = found.take(coco_order(found))
    matching = match(found, truth, IOUS)
    plain = truth.take(~truth.crowd)
    sums, classes = np.zeros((len(times), len(IOUS))), np.zeros((len(times), 1))
    for label in np.unique(plain.labels):
        mine = np.flatnonzero(found.labels == label)
        levels = [
            (np.flatnonzero(target >= 0), np.flatnonzero(ignored))
            for target, ignored in zip(
                matching.target[:, mine], matching.ignored[:, mine], strict=True
            )
        ]
        boxes = np.bincount(plain.image[plain.labels == label], minlength=times.shape[1])
        totals = times @ boxes
        portion = max(ELEMENTS_AT_ONCE // max(len(mine), 1), 1)
        for start in range(0, len(times), portion):
            part = slice(start, start + portion)
            weights = times[part][:, found.image[mine]]
            sums[part] += _class_ap(weights, levels, totals[part])
        classes += totals[:, None] > 0
    return np.where(classes > 0, sums / classes.clip(min=1), np.nan)


def _class_ap(
    weights: np.ndarray, levels: Sequence[tuple[np.ndarray, np.ndarray]], totals: np.ndarray
) -> np.ndarray:
    """AP of one class at each threshold: (B, T), 0 without a ground-truth box.

    weights: (B, N) how often each detection is there, best first; levels: for each threshold the
    positions of the right ones, and of those that count nowhere; totals: (B,) boxes.  A detection
    of weight k stands for k equal ones in a row.  Only the last of them matters: among right ones
    precision rises, among wrong ones recall stays.
    """
    seen = weights.cumsum(1, dtype=np.int32)
    result = []
    for right, ignored in levels:
        count = seen[:, right]
        if len(ignored):
            skipped = np.pad(weights[:, ignored].cumsum(1, dtype=np.int32), ((0, 0), (1, 0)))
            count -= skipped[:, ignored.searchsorted(right)]
        hits = weights[:, right].cumsum(1, dtype=np.int32)
        result.append(interpolated_ap(hits, count, totals))
    return np.stack(result, 1)


def draw(images: int, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """(1 + resamples, images) int32: how often each image is in each resample.

    The first row is of all images once.  A function of these three, whatever the models.
    """
    random = generator(seed)
    times = np.ones((1 + resamples, images), dtype=np.int32)
    for row in times[1:]:
        row[:] = np.bincount(random.integers(0, images, images), minlength=images)
    return times


@dataclass(frozen=True)
class Difference:
    """A metric minus the baseline's, with its percentile interval over the resamples."""

    delta: float  # on all images once
    low: float
    high: float
    level: float  # LEVEL, share of the resamples between low and high
    significant: bool  # the interval excludes 0
    resamples: int  # that have a ground-truth box
    seeds: list[int | None] = field(default_factory=list)  # those that were averaged


def difference(model: np.ndarray, baseline: np.ndarray, *, metric: str = "AP") -> Difference:
    """The paired difference of a metric ("AP", "AP50" or "AP75") of METRICS.

    model, baseline: (1 + resamples, 10) of `weighted_ap` by the same draw; for several seeds the
    mean over them, the same seeds for both.  The interval shows how certain the difference between
    *these* trained models is on other images of the same kind, not how much other seeds would
    differ.
    """
    deltas = (model - baseline)[:, METRICS[metric]].mean(1)
    delta, samples = float(deltas[0]), deltas[1:][~np.isnan(deltas[1:])]
    low, high = map(float, np.quantile(samples, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)))
    return Difference(delta, low, high, LEVEL, low > 0 or high < 0, len(samples))
