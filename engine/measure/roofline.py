"""Why fewer FLOPs are not faster: what the device could do at best, and what each row took.

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

from engine.measure.bench import Clock, synchronize
from engine.measure.peak import COMPUTE, MEMORY, Roof
from models.graph import RowGraph
from models.profile.counting import RowProfile, profile

GIGA, MILLI = 1e9, 1e-3


class _Marks:
    """Instants in the order of the device's work, without making CUDA wait in between."""

    def __init__(self, device: torch.device, clock: Clock) -> None:
        self._device = device
        self._clock = clock

    def mark(self) -> Any:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            return event
        synchronize(self._device)
        return self._clock()

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks, after the device is done."""
        if self._device.type == "cuda":
            return float(start.elapsed_time(end)) * MILLI
        return float(end - start)


@torch.inference_mode()
def time_rows(
    model: RowGraph,
    images: Tensor,
    *,
    rounds: int = 10,
    warm_up: int = 2,
    clock: Clock = time.perf_counter,
) -> tuple[float, ...]:
    """Median seconds of each row over several forwards of a prepared model on its device.

    CUDA: events in the stream, so a row's time includes the wait for kernels to be launched.
    """
    marks = _Marks(images.device, clock)
    laps: list[list[tuple[Any, Any]]] = [[] for _ in model.layers]
    opened: list[Any] = []

    def enter(*_: Any) -> None:
        opened.append(marks.mark())

    def leave(index: int) -> Callable[..., None]:
        return lambda *_: laps[index].append((opened.pop(), marks.mark()))

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
    synchronize(images.device)
    return tuple(statistics.median(marks.seconds(*lap) for lap in row) for row in laps)


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

    @property
    def slower(self) -> float:
        """Measured over predicted."""
        return self.measured / self.predicted if self.predicted else float("inf")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "rows": list(self.rows), "bound": self.bound}


@dataclass(frozen=True)
class Roofline:
    """Rows of a model under the roof of the device they ran on."""

    image_size: int
    batch: int
    roof: Roof
    rows: tuple[Times, ...]

    def by_block(self) -> tuple[Times, ...]:
        """The rows of each block together, the longest measured first."""
        kinds: dict[str, list[Times]] = {}
        for row in self.rows:
            kinds.setdefault(row.block, []).append(row)
        sums = [_sum(block, rows) for block, rows in kinds.items()]
        return tuple(sorted(sums, key=lambda item: item.measured, reverse=True))

    def total(self) -> Times:
        """All rows."""
        return _sum("all", self.rows)

    def table(self) -> str:
        """The blocks as text, one line each, with a heading; milliseconds of a batch."""
        lines = [HEADING, *(_cells(item) for item in (*self.by_block(), self.total()))]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in lines
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "image_size": self.image_size,
            "batch": self.batch,
            "roof": self.roof.to_dict(),
            "rows": [row.to_dict() for row in self.rows],
            "blocks": [block.to_dict() for block in self.by_block()],
            "total": self.total().to_dict(),
        }


HEADING = (
    "block", "rows", "GFLOPs", "MB", "FLOP/B", "bound", "kernels",
    "launch ms", "predicted ms", "measured ms", "measured/predicted",
)  # fmt: skip


def _cells(item: Times) -> tuple[str, ...]:
    return (
        item.block, str(len(item.rows)), f"{item.flops / GIGA:.3f}", f"{item.bytes / 1e6:.1f}",
        f"{item.flops / item.bytes if item.bytes else 0:.1f}", item.bound, str(item.kernels),
        *(f"{seconds / MILLI:.3f}" for seconds in (item.launch, item.predicted, item.measured)),
        f"{item.slower:.1f}",
    )  # fmt: skip


def _sum(block: str, rows: Sequence[Times]) -> Times:
    return Times(
        block=block,
        rows=tuple(index for row in rows for index in row.rows),
        flops=sum(row.flops for row in rows),
        bytes=sum(row.bytes for row in rows),
        kernels=sum(row.kernels for row in rows),
        predicted=sum(row.predicted for row in rows),
        compute_bound=sum(row.compute_bound for row in rows),
        launch=sum(row.launch for row in rows),
        measured=sum(row.measured for row in rows),
    )


def predict(row: RowProfile, roof: Roof, measured: float) -> Times:
    """A row's times under a roof, beside what it took (seconds)."""
    kernels = row.cost.kernels
    compute = [kernel for kernel in kernels if roof.bound(kernel) == COMPUTE]
    return Times(
        block=row.spec.block,
        rows=(row.index,),
        flops=row.cost.flops,
        bytes=row.cost.bytes,
        kernels=len(kernels),
        predicted=sum(map(roof.seconds, kernels)),
        compute_bound=sum(map(roof.seconds, compute)),
        launch=len(kernels) * roof.launch_seconds,
        measured=measured,
    )


def roofline(
    model: RowGraph,
    images: Tensor,
    roof: Roof,
    *,
    rounds: int = 10,
    clock: Clock = time.perf_counter,
) -> Roofline:
    """Predict and time each row of a prepared model (`latency.prepare`) on square images."""
    batch, _, height, width = images.shape
    if height != width:
        raise ValueError(f"images must be square, got {height}x{width}")
    measured = time_rows(model, images, rounds=rounds, clock=clock)
    profiled = profile(model, height, batch=batch)
    rows = tuple(
        predict(row, roof, seconds) for row, seconds in zip(profiled.rows, measured, strict=True)
    )
    return Roofline(height, batch, roof, rows)
