"""Why fewer FLOPs are not faster: the limits of the device, and the time of each row.

The roofline model: a kernel takes at least flops / peak and bytes / bandwidth, whichever is longer;
kernels run one after another, so a row takes at least the sum over its own.  Where a row takes far
longer than that, its kernels are too small: see `launch`, the time to start them at all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.measure.bench import Clock, mark, seconds_between, synchronize
from engine.measure.peak import COMPUTE, MEMORY, DevicePeak
from models.graph import RowGraph
from models.profile.counting import profile


@torch.inference_mode()
def time_rows(
    model: RowGraph,
    images: Tensor,
    *,
    rounds: int = 10,
    warm_up: int = 2,
    clock: Clock = time.perf_counter,
) -> tuple[float, ...]:
    """Median seconds of each row over several forward passes of a prepared model on its device.

    CUDA: events in the stream, so a row's time includes the wait for kernels to be launched.
    """
    device = images.device
    durations: list[list[tuple[Any, Any]]] = [[] for _ in model.layers]
    opened: list[Any] = []

    def enter(*_: Any) -> None:
        opened.append(mark(device, clock))

    def leave(index: int) -> Callable[..., None]:
        return lambda *_: durations[index].append((opened.pop(), mark(device, clock)))

    for _ in range(warm_up):
        model(images)
    handles = [
        handle
        for index, layer in enumerate(model.layers)
        for handle in (
            layer.register_forward_pre_hook(enter),
            layer.register_forward_hook(leave(index)),
        )
    ]
    try:
        for _ in range(rounds):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    synchronize(device)
    return tuple(statistics.median(seconds_between(*pair) for pair in row) for row in durations)


@dataclass(frozen=True)
class Times:
    """Seconds of a row or of all rows of a block: predicted, measured, and to launch kernels."""

    block: str
    rows: tuple[int, ...]
    flops: int
    bytes: int
    kernels: int
    predicted: float
    compute_bound: float  # the part of `predicted` in compute-bound kernels
    launch: float
    measured: float

    @property
    def bound(self) -> str:
        """COMPUTE where most of the predicted time is, else MEMORY."""
        return COMPUTE if 2 * self.compute_bound > self.predicted else MEMORY


def by_block(rows: Sequence[Times]) -> tuple[Times, ...]:
    """The rows of each block together, the longest measured first."""
    kinds: dict[str, list[Times]] = {}
    for row in rows:
        kinds.setdefault(row.block, []).append(row)
    names = ("flops", "bytes", "kernels", "predicted", "compute_bound", "launch", "measured")
    sums = [
        Times(
            block,
            tuple(index for row in some for index in row.rows),
            **{name: sum(getattr(row, name) for row in some) for name in names},
        )
        for block, some in kinds.items()
    ]
    return tuple(sorted(sums, key=lambda item: item.measured, reverse=True))


def roofline(
    model: RowGraph,
    images: Tensor,
    peak: DevicePeak,
    *,
    rounds: int = 10,
) -> tuple[Times, ...]:
    """Predict and time each row of a prepared model (`bench.prepare`) on square images."""
    measured = time_rows(model, images, rounds=rounds)
    found = []
    for row, seconds in zip(
        profile(model, images.shape[2], batch=len(images)).rows, measured, strict=True
    ):
        kernels = row.cost.kernels
        compute = [kernel for kernel in kernels if peak.bound(kernel) == COMPUTE]
        times = Times(
            block=row.spec.block,
            rows=(row.index,),
            flops=row.cost.flops,
            bytes=row.cost.bytes,
            kernels=len(kernels),
            predicted=sum(map(peak.seconds, kernels)),
            compute_bound=sum(map(peak.seconds, compute)),
            launch=len(kernels) * peak.launch_seconds,
            measured=seconds,
        )
        found.append(times)
    return tuple(found)
