"""What the models of a comparison cost: on paper, and on this device in one sitting."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.compare.plan import Contender
from engine.compare.schema import (
    BlockTime,
    Cost,
    Energy,
    LatencyAt,
    Layer,
    Measurement,
    Part,
    Row,
    SpeedUp,
    SpeedUpAt,
)
from engine.measure.bench import prepare, sample_images
from engine.measure.energy import Meter, find_meter, measure_energy
from engine.measure.latency import FAULTS, Candidate, LatencyConfig, LatencyReport, measure_latency
from engine.measure.peak import Roof, Task, measure_roof
from engine.measure.roofline import Roofline, roofline
from models.detector import Detector
from models.profile.counting import ModelProfile, profile
from models.profile.guidelines import findings, sentences
from utils.environment import device_name
from utils.errors import cause_of

ENERGY_SECONDS = 5.0  # of each model


@dataclass(frozen=True)
class Measured:
    """The measured figures of one model."""

    latency: list[LatencyAt]
    roofline: Roofline | None  # at batch 1
    energy: Energy | None
    cause: str | None = None  # why roofline or energy failed


def paper_cost(contender: Contender, timed: Roofline | None) -> Cost | None:
    """The cost of a model, with the times of its rows where it was timed; None without a model."""
    unfused = contender.profile
    if contender.spec is None or unfused is None:
        return None
    model = prepare(contender.detector(), torch.device("cpu"), fused=True, channels_last=False)
    assert isinstance(model, Detector)
    fused = profile(model, unfused.image_size)
    total, found = fused.cost, findings(fused.cost)
    times = timed.rows if timed is not None else (None,) * len(fused.rows)
    layers = [
        Layer(
            index=row.index,
            name=row.spec.name,
            block=row.spec.block,
            section=row.spec.section,
            params=row.params,
            macs=row.cost.macs,
            flops=2 * row.cost.macs,
            access_bytes=moved.cost.access_bytes,
            bytes=moved.cost.bytes,
            kernels=len(moved.cost.kernels),
            predicted=None if time is None else time.predicted,
            measured=None if time is None else time.measured,
            bound=None if time is None else time.bound,
        )
        for row, moved, time in zip(unfused.rows, fused.rows, times, strict=True)
    ]
    return Cost(
        image_size=unfused.image_size,
        classes=contender.classes,
        params=unfused.params,
        macs=unfused.macs,
        flops=unfused.flops,
        backbone=_part(unfused, "backbone"),
        neck=_part(unfused, "neck"),
        head=_part(unfused, "head"),
        access_bytes=total.access_bytes,
        bytes=total.bytes,
        activation_bytes=total.peak_bytes,
        intensity=total.intensity,
        unequal_widths=found.unequal_widths,
        groups=found.groups,
        kernels=found.kernels,
        branches=found.branches,
        elementwise=found.elementwise,
        guidelines=list(sentences(fused)),
        layers=layers,
    )


def _part(profile: ModelProfile, section: str) -> Part:
    part = profile.part(section)
    return Part(params=part.params, macs=part.macs, flops=2 * part.macs)


@dataclass(frozen=True)
class _Bench:
    """What all models are measured with."""

    device: torch.device
    config: LatencyConfig
    roof: Roof | None
    meter: Meter | None
    energy_seconds: float

    def roofline(self, model: Detector, size: int) -> Roofline | None:
        """The rows of a prepared model at batch 1."""
        if self.roof is None:
            return None
        return roofline(model, self._images(1, size, model), self.roof)

    @torch.inference_mode()
    def energy(self, model: Detector, size: int, batch: int) -> Energy | None:
        """Of one image in batches of this size; None where nothing counts it."""
        images = self._images(batch, size, model)
        taken = measure_energy(
            lambda: model(images),
            images=batch,
            meter=self.meter,
            device=self.device,
            seconds=self.energy_seconds,
        )
        if taken is None:
            return None
        joules = taken.joules_per_image
        return Energy(joules_per_image=joules, watts=taken.watts, batch=batch, source=taken.source)

    def _images(self, batch: int, size: int, model: Detector) -> torch.Tensor:
        layout = self.config.channels_last
        return sample_images(batch, size, self.device, like=model, channels_last=layout)

    def details(
        self, item: Candidate, latency: list[LatencyAt], energy_batch: int | None
    ) -> Measured:
        """All but the latency, of a model that ran at one batch size at least."""
        if not _works(latency):
            return Measured(latency, None, None)
        config = self.config
        layout = {"fused": config.fused, "channels_last": config.channels_last}
        timed: Roofline | None = None
        try:
            model = prepare(item.model, self.device, **layout)
            assert isinstance(model, Detector)
            timed = self.roofline(model, item.image_size)
            energy = None
            if energy_batch is not None:
                energy = self.energy(model, item.image_size, energy_batch)
        except FAULTS as error:
            return Measured(latency, timed, None, cause_of(error))
        return Measured(latency, timed, energy)


def measure(
    contenders: Sequence[Contender],
    *,
    device: torch.device,
    config: LatencyConfig,
    task: Task | None = None,
    energy_seconds: float = ENERGY_SECONDS,
) -> tuple[Measurement, dict[str, Measured]]:
    """Time all models that can be built on `device`, interleaved; by name.

    A model that fails, at one batch size or at all, is in the result with its cause.
    """
    candidates = [
        Candidate(item.name, item.detector(), item.profile.image_size)
        for item in contenders
        if item.profile is not None
    ]
    report = measure_latency(candidates, config, device=device)
    roof = _roof(device, task)
    bench = _Bench(device, config, roof, find_meter(device), energy_seconds)
    latencies = {
        item.name: [_latency(report, item.name, batch) for batch in config.batches]
        for item in candidates
    }
    batch = _common_batch(list(latencies.values()))
    measured = {item.name: bench.details(item, latencies[item.name], batch) for item in candidates}
    sources = [one.energy["source"] for one in measured.values() if one.energy is not None]
    return (
        Measurement(
            device=device_name(device),
            threads=report.threads,
            batches=list(config.batches),
            settings=report.to_dict()["settings"],
            roof=None if roof is None else roof.to_dict(),
            energy_source=sources[0] if sources else None,
        ),
        measured,
    )


def _works(latency: list[LatencyAt]) -> set[int]:
    return {entry["batch"] for entry in latency if entry["cause"] is None}


def _common_batch(latencies: Sequence[list[LatencyAt]]) -> int | None:
    """The largest batch size that all models run at, but for those that run at none."""
    working = [found for found in map(_works, latencies) if found]
    common = set.intersection(*working) if working else set()
    return max(common, default=None)


def _roof(device: torch.device, task: Task | None) -> Roof | None:
    try:
        return measure_roof(device, task=task)
    except FAULTS as error:
        sys.stderr.write(f"the roof of {device} is not measured: {cause_of(error)}\n")
        return None


def with_measured(row: Row, contender: Contender, measured: Measured | None) -> Row:
    """A row with what was measured of its model; the cost on paper gets the times of its rows."""
    if measured is None:
        return row
    model = row["model"]
    if measured.cause is not None:
        model = {**model, "notes": [*model["notes"], f"not measured: {measured.cause}"]}
    return {
        **row,
        "model": model,
        "cost": paper_cost(contender, measured.roofline),
        "latency": list(measured.latency),
        "blocks": block_times(measured.roofline),
        "energy": measured.energy,
    }


def with_speedup(table: Sequence[Row], baseline: str) -> list[Row]:
    """The rows with what their FLOPs promise and their latency keeps, against the baseline's."""
    base = next((row for row in table if row["name"] == baseline), None)
    return [
        row if base is None or row is base else {**row, "speedup": _speedup(row, base)}
        for row in table
    ]


