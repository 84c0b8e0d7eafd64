"""Whether one model's AP is really higher: a paired bootstrap over the images of one data set.

Images are drawn with replacement, the same ones for every model, and AP is computed again each time
(Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 6 and 13).  Which detection
is right does not depend on the draw, so COCO's matching is done once for each image and IoU; a
draw then only counts how often each image is in it.  The ranking stays, too: sorted once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from engine.evaluate.box_table import BoxTable
from engine.evaluate.matching import Matching, coco_order, match
from utils.seeding import generator

IOUS = np.linspace(0.5, 0.95, 10)  # COCO's thresholds, with COCO's last digits
RECALLS = np.linspace(0, 1, 101)
METRICS: dict[str, slice] = {"AP": slice(None), "AP50": slice(0, 1), "AP75": slice(5, 6)}  # of IOUS
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


@dataclass(frozen=True)
class _ClassRanking:
    """One class of one detector, ready for weights on the images."""

    image: np.ndarray  # (N,) number of the image of each detection, best first
    right: tuple[np.ndarray, ...]  # for each threshold the positions of the right ones
    ignored: tuple[np.ndarray, ...]  # and of those that count nowhere
    boxes: np.ndarray  # (images,) ground-truth boxes

    def ap(self, times: np.ndarray) -> np.ndarray:
        """(B, images) how often each image is there -> (B, T); NaN without a ground-truth box.

        A detection of weight k stands for k equal ones in a row.  Only the last of them matters:
        among right ones precision rises, among wrong ones recall stays.
        """
        weights = times[:, self.image]
        seen = weights.cumsum(1, dtype=np.int32)
        total = times @ self.boxes
        result = np.zeros((len(times), len(self.right)))
        for level, (right, ignored) in enumerate(zip(self.right, self.ignored, strict=True)):
            count = seen[:, right]
            if len(ignored):
                skipped = np.zeros((len(times), len(ignored) + 1), dtype=np.int32)
                weights[:, ignored].cumsum(1, dtype=np.int32, out=skipped[:, 1:])
                count -= skipped[:, ignored.searchsorted(right)]
            hits = weights[:, right].cumsum(1, dtype=np.int32)
            result[:, level] = interpolated_ap(hits, count, total)
        result[total == 0] = np.nan
        return result


def _rankings(
    detections: BoxTable, matching: Matching, truth: BoxTable, images: int
) -> list[_ClassRanking]:
    plain = truth.take(~truth.crowd)
    tables = []
    for label in np.unique(plain.labels):
        mine = np.flatnonzero(detections.labels == label)
        tables.append(
            _ClassRanking(
                detections.image[mine],
                tuple(np.flatnonzero(level[mine] >= 0) for level in matching.target),
                tuple(np.flatnonzero(level[mine]) for level in matching.ignored),
                np.bincount(plain.image[plain.labels == label], minlength=images),
            )
        )
    return tables


def weighted_ap(found: BoxTable, truth: BoxTable, times: np.ndarray) -> np.ndarray:
    """AP at each of IOUS, (B, 10), of B data sets that hold image i `times[b, i]` times.

    As in COCO the mean over the classes that have ground-truth boxes; NaN where none has.  With all
    ones it is COCO's AP.  Only detections of one image with equal scores could be ordered
    differently than in a data set with copied images.
    """
    found = found.take(coco_order(found))
    tables = _rankings(found, match(found, truth, IOUS), truth, times.shape[1])
    largest = max((len(table.image) for table in tables), default=1)
    portion = max(ELEMENTS_AT_ONCE // max(largest, 1), 1)
    parts = []
    for start in range(0, len(times), portion):
        some = times[start : start + portion]
        values = np.stack(
            [table.ap(some) for table in tables] or [np.full((len(some), 10), np.nan)]
        )
        there = ~np.isnan(values[:, :, :1])
        sums = np.where(there, values, 0.0).sum(0)
        count = there.sum(0)
        parts.append(np.where(count > 0, sums / count.clip(min=1), np.nan))
    return np.concatenate(parts)


@dataclass(frozen=True)
class Draw:
    """Which images each resample has: a function of these three, whatever the models."""

    images: int
    resamples: int = 1000
    seed: int = 0

    def times(self) -> np.ndarray:
        """(resamples, images) int32: how often each image was drawn; each row sums to `images`."""
        random = generator(self.seed)
        result = np.empty((self.resamples, self.images), dtype=np.int32)
        for row in result:
            drawn = random.integers(0, self.images, self.images)
            row[:] = np.bincount(drawn, minlength=self.images)
        return result


def resample_ap(found: BoxTable, truth: BoxTable, draw: Draw) -> np.ndarray:
    """The AP of one trained model at each of IOUS: (1 + resamples, 10).

    The first row is of all images once, COCO's; the others are of the resamples of `draw`, NaN
    where one has no ground-truth box.  found: the detections on the `draw.images` images, as the
    evaluator keeps them; truth: `truth_of(by_id(index))`.  Raises ValueError without ground-truth
    boxes, and for image numbers beyond `draw.images`.
    """
    if truth.crowd.all():
        raise ValueError("AP is not defined: the images have no ground-truth box")
    highest = max(int(table.image.max(initial=0)) for table in (found, truth))
    if highest >= draw.images:
        raise ValueError(f"image number {highest}, but the draw is of {draw.images} images")
    times = np.concatenate((np.ones((1, draw.images), dtype=np.int32), draw.times()))
    return weighted_ap(found, truth, times)


@dataclass(frozen=True)
class Difference:
    """A metric minus the baseline's, with its percentile interval over the resamples."""

    delta: float  # on all images once
    low: float
    high: float
    level: float  # share of the resamples between low and high
    significant: bool  # the interval excludes 0
    resamples: int  # that have a ground-truth box
    seeds: list[int | None] = field(default_factory=list)  # those that were averaged


def difference(
    model: np.ndarray, baseline: np.ndarray, *, metric: str = "AP", level: float = 0.95
) -> Difference:
    """The paired difference of a metric ("AP", "AP50" or "AP75") of METRICS.

    model, baseline: (1 + resamples, 10) of `resample_ap` by the same draw; for several seeds the
    mean over them, the same seeds for both.  The interval shows how certain the difference between
    *these* trained models is on other images of the same kind, not how much other seeds would
    differ.  Raises ValueError where no resample has a ground-truth box.
    """
    deltas = (model - baseline)[:, METRICS[metric]].mean(1)
    delta, samples = float(deltas[0]), deltas[1:][~np.isnan(deltas[1:])]
    if not len(samples):
        raise ValueError("no resample has a ground-truth box: draw more")
    low, high = map(float, np.quantile(samples, ((1 - level) / 2, (1 + level) / 2)))
    return Difference(delta, low, high, level, low > 0 or high < 0, len(samples))
