"""Joules per image, from the device's own counters or not at all.

NVIDIA: the board's total since the driver was loaded (NVML).  CPU: RAPL's packages and their DRAM
where the system lets them be read.  Both count the whole device, idle power and other
processes included, so compare runs of the same quiet machine.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.measure.bench import Clock, synchronize

POWERCAP = Path("/sys/class/powercap")
NOT_MEASURED = "not measured"
MAX_UNREAD = 60.0  # seconds; no counter wraps around twice in that time
MICRO, MILLI = 1e-6, 1e-3


@dataclass(frozen=True)
class Energy:
    """The energy and time of running `images`."""

    joules: float
    seconds: float
    images: int
    source: str

    @property
    def joules_per_image(self) -> float:
        """The value that models are compared by."""
        return self.joules / self.images

    @property
    def watts(self) -> float:
        """Mean power."""
        return self.joules / self.seconds


class Meter:
    """The sum of counters, each a function that reads it and the value at which it restarts at 0.

    `joules` must be called at least once while a counter goes round (minutes).
    """

    def __init__(
        self, source: str, counters: Sequence[tuple[Callable[[], int], int]], unit: float
    ) -> None:
        self.source = source  # e.g. 'RAPL package-0, dram'
        self._counters = tuple(counters)
        self._unit = unit  # joules
        self._last = [read() for read, _ in counters]
        self._total = 0

    def joules(self) -> float:
        """Joules since the meter was made. OSError or ValueError where a counter fails."""
        values = [read() for read, _ in self._counters]
        for (_, limit), last, value in zip(self._counters, self._last, values, strict=True):
            self._total += value - last + (limit if value < last else 0)
        self._last = values
        return self._total * self._unit


def rapl_meter(root: Path = POWERCAP) -> Meter | None:
    """The meter of all packages and their DRAM under `root`; None where one cannot be read.

    A package includes cores and graphics, the platform (psys) includes packages, and the
    intel-rapl-mmio tree counts the same package again: these are left out.
    """
    try:
        folders = {p: (p / "name").read_text().strip() for p in sorted(root.glob("intel-rapl:*"))}
        zones = {p: name for p, name in folders.items() if name.startswith(("package", "dram"))}
        counters = [
            (partial(_number, path / "energy_uj"), _number(path / "max_energy_range_uj"))
            for path in zones
        ]
        return Meter("RAPL " + ", ".join(zones.values()), counters, MICRO) if zones else None
    except (OSError, ValueError):
        return None


def _number(path: Path) -> int:
    return int(path.read_text())


def nvml_meter(device: torch.device, nvml: Any = None) -> Meter | None:
    """The meter of a CUDA device; None without nvidia-ml-py, or where the GPU has no counter.

    The GPU is found by its UUID, since NVML does not follow CUDA_VISIBLE_DEVICES.
    """
    try:
        nvml = nvml or importlib.import_module("pynvml")  # optional: nvidia-ml-py
    except ImportError:
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    try:
        nvml.nvmlInit()
        read = partial(_nvml_counter, nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
        return Meter("NVML total energy", [(read, 0)], MILLI)
    except (OSError, nvml.NVMLError):
        return None


def _nvml_counter(nvml: Any, handle: Any) -> int:
    try:
        return int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    except nvml.NVMLError as error:
        raise OSError(f"NVML: {error}") from error


def find_meter(device: torch.device, *, powercap: Path = POWERCAP) -> Meter | None:
    """The meter of this device, None where there is none to be read."""
    return nvml_meter(device) if device.type == "cuda" else rapl_meter(powercap)


def measure_energy(
    step: Callable[[], Any],
    *,
    images: int,
    meter: Meter | None,
    device: torch.device,
    seconds: float = 5.0,
    clock: Clock = time.perf_counter,
) -> Energy | None:
    """Repeat `step`, which runs `images` images on `device`, for at least `seconds`.

    The counters tick up to ten times a second, so `seconds` should not be short.  None, which is
    'not measured', without a meter, when it stops answering, and when it stands still.
    """
    if meter is None:
        return None
    step()
    synchronize(device)
    try:
        before, begun, steps = meter.joules(), clock(), 0
        now = read = begun
        while now - begun < seconds:
            step()
            synchronize(device)
            steps, now = steps + 1, clock()
            if now - read > MAX_UNREAD:  # reading costs time and wakes the processor
                meter.joules()
                read = now
        joules = meter.joules() - before
    except (OSError, ValueError):
        return None
    return Energy(joules, now - begun, steps * images, meter.source) if joules > 0 else None
