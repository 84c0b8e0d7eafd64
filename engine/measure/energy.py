"""Joules per image, from the device's own counters or not at all.

NVIDIA: the board's total since the driver was loaded (NVML).  CPU: RAPL's packages and their DRAM
where the system lets them be read.  Both count the whole device, idle power and other
processes included, so compare runs of the same quiet machine.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.measure.bench import synchronize

POWERCAP = Path("/sys/class/powercap")
NOT_MEASURED = "not measured"
MAX_UNREAD = 60.0  # seconds; no counter wraps around twice in that time
MICRO, MILLI = 1e-6, 1e-3


@dataclass(frozen=True)
class Energy:
    """What running a model took, by the device's own counter."""

    joules_per_image: float
    watts: float  # mean
    batch: int
    source: str


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
        self._total: float = 0

    def joules(self) -> float:
        """Joules since the meter was made; NaN from the moment on when a counter fails."""
        try:
            values = [read() for read, _ in self._counters]
        except Exception:  # NVML has its own type of error
            self._total, values = math.nan, self._last
        for (_, limit), last, value in zip(self._counters, self._last, values, strict=True):
            self._total += value - last + (limit if value < last else 0)
        self._last = values
        return self._total * self._unit


def find_meter(device: torch.device) -> Meter | None:
    """The meter of this device, None where there is none to be read."""
    try:
        return _nvml_meter(device) if device.type == "cuda" else _rapl_meter()
    except Exception:  # no file, no permission, no nvidia-ml-py, no counter in this GPU
        return None


def _rapl_meter() -> Meter | None:
    """All packages and their DRAM.

    A package includes cores and graphics, the platform (psys) includes packages, and the
    intel-rapl-mmio tree counts the same package again: these are left out.
    """
    folders = {p: (p / "name").read_text().strip() for p in sorted(POWERCAP.glob("intel-rapl:*"))}
    zones = {p: name for p, name in folders.items() if name.startswith(("package", "dram"))}
    counters = [
        (partial(_number, path / "energy_uj"), _number(path / "max_energy_range_uj"))
        for path in zones
    ]
    return Meter("RAPL " + ", ".join(zones.values()), counters, MICRO) if zones else None


def _number(path: Path) -> int:
    return int(path.read_text())


def _nvml_meter(device: torch.device) -> Meter:
    """The GPU is found by its UUID, since NVML does not follow CUDA_VISIBLE_DEVICES."""
    nvml: Any = importlib.import_module("pynvml")  # optional: nvidia-ml-py
    nvml.nvmlInit()
    uuid = torch.cuda.get_device_properties(device).uuid
    handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    read = partial(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
    return Meter("NVML total energy", [(read, 0)], MILLI)


def measure_energy(
    step: Callable[[], Any], *, images: int, device: torch.device, seconds: float = 5.0
) -> Energy | None:
    """Repeat `step`, which runs `images` images on `device`, for at least `seconds`.

    The counters tick up to ten times a second, so `seconds` should not be short.  None, which is
    'not measured', without a meter, when it stops answering, and when it stands still.
    """
    meter = find_meter(device)
    if meter is None:
        return None
    step()
    synchronize(device)
    before, steps = meter.joules(), 0
    now = read = begun = time.perf_counter()
    while now - begun < seconds:
        step()
        synchronize(device)
        steps, now = steps + 1, time.perf_counter()
        if now - read > MAX_UNREAD:  # reading costs time and wakes the processor
            meter.joules()
            read = now
    joules = meter.joules() - before
    if not joules > 0:
        return None
    return Energy(joules / (steps * images), joules / (now - begun), images, meter.source)
