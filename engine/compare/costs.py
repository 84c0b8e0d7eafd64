"""The costs of the models of a comparison: computed, and measured together on this device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine.compare.plan import ModelEntry
from engine.compare.schema import Cost, Layer, Measurement, Row
from engine.measure.bench import NCHW, TYPES, forward_step, prepare, sample_images
from engine.measure.energy import measure_energy
from engine.measure.exported import TORCH
from engine.measure.latency import FAULTS, Candidate, Latency, LatencyConfig, measure_latency
from engine.measure.roofline import DevicePeak, by_block, measure_peak, roofline
from models.detector import Detector
from models.profile.counting import findings, profile, sentences
from utils.errors import cause_of
from utils.terminal import warn

ENERGY_SECONDS = 5.0  # of each model


def computed_cost(entry: ModelEntry) -> Cost | None:
    """The cost of a model; None without a model."""
    unfused = entry.profile
    if entry.spec is None or unfused is None:
        return None
    model = prepare(entry.detector(), torch.device("cpu"))
    assert isinstance(model, Detector)
    fused = profile(model, unfused.image_size)
    total = fused.cost
    sections: dict[str, Any] = {
        name: {"params": part.params, "macs": part.macs, "flops": 2 * part.macs}
        for name in ("backbone", "neck", "head")
        for part in [unfused.part(name)]
    }
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
        )
        for row, moved in zip(unfused.rows, fused.rows, strict=True)
    ]
    return Cost(
        image_size=unfused.image_size,
        classes=entry.classes,
        params=unfused.params,
        macs=unfused.macs,
        flops=unfused.flops,
        access_bytes=total.access_bytes,
        bytes=total.bytes,
        activation_bytes=total.peak_bytes,
        intensity=total.intensity,
        guidelines=list(sentences(fused)),
        layers=layers,
        **sections,
        **vars(findings(total)),  # G1 to G4
    )


def measure(
    rows: Sequence[Row],
    entries: Sequence[ModelEntry],
    *,
    device: torch.device,
    config: LatencyConfig,
    exports: Path = Path(),
) -> tuple[Measurement, list[Row]]:
    """Time all models that can be built on `device`, interleaved: the conditions, and the rows.

    rows: one for each of the entries.  A model that fails, at one batch size or at all, has its
    cause in the row.  `exports` is the folder of exported networks.
    """
    candidates = {
        item.name: Candidate(item.name, item.detector(), item.profile.image_size, item.model_id)
        for item in entries
        if item.profile is not None
    }
    latencies, settings = measure_latency(
        list(candidates.values()), config, device=device, exports=exports
    )
    try:
        peak = measure_peak(device, TYPES[config.dtype])
    except FAULTS as error:
        warn(f"the peak of {device} is not measured: {cause_of(error)}")
        peak = None
    measured = [
        replace(
            row,
            latency=[latencies[row.name, n, x] for x in config.runtimes for n in config.batches],
        )
        if row.name in candidates
        else row
        for row in rows
    ]
    batch = common_batch([row.latency for row in measured])
    for index, row in enumerate(measured):
        if _layouts(row.latency):
            item = candidates[row.name]
            measured[index] = _with_details(row, item, peak, device, batch=batch, config=config)
    sources = [row.energy.source for row in measured if row.energy is not None]
    measurement = Measurement(
        device=settings["device"],
        threads=settings["threads"],
        batches=list(config.batches),
        runtimes=list(config.runtimes),
        settings=settings,
        device_peak=None if peak is None else peak.to_dict(),
        energy_source=sources[0] if sources else None,
    )
    return measurement, measured


def common_batch(latencies: Sequence[Sequence[Latency]]) -> int | None:
    """The largest batch size that all models run at, except those that run at none."""
    working = [set(_layouts(latency)) for latency in latencies]
    able = [batches for batches in working if batches]
    return max(set.intersection(*able), default=None) if able else None


def _layouts(latency: Sequence[Latency]) -> dict[int, str]:
    """By batch size the faster layout in PyTorch; where that was not timed, NCHW."""
    timed = [at for at in latency if at.runtime == TORCH] or latency
    return {at.batch: at.layout or NCHW for at in timed if at.cause is None}


def _with_details(
    row: Row,
    item: Candidate,
    peak: DevicePeak | None,
    device: torch.device,
    *,
    batch: int | None,
    config: LatencyConfig,
) -> Row:
    """A row with the times of its layers and blocks, eager, and the energy at a batch size.

    In PyTorch, in the layout that was faster at the smallest batch, and at that batch size.
    """
    assert row.cost is not None
    layouts = _layouts(row.latency)
    dtype = TYPES[config.dtype]
    try:
        if peak is not None:
            layout = layouts[min(layouts)]
            model = prepare(item.model, device, dtype=dtype, layout=layout)
            assert isinstance(model, Detector)
            images = sample_images(1, item.image_size, device, like=model, layout=layout)
            timed = roofline(model, images, peak)
            blocks = [
                {**vars(one), "rows": list(one.rows), "bound": one.bound} for one in by_block(timed)
            ]
            layers = [
                replace(layer, predicted=time.predicted, measured=time.measured, bound=time.bound)
                for layer, time in zip(row.cost.layers, timed, strict=True)
            ]
            row = replace(row, cost=replace(row.cost, layers=layers), blocks=blocks)
        if batch is not None:
            layout = layouts[batch]
            ready = prepare(item.model, device, dtype=dtype, layout=layout)
            images = sample_images(batch, item.image_size, device, like=ready, layout=layout)
            with torch.inference_mode():
                step = forward_step(ready, images, graph=config.graph)
                energy = measure_energy(step, images=batch, device=device, seconds=ENERGY_SECONDS)
            row = replace(row, energy=energy)
    except FAULTS as error:
        notes = [*row.model.notes, f"not measured: {cause_of(error)}"]
        return replace(row, model=replace(row.model, notes=notes))
    return row


def with_speedup(table: Sequence[Row], baseline: str) -> list[Row]:
    """The rows with their speed-up against the baseline: by FLOPs, and by measured latency."""
    base = next((row for row in table if row.name == baseline), None)
    if base is None or base.cost is None:
        return list(table)
    times = {(at.batch, at.runtime): at.p50_ms for at in base.latency}

    def factor(slow: float | None, own: float | None) -> float | None:
        return slow / own if slow and own else None

    result = []
    for row in table:
        speedup = None
        if row is not base and row.cost is not None:
            latency = [
                {
                    "batch": at.batch,
                    "runtime": at.runtime,
                    "factor": factor(times.get((at.batch, at.runtime)), at.p50_ms),
                }
                for at in row.latency
            ]
            speedup = {"flops": factor(base.cost.flops, row.cost.flops), "latency": latency}
        result.append(replace(row, speedup=speedup))
    return result
