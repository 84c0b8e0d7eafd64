"""From records and costs to the rows of results.json: means over seeds, differences, errors."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from engine.compare.bootstrap import METRICS, Difference, difference, draw, weighted_ap
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
from engine.evaluate.matching import BoxTable
from utils.terminal import progress


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


def rows(models: Sequence[ModelRuns], *, truth: BoxTable, baseline: str) -> list[Row]:
    """The rows of a table, in the order given, without what is measured."""
    table = [_row(item) for item in models]
    records = [one for item in models for one in item.finished]
    if not records or truth.crowd.all():
        return table
    times = draw(records[0].images)
    resampled: list[dict[int | None, np.ndarray]] = []  # AP of each model by seed
    bar = progress("bootstrap", total=len(records))
    for index, item in enumerate(models):
        found = {one.seed: one.detections() for one in item.finished}
        resampled.append({})
        for seed, one in found.items():
            resampled[-1][seed] = weighted_ap(one, truth, times)
            bar.update()
        if found:
            errors = ErrorSplit.mean([split_errors(one, truth) for one in found.values()])
            table[index] = replace(table[index], errors=errors)
    bar.close()
    base = next((i for i, item in enumerate(models) if item.entry.name == baseline), None)
    for index, item in enumerate(models):
        if base is not None and index != base:
            pair = (item, models[base]), (resampled[index], resampled[base])
            table[index] = replace(table[index], difference=_differences(*pair))
    return table


def _differences(
    models: Sequence[ModelRuns], resampled: Sequence[Mapping[int | None, np.ndarray]]
) -> dict[str, Difference] | None:
    """The paired bootstrap of a model and the baseline over the seeds that both have, if any.

    The difference itself is that of the recorded metrics; the interval is of the resamples, which
    are of the rounded detections.
    """
    common = [seed for seed in resampled[0] if seed in resampled[1]]
    if not common:
        return None
    samples = [np.mean([side[seed] for seed in common], axis=0) for side in resampled]
    recorded = [[one.accuracy for one in side.finished if one.seed in common] for side in models]
    result = {}
    for metric in METRICS:
        ours, theirs = (statistics.fmean(one[metric] or 0.0 for one in side) for side in recorded)
        found = difference(*samples, metric=metric)
        result[metric] = replace(found, delta=ours - theirs, seeds=common)
    return result


def _row(item: ModelRuns) -> Row:
    entry, records, failed = item.entry, item.finished, item.failed
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
        for one in records
    ]
    causes = [f"{'' if one.seed is None else f'seed {one.seed}: '}{one.cause}" for one in failed]
    if entry.cause is not None or (failed and not records):
        status = FAILED
    elif failed:
        status = PARTLY
    else:
        status = DONE if records else PROFILED
    row = Row(
        name=entry.name,
        status=status,
        cause="; ".join(causes) or None if entry.cause is None else entry.cause,
        model=entry.model,
        seeds=[one.seed for one in records],
        runs=sorted([*done, *failed], key=lambda run: -1 if run.seed is None else run.seed),
        cost=computed_cost(entry),
        training=_training([record for record in records if record.curves]),
    )
    if not records:
        return row
    accuracy = [record.accuracy for record in records]
    classes = [
        ClassAccuracy(
            same[0].name,
            same[0].instances,
            AP=spread([one.ap for one in same]),
            AP50=spread([one.ap50 for one in same]),
        )
        for same in zip(*(record.scores.per_class for record in records), strict=True)
    ]
    by_metric = {key: spread([one[key] for one in accuracy]) for key in ACCURACY}
    return replace(row, accuracy=by_metric, classes=classes)


def _training(records: Sequence[Record]) -> Training | None:
    """Of records with curves; None where there is none."""
    if not records:
        return None
    waiting = [spread(record.curves.get("data_wait_share", [])).mean for record in records]
    return Training(
        epochs=max(len(record.curves["epoch"]) for record in records),
        images_per_second=spread([_rate(record) for record in records]),
        wait_share=spread(waiting),
        seconds=spread([train_seconds(record) for record in records]),
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
