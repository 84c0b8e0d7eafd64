"""Latency of several models on one device, measured side by side.

The rounds go through all models in turn, each time beginning with another one, so that a clock that
falls, a cache that warms or a neighbour's load hits all alike.  Timed is the network alone, from
images on the device to raw maps: decoding and suppression are the same for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.measure.bench import Clock, no_collection, prepare, sample_images, synchronize
from models.profile.cost import count
from utils.environment import device_name
from utils.errors import cause_of

LEAST_ROUNDS = 5
FAULTS = (RuntimeError, MemoryError)  # torch's own, out of memory among them: of one model
MEASURED = "torch.cuda.max_memory_allocated"
MODELLED = "modelled: weights and live activations"


@dataclass(frozen=True)
class Candidate:
    """A model to time, any module that takes (B, 3, S, S) images, with its own image size S."""

    name: str
    model: nn.Module
    image_size: int


@dataclass(frozen=True)
class LatencyConfig:
    """How to time.

    At most `rounds` for each batch size, fewer (at least 5) when they take more than `seconds`.
    """

    batches: tuple[int, ...] = (1, 32)
    warm_up: int = 3  # forwards of each model before the rounds
    rounds: int = 50
    seconds: float = 60.0
    fused: bool = True  # BN folded into the convolutions, as for inference
    channels_last: bool = False

    def __post_init__(self) -> None:
        least = {"warm_up": 1, "rounds": LEAST_ROUNDS}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(self, name)}")
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batches must be positive numbers, got {self.batches}")
        if not self.seconds > 0:
            raise ValueError(f"seconds must be over 0, got {self.seconds}")


@dataclass(frozen=True)
class Latency:
    """One model at one batch size; `laps` are the seconds of each forward of a batch."""

    model: str
    image_size: int
    batch: int
    laps: tuple[float, ...]
    flops: int  # of one image, 2 * MACs
    memory_bytes: int  # weights, images and the most that lived beside them
    memory_source: str  # MEASURED or MODELLED

    def milliseconds(self, percentile: float) -> float:
        """Of one image."""
        return float(np.percentile(self.laps, percentile)) * 1000 / self.batch

    @property
    def p50(self) -> float:
        """Median milliseconds of one image."""
        return self.milliseconds(50)

    @property
    def p90(self) -> float:
        """Milliseconds of one image that nine of ten forwards stay under."""
        return self.milliseconds(90)

    @property
    def least(self) -> float:
        """Milliseconds of one image in the fastest forward: what a busy machine spoils least."""
        return self.milliseconds(0)

    @property
    def images_per_second(self) -> float:
        """By the median."""
        return 1000 / self.p50

    @property
    def gflops_per_second(self) -> float:
        """Computation efficiency, GFLOPs times images/s (VoVNet, arXiv:1904.09730, section 4.1)."""
        return self.flops * self.images_per_second / 1e9

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "model": self.model,
            "image_size": self.image_size,
            "batch": self.batch,
            "rounds": len(self.laps),
            "p50_ms": self.p50,
            "p90_ms": self.p90,
            "least_ms": self.least,
            "images_per_second": self.images_per_second,
            "gflops_per_second": self.gflops_per_second,
            "memory_bytes": self.memory_bytes,
            "memory_source": self.memory_source,
        }


@dataclass(frozen=True)
class Failure:
    """A model that could not run at a batch size (out of memory, say), and why."""

    model: str
    batch: int
    cause: str


@dataclass(frozen=True)
class LatencyReport:
    """All figures of one measurement, by batch and then in the order given."""

    measured: tuple[Latency, ...]
    failed: tuple[Failure, ...]
    config: LatencyConfig
    device: str
    threads: int | None  # of torch on a CPU

    def of(self, model: str, batch: int) -> Latency | None:
        """One figure, None where it failed."""
        found = (item for item in self.measured if (item.model, item.batch) == (model, batch))
        return next(found, None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        settings = {**vars(self.config), "batches": list(self.config.batches)}
        return {
            "settings": {**settings, "device": self.device, "threads": self.threads},
            "measured": [item.to_dict() for item in self.measured],
            "failed": [vars(item) for item in self.failed],
        }


@torch.inference_mode()
def measure_latency(
    candidates: Sequence[Candidate],
    config: LatencyConfig,
    *,
    device: torch.device,
    clock: Clock = time.perf_counter,
) -> LatencyReport:
    """Time all candidates on `device`, interleaved, at each batch size.

    A candidate that cannot run at a batch size is reported as failed there and the rest goes on.
    ValueError when two have the same name.
    """
    if len({candidate.name for candidate in candidates}) < len(candidates):
        raise ValueError(f"names must differ, got {[item.name for item in candidates]}")
    layout = {"fused": config.fused, "channels_last": config.channels_last}
    measured: list[Latency] = []
    failed: list[Failure] = []
    models: list[tuple[Candidate, nn.Module]] = []
    for item in candidates:
        try:
            models.append((item, prepare(item.model, device, **layout)))
        except FAULTS as error:
            failed += [Failure(item.name, batch, cause_of(error)) for batch in config.batches]
            _let_go(device)
    for batch in config.batches:
        begun = [_start(item, model, batch, config, device) for item, model in models]
        runs = [run for run in begun if isinstance(run, _Run)]
        laps = interleave(runs, config, device=device, clock=clock)
        found = [_figures(run, seconds, device) for run, seconds in zip(runs, laps, strict=True)]
        for one in (*begun, *found):
            if isinstance(one, Failure):
                failed.append(one)
            elif isinstance(one, Latency):
                measured.append(one)
    threads = torch.get_num_threads() if device.type == "cpu" else None
    return LatencyReport(tuple(measured), tuple(failed), config, device_name(device), threads)


@dataclass
class _Run:
    candidate: Candidate
    model: nn.Module  # prepared
    images: Tensor
    device: torch.device
    cause: str | None = None  # of a failure in the rounds, after which it does nothing

    def __call__(self) -> None:
        if self.cause is not None:
            return
        try:
            self.model(self.images)
            synchronize(self.device)
        except FAULTS as error:
            self.cause = cause_of(error)
            _let_go(self.device)


def _let_go(device: torch.device) -> None:
    """After a model that did not fit: leave the memory to the others."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def interleave(
    steps: Sequence[Callable[[], Any]],
    config: LatencyConfig,
    *,
    device: torch.device,
    clock: Clock = time.perf_counter,
) -> list[list[float]]:
    """Seconds of each step, one list per step, equally long: round r begins with step r mod n."""
    laps: list[list[float]] = [[] for _ in steps]
    begun = clock()
    with no_collection():
        for turn in range(config.rounds if steps else 0):
            if turn >= LEAST_ROUNDS and clock() - begun > config.seconds:
                break
            for place in range(len(steps)):
                index = (turn + place) % len(steps)
                synchronize(device)
                start = clock()
                steps[index]()
                synchronize(device)
                laps[index].append(clock() - start)
    return laps


