"""The peaks of a device: FLOP/s, bytes/s and kernels/s, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine.measure.bench import Clock, synchronize
from models.profile.kernels import Kernel

COMPUTE, MEMORY = "compute", "memory"
MIB = 2**20
LAUNCHES = 200  # tiny kernels per reading of the launch time


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


@dataclass(frozen=True)
class PeakSizes:
    """Sizes of what measures the peaks: a matmul, a 3x3 convolution of 256 channels, a copy."""

    side: int
    pixels: int
    copy_bytes: int
    repeats: int = 50

    @classmethod
    def for_device(cls, device: torch.device) -> PeakSizes:
        """Large enough to fill it and its caches; each repeat is short."""
        if device.type == "cpu":
            return cls(side=512, pixels=32, copy_bytes=64 * MIB)
        return cls(side=4096, pixels=256, copy_bytes=256 * MIB)


@torch.inference_mode()
def measure_peak(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    sizes: PeakSizes | None = None,
    clock: Clock = time.perf_counter,
) -> DevicePeak:
    """The best of several repeats on `device`, with torch's present settings (threads, TF32).

    Peak FLOP/s is the better of the matmul and the convolution, bandwidth counts a copy's reads
    and writes.
    """
    sizes = sizes or PeakSizes.for_device(device)

    def best(step: Callable[[], Any]) -> float:
        step()
        durations = []
        for _ in range(sizes.repeats):
            synchronize(device)
            start = clock()
            step()
            synchronize(device)
            durations.append(clock() - start)
        return min(durations)

    a, b = (torch.randn(sizes.side, sizes.side, device=device, dtype=dtype) for _ in range(2))
    matmul = 2 * sizes.side**3 / best(lambda: a @ b)
    image = torch.randn(1, 256, sizes.pixels, sizes.pixels, device=device, dtype=dtype)
    layer = nn.Conv2d(256, 256, 3, padding=1, bias=False).to(device, dtype)
    convolution = 2 * 9 * 256 * image.numel() / best(lambda: layer(image))
    source = torch.ones(sizes.copy_bytes // 4, device=device)
    target = torch.zeros_like(source)
    bandwidth = 2 * source.numel() * 4 / best(lambda: target.copy_(source))
    one = torch.zeros(1, device=device)

    def launch() -> None:
        for _ in range(LAUNCHES):
            one.add_(1)

    return DevicePeak(max(matmul, convolution), bandwidth, best(launch) / LAUNCHES)
