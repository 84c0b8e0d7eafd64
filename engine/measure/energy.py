"""Joules per image, from the device's own counters or not at all.

NVIDIA: the board's total since the driver was loaded (NVML).  CPU: RAPL's packages and their DRAM
where the system lets them be read.  Both count the whole device, idle power and other
processes included, so compare runs of the same quiet machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from engine.measure.bench import Clock, synchronize

POWERCAP = Path("/sys/class/powercap")
NOT_MEASURED = "not measured"
MAX_UNREAD = 60.0  # seconds; no counter wraps around twice in that time
MICRO, MILLI = 1e-6, 1e-3


class Meter(Protocol):
    """A counter of energy."""

    @property
    def source(self) -> str:
        """What is counted, e.g. 'RAPL package-0'."""

    def joules(self) -> float:
        """Joules since the first reading, which is 0."""


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

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "joules_per_image": self.joules_per_image, "watts": self.watts}


@dataclass(frozen=True)
class RaplZone:
    """A folder of the kernel's powercap tree; its counter starts again at 0 after `limit` µJ."""

    name: str
    counter: Path
    limit: int

    def read(self) -> int:
        """Microjoules. OSError where the system forbids it, ValueError for no number."""
        return int(self.counter.read_text())


class RaplMeter:
    """The sum of several zones; to be read at least once in each round of a counter (minutes)."""

    def __init__(self, zones: Sequence[RaplZone]) -> None:
        self._zones = tuple(zones)
        self._last = [zone.read() for zone in self._zones]
        self._total = 0

    @property
    def source(self) -> str:
        """'RAPL package-0, dram'."""
        return "RAPL " + ", ".join(zone.name for zone in self._zones)

    def joules(self) -> float:
        """Joules since the meter was made."""
        values = [zone.read() for zone in self._zones]
        for zone, last, value in zip(self._zones, self._last, values, strict=True):
            self._total += value - last + (zone.limit if value < last else 0)
        self._last = values
        return self._total * MICRO


class NvmlMeter:
    """A GPU's own counter; `nvml` is the module pynvml, initialised."""

    source = "NVML total energy"

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle
        self._first = self._read()

    def _read(self) -> int:
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._nvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from error

    def joules(self) -> float:
        """Joules since the meter was made."""
        return (self._read() - self._first) * MILLI


def rapl_meter(root: Path = POWERCAP) -> RaplMeter | None:
    """The meter of all packages and their DRAM under `root`; None where one cannot be read.

    A package includes cores and graphics, the platform (psys) includes packages, and the
    intel-rapl-mmio tree counts the same package again: these are left out.
    """
    try:
        folders = sorted(root.glob("intel-rapl:*"))
        named = [(folder, (folder / "name").read_text().strip()) for folder in folders]
        zones = [
            RaplZone(name, folder / "energy_uj", int((folder / "max_energy_range_uj").read_text()))
            for folder, name in named
            if name.startswith("package") or name == "dram"
        ]
        return RaplMeter(zones) if zones else None
    except (OSError, ValueError):
        return None


def nvml_meter(device: torch.device, nvml: Any = None) -> NvmlMeter | None:
    """The meter of a CUDA device; None without nvidia-ml-py, or where the GPU has no counter.

    The GPU is found by its UUID, since NVML does not follow CUDA_VISIBLE_DEVICES.
    """
    nvml = nvml or _load_nvml()
    if nvml is None:
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if uuid is None:
        return None
    try:
        nvml.nvmlInit()
        return NvmlMeter(nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
    except (OSError, nvml.NVMLError):
        return None


def _load_nvml() -> Any:
    try:
        import pynvml  # optional: nvidia-ml-py
    except ImportError:
        return None
    return pynvml


def find_meter(device: torch.device, *, powercap: Path = POWERCAP) -> Meter | None:
    """The meter of this device, None where there is none to be read."""
    if device.type == "cuda":
        return nvml_meter(device)
    return rapl_meter(powercap) if device.type == "cpu" else None


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
    if images < 1 or not seconds > 0:
        raise ValueError(f"images and seconds must be over 0, got {images} and {seconds}")
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