def _start(
    candidate: Candidate,
    model: nn.Module,
    batch: int,
    config: LatencyConfig,
    device: torch.device,
) -> _Run | Failure:
    """Make the images and warm up: allocators and libraries settle."""
    try:
        images = sample_images(
            batch,
            candidate.image_size,
            device,
            like=model,
            channels_last=config.channels_last,
        )
    except FAULTS as error:
        _let_go(device)
        return Failure(candidate.name, batch, cause_of(error))
    run = _Run(candidate, model, images, device)
    for _ in range(config.warm_up):
        run()
    return run if run.cause is None else Failure(candidate.name, batch, run.cause)


def _figures(run: _Run, laps: Sequence[float], device: torch.device) -> Latency | Failure:
    one = (1, *run.images.shape[1:])
    name, batch = run.candidate.name, len(run.images)
    if run.cause is not None:
        return Failure(name, batch, run.cause)
    try:
        memory, source = _memory(run, device)
        flops = count(run.model, one).flops
    except FAULTS as error:
        return Failure(name, batch, cause_of(error))
    if run.cause is not None:  # it ran once more for its memory
        return Failure(name, batch, run.cause)
    return Latency(
        model=name,
        image_size=run.candidate.image_size,
        batch=batch,
        laps=tuple(laps),
        flops=flops,
        memory_bytes=memory,
        memory_source=source,
    )


def _memory(run: _Run, device: torch.device) -> tuple[int, str]:
    """Weights, images and the most beside them, and how that is known.

    All models of a comparison lie on the device at once, so the rise over what lies there counts.
    """
    tensors = (*run.model.parameters(), *run.model.buffers())
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if device.type != "cuda":
        return weights + count(run.model, run.images.shape).peak_bytes, MODELLED
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    synchronize(device)
    rise = torch.cuda.max_memory_allocated(device) - before
    images = run.images.numel() * run.images.element_size()
    return weights + images + rise, MEASURED
