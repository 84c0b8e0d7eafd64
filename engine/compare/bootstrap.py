"""Is one model's AP really higher? A paired bootstrap over the images of one data set.

Images are drawn with replacement, the same ones for every model, and AP is computed anew each time
(Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 6 and 13).  Which detection
is right does not depend on the draw, so COCO's matching is done once for each image and IoU; a
draw then only counts how often each image is in it.  The ranking stays, too: sorted once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.evaluate.box_table import BoxTable
from engine.evaluate.matching import Matching, coco_order, match
from utils.seeding import generator

IOUS = np.linspace(0.5, 0.95, 10)  # COCO's thresholds, with COCO's last digits
RECALLS = np.linspace(0, 1, 101)
FIGURES: dict[str, slice] = {"AP": slice(None), "AP50": slice(0, 1), "AP75": slice(5, 6)}  # of IOUS
ELEMENTS_AT_ONCE = 1 << 18  # of the weights: some MB, which fit in the cache


def interpolated_ap(hits: np.ndarray, seen: np.ndarray, total: np.ndarray) -> np.ndarray:
    """COCO's average precision at 101 recalls, for B rankings at once: (B,), 0 where `total` is 0.

    hits, seen: (B, M) right detections, and all that count, up to and with each of the M right
    ones in the ranking; total: (B,) true boxes.
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
    right: tuple[np.ndarray, ...]  # for each threshold the places of the right ones
    ignored: tuple[np.ndarray, ...]  # and of those that count nowhere
    boxes: np.ndarray  # (images,) true boxes

    def ap(self, times: np.ndarray) -> np.ndarray:
        """(B, images) how often each image is there -> (B, T); NaN where there is no true box.

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

    As in COCO the mean over the classes that have a true box; NaN where none has.  With all ones it
    is COCO's AP.  Ties of score between the detections of one image are the only place where the
    order could differ from that of a data set with copied images.
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

    def __post_init__(self) -> None:
        if self.images < 1 or self.resamples < 1:
            raise ValueError(f"Draw needs images and resamples of at least 1, got {self}")

    def times(self) -> np.ndarray:
        """(resamples, images) int32: how often each image was drawn; each row sums to `images`."""
        random = generator(self.seed)
        result = np.empty((self.resamples, self.images), dtype=np.int32)
        for row in result:
            drawn = random.integers(0, self.images, self.images)
            row[:] = np.bincount(drawn, minlength=self.images)
        return result


@dataclass(frozen=True)
class ResampledAp:
    """The AP of one model, the mean over its seeds, at each of IOUS."""

    whole: np.ndarray  # (10,) on all images once: COCO's
    samples: np.ndarray  # (resamples, 10); NaN where a resample has no true box
    seeds: int
    draw: Draw


def resample_ap(seeds: Sequence[BoxTable], truth: BoxTable, draw: Draw) -> ResampledAp:
    """The AP of one model on the resamples of `draw`.

    seeds: the detections of each trained copy of the model on the same `draw.images` images, each
    as the evaluator keeps it (`DetectionMetrics.detections`); their AP is averaged in each
    resample.  truth: `truth_of(by_id(index))`.  Raises ValueError without seeds or
    true boxes, and for image numbers beyond `draw.images`.
    """
    if not len(seeds):
        raise ValueError("no detections: resample_ap needs at least one seed")
    if truth.crowd.all():
        raise ValueError("AP is not defined: the images have no true box")
    numbers = [truth.image, *(found.image for found in seeds)]
    highest = max(int(image.max(initial=0)) for image in numbers)
    if highest >= draw.images:
        raise ValueError(f"image number {highest}, but the draw is of {draw.images} images")
    times = np.concatenate((np.ones((1, draw.images), dtype=np.int32), draw.times()))
    values = np.mean([weighted_ap(found, truth, times) for found in seeds], axis=0)
    return ResampledAp(values[0], values[1:], len(seeds), draw)


@dataclass(frozen=True)
class ApDifference:
    """A model's AP less the baseline's, with its percentile interval over the resamples."""

    figure: str  # of FIGURES
    delta: float  # on all images once
    low: float
    high: float
    level: float  # share of the resamples between low and high
    resamples: int  # that have a true box

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def difference(
    model: ResampledAp, baseline: ResampledAp, *, figure: str = "AP", level: float = 0.95
) -> ApDifference:
    """The paired difference of a figure ("AP", "AP50" or "AP75").

    The interval tells how sure the difference between *these* trained copies is on other images of
    the same kind; how much other seeds would differ, it does not tell.  Raises ValueError for
    different draws or numbers of seeds (compare the seeds that both models have).
    """
    if model.draw != baseline.draw:
        raise ValueError(f"not the same resamples: {model.draw} and {baseline.draw}")
    if model.seeds != baseline.seeds:
        raise ValueError(f"not the same number of seeds: {model.seeds} and {baseline.seeds}")
    if not 0 < level < 1:
        raise ValueError(f"level is a share between 0 and 1, got {level}")
    part = FIGURES[figure]
    deltas = (model.samples[:, part] - baseline.samples[:, part]).mean(1)
    deltas = deltas[~np.isnan(deltas)]
    delta = float((model.whole[part] - baseline.whole[part]).mean())
    if not len(deltas):
        raise ValueError("no resample has a true box: draw more")
    low, high = np.quantile(deltas, ((1 - level) / 2, (1 + level) / 2))
    return ApDifference(figure, delta, float(low), float(high), level, len(deltas))
