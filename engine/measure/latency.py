"""Latency of several models on one device, measured in turn.

Each round goes through all models, beginning with the next one, so that a falling clock, a warming
cache or the load of other processes affects all alike.  The network alone is timed, from images on
the device to raw maps: decoding and suppression are the same for all.  Every model takes part in
both memory layouts, and the faster one counts at each batch size.  Other runtimes than PyTorch take
part in the same rounds, with the exported network, which decodes its outputs.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from engine.measure.bench import (
    LAYOUTS,
    NCHW,
    TYPES,
    forward_step,
    prepare,
    sample_images,
    synchronize,
)
from engine.measure.exported import TORCH, exported_step, versions
from models.profile.cost import count
from utils.environment import device_name
from utils.errors import cause_of
from utils.terminal import progress

MIN_ROUNDS = 5
FAULTS = (RuntimeError, MemoryError)  # torch's own, out of memory among them: of one model
MEASURED = "torch.cuda.max_memory_allocated"
MODELLED = "modelled: weights and live activations"
T = TypeVar("T")


@dataclass(frozen=True)
class Candidate:
    """A model to time, any module that takes (B, 3, S, S) images, with its own image size S.

    In other runtimes than PyTorch a Detector; `key` is its file name there, without a folder.
    """

    name: str
    model: nn.Module
    image_size: int
    key: str = ""


@dataclass(frozen=True)
class LatencyConfig:
    """How to time.

    At most `rounds` for each batch size, fewer (at least 5) when they take more than `seconds`.
    """

    batches: tuple[int, ...] = (1, 32)
    warm_up: int = 3  # forward passes of each model before the rounds
    rounds: int = 50
    seconds: float = 60.0
    dtype: str = "fp32"  # of weights and images, a key of TYPES
    graph: bool = False  # replay a CUDA graph: the time of the device without Python's
    runtimes: tuple[str, ...] = (TORCH,)


@dataclass(frozen=True)
class Latency:
    """One model at one batch size; the numbers are None where it failed."""

    batch: int
    cause: str | None = None  # of a failure
    p50_ms: float | None = None  # of one image
    p90_ms: float | None = None
    least_ms: float | None = None  # of the fastest pass, which a busy machine affects least
    images_per_second: float | None = None  # by the median
    # computation efficiency, GFLOPs times images/s (VoVNet, arXiv:1904.09730, section 4.1)
    gflops_per_second: float | None = None
    memory_bytes: int | None = None  # weights, images and peak activations
    memory_source: str | None = None  # MEASURED or MODELLED
    layout: str | None = None  # the faster one of LAYOUTS
    other_p50_ms: float | None = None  # in the slower one; None where it failed
    runtime: str = TORCH

    @staticmethod
    def of(batch: int, durations: Sequence[float], flops: int, *more: Any) -> Latency:
        """By the seconds of each forward pass of a batch, the FLOPs of one image, and the rest."""
        p50, p90, least = map(float, np.percentile(durations, (50, 90, 0)) * 1000 / batch)
        rate = 1000 / p50
        return Latency(batch, None, p50, p90, least, rate, flops * rate / 1e9, *more)


@torch.inference_mode()
def measure_latency(
    candidates: Sequence[Candidate],
    config: LatencyConfig,
    *,
    device: torch.device,
    exports: Path = Path(),
) -> tuple[dict[tuple[str, int, str], Latency], dict[str, Any]]:
    """Time all candidates on `device`, interleaved, at each batch size and in each runtime.

    Returns the latency by name, batch size and runtime, and the settings, as plain values for JSON.
    A candidate that cannot run there (out of memory, say) does not end the rest.  `exports` is the
    folder of exported networks.
    """
    results: dict[tuple[str, int, str], Latency] = {}
    pool = torch.cuda.graph_pool_handle() if config.graph else None
    runs = [
        [_Run(item, layout, config, device, pool) for layout in LAYOUTS]
        if runtime == TORCH
        else [_ExportedRun(item, runtime, config, exports)]
        for item in candidates
        for runtime in config.runtimes
    ]
    for batch in config.batches:
        for run in progress(f"preparing batch {batch}", [*chain(*runs)]):
            run.start(batch)
        able = [run for run in chain(*runs) if not run.cause]
        title = f"latency at batch {batch}"
        timed = interleave(able, config, device=device, title=title)
        for run, durations in zip(able, timed, strict=True):
            run.durations = durations
        for same in runs:  # in both layouts
            faster, *others = sorted(same, key=_Run.median)
            found = faster.result()
            for slower in others:
                if not (found.cause or slower.cause):
                    found = replace(found, other_p50_ms=1000 * slower.median() / batch)
            results[faster.candidate.name, batch, found.runtime] = found
    settings = {
        **vars(config),
        "batches": list(config.batches),
        "runtimes": list(config.runtimes),
        "versions": versions(config.runtimes),
        "fused": True,
        "layouts": list(LAYOUTS),
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }
    return results, settings


class _Run:
    """A model in one layout, with its images; calling it is one forward pass.

    `cause` is that of a failure at this batch size, after which it does nothing.
    """

    faults: tuple[type[Exception], ...] = FAULTS

    def __init__(
        self,
        candidate: Candidate,
        layout: str,
        config: LatencyConfig,
        device: torch.device,
        pool: Any,
    ) -> None:
        self.candidate = candidate
        self.cause = ""
        self.durations: Sequence[float] = ()
        self._layout, self._config, self._device, self._pool = layout, config, device, pool
        self._batch = 0
        self._model: Any = None
        self._images = torch.empty(0)
        self._step: Callable[[], Any] = tuple

    def start(self, batch: int) -> None:
        """Prepare the model, make the images and warm up: allocators and libraries settle."""
        self.cause, self.durations, self._batch = "", (), batch
        self._attempt(self._prepare)
        for _ in range(self._config.warm_up):
            self()

    def _prepare(self) -> None:
        size, device, layout = self.candidate.image_size, self._device, self._layout
        dtype, graph = TYPES[self._config.dtype], self._config.graph
        self._step = tuple  # its graph's memory serves the next one
        if self._model is None:
            self._model = prepare(self.candidate.model, device, dtype=dtype, layout=layout)
        images = sample_images(self._batch, size, device, like=self._model, layout=layout)
        self._images = images
        self._step = forward_step(self._model, images, graph=graph, pool=self._pool)

    def __call__(self) -> None:
        self._attempt(self._step)

    def median(self) -> float:
        """Seconds of a forward pass; infinite after a failure."""
        return math.inf if self.cause else statistics.median(self.durations)

    def result(self) -> Latency:
        cost = self._attempt(self._cost)
        if cost is None:
            return Latency(self._batch, self.cause)
        return Latency.of(self._batch, self.durations, *cost, self._layout)

    def _attempt(self, step: Callable[[], T]) -> T | None:
        """What `step` returns, None for a failure, which leaves its memory to the other models."""
        if self.cause:
            return None
        try:
            result = step()
            synchronize(self._device)
        except self.faults as error:
            self.cause = cause_of(error)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            return None
        return result

    def _cost(self) -> tuple[int, int, str]:
        """FLOPs of an image; bytes of weights, images and peak activations; their source.

        FLOPs are those of the published form: a merged MixConv multiplies by zeros.  All models of
        a comparison are on the device at once, so the rise over the present use counts.
        """
        model, images, device = self._model, self._images, self._device
        flops = count(self.candidate.model, (1, *images.shape[1:])).flops
        tensors = (*model.parameters(), *model.buffers())
        weights = sum(tensor.nbytes for tensor in tensors)
        if device.type != "cuda":
            return flops, weights + count(model, tuple(images.shape)).peak_bytes, MODELLED
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        model(images)
        synchronize(device)
        rise = torch.cuda.max_memory_allocated(device) - before
        return flops, weights + images.nbytes + rise, MEASURED


class _ExportedRun(_Run):
    """A model in another runtime, on the CPU."""

    faults = (Exception,)  # each runtime has its own

    def __init__(
        self, candidate: Candidate, runtime: str, config: LatencyConfig, exports: Path
    ) -> None:
        super().__init__(candidate, NCHW, config, torch.device("cpu"), None)
        self._runtime, self._exports = runtime, exports

    def _prepare(self) -> None:
        self._step = tuple
        size = self.candidate.image_size
        if self._model is None:
            self._model = prepare(self.candidate.model, self._device)
        self._images = sample_images(self._batch, size, self._device, like=self._model)
        file = self._exports / f"{self.candidate.key}-{size}-batch{self._batch}.onnx"
        self._step = exported_step(self._model, self._images, self._runtime, file)

    def result(self) -> Latency:
        shape = (1, *self._images.shape[1:])
        flops = self._attempt(lambda: count(self.candidate.model, shape).flops)
        if flops is None:
            return Latency(self._batch, self.cause, runtime=self._runtime)
        return replace(Latency.of(self._batch, self.durations, flops), runtime=self._runtime)


def interleave(
    steps: Sequence[Callable[[], Any]],
    config: LatencyConfig,
    *,
    device: torch.device,
    title: str = "",
) -> list[list[float]]:
    """Seconds of each step, one list per step, equally long: round r begins with step r mod n.

    The garbage collector stays out of the timed part, as in timeit.  With a title, a terminal shows
    a progress bar.
    """
    durations: list[list[float]] = [[] for _ in steps]
    begun = time.perf_counter()
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    bar = progress(title, total=config.rounds, hide=not title)
    try:
        for turn in range(config.rounds if steps else 0):
            if turn >= MIN_ROUNDS and time.perf_counter() - begun > config.seconds:
                break
            for offset in range(len(steps)):
                index = (turn + offset) % len(steps)
                synchronize(device)
                start = time.perf_counter()
                steps[index]()
                synchronize(device)
                durations[index].append(time.perf_counter() - start)
            share = (time.perf_counter() - begun) / config.seconds  # whichever ends first
            bar.update(min(config.rounds, max(turn + 1, int(share * config.rounds))) - bar.n)
    finally:
        bar.close()
        if collects:
            gc.enable()
    return durations
