"""From records and costs to results.json: figures over seeds, differences, error splits."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from engine.compare.bootstrap import Draw, ResampledAp, difference, resample_ap
from engine.compare.costs import Measured, paper_cost, with_measured
from engine.compare.error_split import ErrorSplit, split_errors
from engine.compare.plan import Contender
from engine.compare.record import Record, load_detections
from engine.compare.schema import (
    ACCURACY,
    DONE,
    FAILED,
    PARTLY,
    PROFILED,
    ClassFigures,
    Difference,
    Errors,
    Row,
    Run,
    Spread,
    Training,
)
from engine.evaluate.box_table import BoxTable

DIFFERENCES = ("AP", "AP50", "AP75")
COCO_KEYS = ACCURACY[:-2]  # of a record's 'coco'; the others stand beside it


@dataclass(frozen=True)
class Finished:
    """A run that is done, and where its record lies."""

    path: Path
    record: Record


@dataclass(frozen=True)
class Failed:
    """A run that is not, and why."""

    seed: int | None
    cause: str
    command: str


@dataclass(frozen=True)
class Evidence:
    """All that is known of one model."""

    contender: Contender
    finished: Sequence[Finished] = ()  # by seed
    failed: Sequence[Failed] = ()
    measured: Measured | None = None


def spread(values: Sequence[float | None]) -> Spread:
    """Mean and sample standard deviation of what is defined, and the values."""
    known = [value for value in values if value is not None]
    return Spread(
        mean=statistics.fmean(known) if known else None,
        sd=statistics.stdev(known) if len(known) > 1 else None,
        values=list(values),
    )


def accuracy_of(record: Record) -> dict[str, float | None]:
    """The figures ACCURACY of one run; None where COCO's is not defined."""
    coco = record.metrics["coco"]
    figures = {key: None if coco[key] < 0 else float(coco[key]) for key in COCO_KEYS}
    return {**figures, **{key: record.metrics[key] for key in ACCURACY[-2:]}}


def rows(
    all_evidence: Sequence[Evidence], *, truth: BoxTable | None, images: int, baseline: str
) -> list[Row]:
    """The rows of a table, in the order given.

    truth: the true boxes of the `images` validation images; None where nothing is evaluated.
    """
    judged: dict[str, dict[int | None, Judged]] = {}
    splits: dict[str, ErrorSplit] = {}
    if truth is not None and not truth.crowd.all():
        draw = Draw(images)
        for item in all_evidence:
            name = item.contender.name
            found = {one.record.seed: load_detections(one.path) for one in item.finished}
            judged[name] = {
                one.record.seed: Judged(
                    accuracy_of(one.record), resample_ap([found[one.record.seed]], truth, draw)
                )
                for one in item.finished
            }
            if found:
                splits[name] = ErrorSplit.mean([split_errors(f, truth) for f in found.values()])
    table = []
    for item in all_evidence:
        name = item.contender.name
        against = None
        if name != baseline:
            against = differences(judged.get(name, {}), judged.get(baseline, {}))
        table.append(_row(item, errors=splits.get(name), against=against))
    return table


@dataclass(frozen=True)
class Judged:
    """One run's figures as recorded, and its AP on the resamples, of the rounded detections."""

    figures: Mapping[str, float | None]
    samples: ResampledAp


def differences(
    model: Mapping[int | None, Judged], baseline: Mapping[int | None, Judged]
) -> dict[str, Difference] | None:
    """The paired bootstrap of the seeds that both have; None where there is none.

    The difference itself is that of the recorded figures; the interval is the resamples'.
    """
    common = [seed for seed in model if seed in baseline]
    if not common:
        return None
    ours, theirs = (
        _together([side[seed].samples for seed in common]) for side in (model, baseline)
    )
    result = {}
    for figure in DIFFERENCES:
        found = difference(ours, theirs, figure=figure)
        means = [
            statistics.fmean(side[seed].figures[figure] or 0.0 for seed in common)
            for side in (model, baseline)
        ]
        result[figure] = Difference(
            delta=means[0] - means[1],
            low=found.low,
            high=found.high,
            level=found.level,
            significant=found.significant,
            resamples=found.resamples,
            seeds=common,
        )
    return result


