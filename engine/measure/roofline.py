"""Why fewer FLOPs are not faster: the measured peaks of the device, and the time of each row.

The roofline model: a kernel takes at least flops / peak and bytes / bandwidth, whichever is longer;
kernels run one after another, so a row takes at least the sum over its own.  Where a row takes far
longer than that, its kernels are too small: see `launch`, the time to start them at all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.measure.bench import mark, seconds_between, synchronize
from models.detector import RowGraph
from models.profile.counting import profile
from models.profile.kernels import Kernel

COMPUTE, MEMORY = "compute", "memory"
LAUNCHES = 200  # tiny kernels per reading of the launch time


class PeakSizes(NamedTuple):
    """Sizes of what measures the peaks: a matmul, a 3x3 convolution of 256 channels, a copy."""

    side: int
    pixels: int
    copy_bytes: int
    repeats: int = 50


# large enough to fill a device and its caches; each repeat is short
PEAK_SIZES = {"cpu": PeakSizes(512, 32, 64 << 20), "cuda": PeakSizes(4096, 256, 256 << 20)}


@dataclass(frozen=True)
class DevicePeak:
    """Measured limits of a device for one number type."""

    flops_per_second: float
    bytes_per_second: float
    launch_seconds: float  # of one kernel that does nothing worth mentioning

    @property
    def ridge(self) -> float:
        """FLOP per byte from which a kernel can be compute bound."""
        return self.flops_per_second / self.bytes_per_second

    def seconds(self, kernel: Kernel) -> float:
        """The minimum time of a kernel: max(flops / peak, bytes / bandwidth)."""
        return max(kernel.flops / self.flops_per_second, kernel.bytes / self.bytes_per_second)

    def bound(self, kernel: Kernel) -> str:
        """COMPUTE or MEMORY, by which of the two is longer."""
        at_ridge = kernel.flops * self.bytes_per_second >= kernel.bytes * self.flops_per_second
        return COMPUTE if kernel.flops and at_ridge else MEMORY

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return {**vars(self), "ridge": self.ridge}


@torch.inference_mode()
def measure_peak(device: torch.device, dtype: torch.dtype = torch.float32) -> DevicePeak:
    """The best of several repeats in this type, with torch's present settings (threads, TF32).

    Peak FLOP/s is the better of the matmul and the convolution, bandwidth counts a copy's reads
    and writes.
    """
    side, pixels, copy_bytes, repeats = PEAK_SIZES[device.type]

    def best(step: Callable[[], Any]) -> float:
        step()
        durations = []
        for _ in range(repeats):
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            durations.append(time.perf_counter() - start)
        return min(durations)

    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    matmul = 2 * side**3 / best(lambda: a @ b)
    image = torch.randn(1, 256, pixels, pixels, device=device, dtype=dtype)
    layer = nn.Conv2d(256, 256, 3, padding=1, bias=False).to(device, dtype)
    convolution = 2 * 9 * 256 * image.numel() / best(lambda: layer(image))
    source = torch.ones(copy_bytes // 4, device=device)
    target = torch.zeros_like(source)
    bandwidth = 2 * copy_bytes / best(lambda: target.copy_(source))
    one = torch.zeros(1, device=device)

    def launch() -> None:
        for _ in range(LAUNCHES):
            one.add_(1)

    return DevicePeak(max(matmul, convolution), bandwidth, best(launch) / LAUNCHES)


@torch.inference_mode()
def time_rows(
    model: RowGraph, images: Tensor, *, rounds: int = 10, warm_up: int = 2
) -> tuple[float, ...]:
    """Median seconds of each row over several forward passes of a prepared model on its device.

    CUDA: events in the stream, so a row's time includes the wait for kernels to be launched.
    """
    device = images.device
    for _ in range(warm_up):
        model(images)
    marks: list[list[Any]] = [[] for _ in model.layers]  # start, end, start, ...
    handles = []
    for layer, taken in zip(model.layers, marks, strict=True):

        def note(*_: Any, taken: list[Any] = taken) -> None:
            taken.append(mark(device))

        handles += [layer.register_forward_pre_hook(note), layer.register_forward_hook(note)]
    try:
        for _ in range(rounds):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    synchronize(device)
    return tuple(
        statistics.median(map(seconds_between, taken[::2], taken[1::2])) for taken in marks
    )


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
    sums = []
    for block, some in kinds.items():
        _, indices, *columns = zip(*(vars(row).values() for row in some), strict=True)
        sums.append(Times(block, sum(indices, ()), *map(sum, columns)))
    return tuple(sorted(sums, key=lambda item: item.measured, reverse=True))


def roofline(
    model: RowGraph, images: Tensor, peak: DevicePeak, *, rounds: int = 10
) -> tuple[Times, ...]:
    """Predict and time each row of a prepared model (`bench.prepare`) on square images."""
    rows = profile(model, images.shape[2], batch=len(images)).rows
    found = []
    for row, seconds in zip(rows, time_rows(model, images, rounds=rounds), strict=True):
        kernels = row.cost.kernels
        compute = [kernel for kernel in kernels if peak.bound(kernel) == COMPUTE]
        found.append(
            Times(
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
        )
    return tuple(found)
