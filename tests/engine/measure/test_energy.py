"""Energy from counters that tests own: a fake powercap tree, a fake NVML, a fake meter."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.measure import energy
from engine.measure.energy import Energy, find_meter, measure_energy

CPU = torch.device("cpu")
LIMIT = 262_143_328_850  # µJ, a common range


@pytest.fixture
def zone(tmp_path, monkeypatch):
    """Make a zone of a powercap tree; returns the file of its counter."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)

    def make(folder: str, name: str, value: int) -> Path:
        path = tmp_path / folder
        path.mkdir()
        (path / "name").write_text(name + "\n")
        (path / "energy_uj").write_text(f"{value}\n")
        (path / "max_energy_range_uj").write_text(f"{LIMIT}\n")
        return path / "energy_uj"

    return make


def test_packages_and_their_dram_are_summed(zone):
    first = zone("intel-rapl:0", "package-0", 1_000_000)
    second = zone("intel-rapl:1", "package-1", 5)
    dram = zone("intel-rapl:0:1", "dram", 0)
    others = {"intel-rapl:0:0": "core", "intel-rapl:2": "psys", "intel-rapl-mmio:0": "package-0"}
    left_out = [zone(folder, name, 0) for folder, name in others.items()]
    meter = find_meter(CPU)
    assert meter.source == "RAPL package-0, dram, package-1"
    assert meter.joules() == 0
    first.write_text("3000000\n")
    second.write_text("500005\n")
    dram.write_text("250000\n")
    for other in left_out:
        other.write_text("99000000\n")
    assert meter.joules() == pytest.approx(2 + 0.5 + 0.25)


def test_a_counter_that_wraps_around(zone):
    counter = zone("intel-rapl:0", "package-0", LIMIT - 1_000_000)
    meter = find_meter(CPU)
    wrapped_again = 3.5 + (LIMIT - 2_000_000) * 1e-6
    for value, joules in ((2_000_000, 3), (2_500_000, 3.5), (500_000, wrapped_again)):
        counter.write_text(str(value))
        assert meter.joules() == pytest.approx(joules)


def test_what_cannot_be_read_is_not_measured(zone):
    assert find_meter(CPU) is None
    steps = []
    assert measure_energy(lambda: steps.append(1), images=1, device=CPU) is None
    assert not steps
    counter = zone("intel-rapl:0", "package-0", 0)
    counter.write_text("n/a")
    assert find_meter(CPU) is None
    counter.unlink()
    counter.mkdir()  # as unreadable as one without permission, also for root
    assert find_meter(CPU) is None


class NVMLError(Exception):
    pass


class FakeNvml:
    """Two GPUs by UUID, the second without a counter."""

    millijoules = 5000
    lost = False

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in {"GPU-one", "GPU-two"}:
            raise NVMLError("not found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if handle == "GPU-two" or self.lost:
            raise NVMLError("not supported, or lost")
        return self.millijoules


@pytest.mark.parametrize("uuid", ["one", "two", "three", None])
def test_a_gpu_is_found_by_its_uuid_or_not_measured(monkeypatch, uuid):
    properties = SimpleNamespace() if uuid is None else SimpleNamespace(uuid=uuid)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    gpu = torch.device("cuda", 0)
    meter = find_meter(gpu)
    assert (meter is not None) == (uuid == "one")
    if meter is not None:
        assert meter.joules() == 0
        nvml.millijoules += 2500
        assert meter.joules() == pytest.approx(2.5)
        monkeypatch.setattr(energy, "find_meter", lambda _: meter)
        nvml.lost = True  # it stops answering
        assert measure_energy(lambda: None, images=1, device=CPU, seconds=0.01) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert find_meter(gpu) is None


class Bench:
    """A device of constant power and the time its steps take, with its meter and the clock."""

    source = "fake"

    def __init__(self, watts: float, seconds: float) -> None:
        self.watts, self.seconds = watts, seconds
        self.now, self.steps, self.reads = 0.0, 0, 0

    def step(self) -> None:
        self.now += self.seconds
        self.steps += 1

    def joules(self) -> float:
        self.reads += 1
        return self.now * self.watts


@pytest.mark.parametrize(
    ("watts", "step", "seconds", "steps", "reads"),
    [
        (80.0, 0.25, 2.0, 8, 2),
        (80.0, 1.0, 200.0, 200, 5),  # once a minute, too: more would be part of what is measured
        (0.0, 1.0, 2.0, 2, 2),  # a counter that stands still
    ],
)
def test_joules_per_image(monkeypatch, watts, step, seconds, steps, reads):
    bench = Bench(watts, step)
    monkeypatch.setattr(energy, "find_meter", lambda _: bench)
    monkeypatch.setattr(time, "perf_counter", lambda: bench.now)
    found = measure_energy(bench.step, images=4, device=CPU, seconds=seconds)
    assert (bench.steps, bench.reads) == (steps + 1, reads)  # one to warm up
    if not watts:
        assert found is None
        return
    assert found == Energy(watts * step / 4, watts, 4, "fake")