def _together(seeds: Sequence[ResampledAp]) -> ResampledAp:
    """The mean over seeds, which `resample_ap` takes of them all at once, too."""
    whole = np.mean([one.whole for one in seeds], axis=0)
    samples = np.mean([one.samples for one in seeds], axis=0)
    return ResampledAp(whole, samples, len(seeds), seeds[0].draw)


def _row(
    item: Evidence, *, errors: ErrorSplit | None, against: dict[str, Difference] | None
) -> Row:
    contender = item.contender
    records = [one.record for one in item.finished]
    figures = [accuracy_of(record) for record in records]
    row = Row(
        name=contender.name,
        status=_status(item),
        cause=_cause(item),
        model=contender.model,
        seeds=[record.seed for record in records],
        runs=_runs(item),
        accuracy={key: spread([one[key] for one in figures]) for key in ACCURACY}
        if figures
        else None,
        classes=_classes(records),
        difference=against,
        errors=Errors(**asdict(errors)) if errors is not None else None,  # type: ignore[typeddict-item]
        cost=paper_cost(contender, None),
        latency=[],
        blocks=None,
        energy=None,
        speedup=None,
        training=_training(records),
    )
    return with_measured(row, contender, item.measured)


def _status(item: Evidence) -> str:
    if item.contender.cause is not None or (item.failed and not item.finished):
        return FAILED
    if item.failed:
        return PARTLY
    return DONE if item.finished else PROFILED


def _cause(item: Evidence) -> str | None:
    if item.contender.cause is not None:
        return item.contender.cause
    causes = [
        one.cause if one.seed is None else f"seed {one.seed}: {one.cause}" for one in item.failed
    ]
    return "; ".join(causes) or None


def _runs(item: Evidence) -> list[Run]:
    done = [
        Run(
            seed=one.record.seed,
            status=DONE,
            cause=None,
            command=one.record.command,
            record=one.path.name,
            accuracy=accuracy_of(one.record),
            best_epoch=one.record.best_epoch,
            seconds=train_seconds(one.record),
            curves=one.record.curves,
            environment=one.record.environment,
        )
        for one in item.finished
    ]
    failed = [
        Run(
            seed=one.seed,
            status=FAILED,
            cause=one.cause,
            command=one.command,
            record=None,
            accuracy=None,
            best_epoch=None,
            seconds=None,
            curves={},
            environment={},
        )
        for one in item.failed
    ]
    return sorted([*done, *failed], key=lambda run: -1 if run["seed"] is None else run["seed"])


def _classes(records: Sequence[Record]) -> list[ClassFigures] | None:
    if not records:
        return None
    together = zip(*(record.metrics["per_class"] for record in records), strict=True)
    return [
        ClassFigures(
            name=str(same[0]["name"]),
            instances=int(same[0]["instances"]),
            AP=spread([one["ap"] for one in same]),
            AP50=spread([one["ap50"] for one in same]),
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


def _rates(record: Record) -> list[float]:
    """Images per second of each epoch; an epoch resumed after its last step has none."""
    return [rate for rate in record.curves.get("images_per_second", []) if rate and rate > 0]


def _rate(record: Record) -> float | None:
    """All images over all time."""
    rates = _rates(record)
    return statistics.harmonic_mean(rates) if rates else None


def train_seconds(record: Record) -> float | None:
    """Training and evaluating all epochs; an epoch that was interrupted counts as one that was not.

    By the rates, since an interrupted epoch's own seconds are those after the interruption.
    """
    rate, epochs = _rate(record), len(record.curves.get("epoch", []))
    if rate is None:
        return None
    images = int(record.protocol["data"]["train_images"])
    evaluations = sum(value or 0.0 for value in record.curves.get("val_seconds", []))
    return epochs * images / rate + evaluations


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