def _speedup(row: Row, base: Row) -> SpeedUp | None:
    ours, theirs = row["cost"], base["cost"]
    if ours is None or theirs is None:
        return None
    times = {at["batch"]: at["p50_ms"] for at in base["latency"]}
    return SpeedUp(
        flops=_factor(theirs["flops"], ours["flops"]),
        latency=[
            SpeedUpAt(batch=at["batch"], factor=_factor(times.get(at["batch"]), at["p50_ms"]))
            for at in row["latency"]
        ],
    )


def _factor(base: float | None, own: float | None) -> float | None:
    return base / own if base and own else None


def _latency(report: LatencyReport, name: str, batch: int) -> LatencyAt:
    found = report.of(name, batch)
    keys = (
        "p50_ms", "p90_ms", "least_ms", "images_per_second", "gflops_per_second",
        "memory_bytes", "memory_source",
    )  # fmt: skip
    if found is None:
        failures = (f.cause for f in report.failed if (f.model, f.batch) == (name, batch))
        values = dict.fromkeys(keys)
        return LatencyAt(batch=batch, cause=next(failures, "not measured"), **values)  # type: ignore[typeddict-item]
    plain = found.to_dict()
    return LatencyAt(batch=batch, cause=None, **{key: plain[key] for key in keys})  # type: ignore[typeddict-item]


def block_times(timed: Roofline | None) -> list[BlockTime] | None:
    """The rows of each kind of block together, the longest measured first."""
    if timed is None:
        return None
    names = BlockTime.__annotations__
    return [
        BlockTime(**{key: value for key, value in block.to_dict().items() if key in names})  # type: ignore[typeddict-item]
        for block in timed.by_block()
    ]
