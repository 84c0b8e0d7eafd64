"""From records and costs to the rows of results.json: means over seeds, differences, errors."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from engine.compare.arrays import load_detections
from engine.compare.bootstrap import METRICS, Difference, difference, draw, resample_ap
from engine.compare.costs import computed_cost
from engine.compare.error_split import ErrorSplit, split_errors
from engine.compare.plan import ModelEntry
from engine.compare.record import Record
from engine.compare.schema import (
    ACCURACY,
    DONE,
    FAILED,
    PARTLY,
    PROFILED,
    ClassAccuracy,
    Row,
    Run,
    Spread,
    Training,
)
from engine.evaluate.box_table import BoxTable


@dataclass(frozen=True)
class ModelRuns:
    """All that is known of one model."""

    entry: ModelEntry
    finished: Sequence[Record] = ()  # by seed
    failed: Sequence[Run] = ()


def spread(values: Sequence[float | None]) -> Spread:
    """Mean and sample standard deviation of what is defined, and the values."""
    known = [value for value in values if value is not None]
    mean = statistics.fmean(known) if known else None
    return Spread(mean, statistics.stdev(known) if len(known) > 1 else None, list(values))


def rows(
    models: Sequence[ModelRuns], *, truth: BoxTable | None, images: int, baseline: str
) -> list[Row]:
    """The rows of a table, in the order given, without what is measured.

    truth: the ground truth of the `images` evaluated images; None where nothing is evaluated.
    """
    table = [_row(item) for item in models]
    if truth is None or truth.crowd.all():
        return table
    times = draw(images)
    resampled: dict[str, dict[int | None, np.ndarray]] = {}
    errors: dict[str, ErrorSplit | None] = {}
    for item in models:
        name = item.entry.name
        found = {one.seed: load_detections(one.path) for one in item.finished}
        resampled[name] = {seed: resample_ap(one, truth, times) for seed, one in found.items()}
        splits = [split_errors(one, truth) for one in found.values()]
        errors[name] = ErrorSplit.mean(splits) if splits else None
    base = next((item for item in models if item.entry.name == baseline), None)
    compared = []
    for item, row in zip(models, table, strict=True):
        against = None
        if base is not None and item is not base:
            against = _differences(item, base, resampled[row.name], resampled[baseline])
        compared.append(replace(row, errors=errors[row.name], difference=against))
    return compared


def _differences(
    model: ModelRuns,
    baseline: ModelRuns,
    ours: Mapping[int | None, np.ndarray],
    theirs: Mapping[int | None, np.ndarray],
) -> dict[str, Difference] | None:
    """The paired bootstrap of the seeds that both have; None where there is none.

    The difference itself is that of the recorded metrics; the interval is of the resamples, which
    are of the rounded detections.
    """
    common = [seed for seed in ours if seed in theirs]
    if not common:
        return None
    samples = [np.mean([side[seed] for seed in common], axis=0) for side in (ours, theirs)]
    recorded = [
        [one.accuracy for one in side.finished if one.seed in common] for side in (model, baseline)
    ]
    result = {}
    for metric in METRICS:
        means = [statistics.fmean(one[metric] or 0.0 for one in side) for side in recorded]
        found = difference(*samples, metric=metric)
        result[metric] = replace(found, delta=means[0] - means[1], seeds=common)
    return result


def _row(item: ModelRuns) -> Row:
    entry = item.entry
    records = item.finished
    accuracy = [record.accuracy for record in records]
    return Row(
        name=entry.name,
        status=_status(item),
        cause=_cause(item),
        model=entry.model,
        seeds=[record.seed for record in records],
        runs=_runs(item),
        cost=computed_cost(entry),
        accuracy={key: spread([one[key] for one in accuracy]) for key in ACCURACY}
        if records
        else None,
        classes=_classes(records) if records else None,
        training=_training(records),
    )


def _status(item: ModelRuns) -> str:
    if item.entry.cause is not None or (item.failed and not item.finished):
        return FAILED
    if item.failed:
        return PARTLY
    return DONE if item.finished else PROFILED


def _cause(item: ModelRuns) -> str | None:
    if item.entry.cause is not None:
        return item.entry.cause
    causes = [
        str(one.cause) if one.seed is None else f"seed {one.seed}: {one.cause}"
        for one in item.failed
    ]
    return "; ".join(causes) or None


def _runs(item: ModelRuns) -> list[Run]:
    done = [
        Run(
            seed=one.seed,
            status=DONE,
            command=one.command,
            record=one.path.name,
            accuracy=one.accuracy,
            best_epoch=one.best_epoch,
            seconds=train_seconds(one),
            curves=one.curves,
            environment=one.environment,
        )
        for one in item.finished
    ]
    return sorted([*done, *item.failed], key=lambda run: -1 if run.seed is None else run.seed)


def _classes(records: Sequence[Record]) -> list[ClassAccuracy]:
    together = zip(*(record.scores.per_class for record in records), strict=True)
    return [
        ClassAccuracy(
            name=same[0].name,
            instances=same[0].instances,
            AP=spread([one.ap for one in same]),
            AP50=spread([one.ap50 for one in same]),
        )
        for same in together
    ]


def _training(records: Sequence[Record]) -> Training | None:
    trained = [record for record in records if record.curves]
    if not trained:
        return None
    return Training(
        epochs=max(len(record.curves["epoch"]) for record in trained),
        images_per_second=spread([_rate(record) for record in trained]),
        wait_share=spread([_mean(record.curves.get("data_wait_share", [])) for record in trained]),
        seconds=spread([train_seconds(record) for record in trained]),
    )


def _rate(record: Record) -> float | None:
    """Images per second: all images by all time.  An epoch resumed after its last step has none."""
    rates = [rate for rate in record.curves.get("images_per_second", []) if rate and rate > 0]
    return statistics.harmonic_mean(rates) if rates else None


def train_seconds(record: Record) -> float | None:
    """Training and evaluating all epochs; an epoch that was interrupted counts as one that was not.

    By the rates, since an interrupted epoch's own seconds are those after the interruption.
    """
    rate, images = _rate(record), record.data.train_images
    if rate is None or images is None:
        return None
    evaluations = sum(value or 0.0 for value in record.curves.get("val_seconds", []))
    return len(record.curves["epoch"]) * images / rate + evaluations


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
