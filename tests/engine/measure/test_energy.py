"""Energy from counters that tests own: a fake powercap tree, a fake NVML, a fake meter."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.measure.energy import Energy, find_meter, measure_energy, nvml_meter, rapl_meter

CPU = torch.device("cpu")
LIMIT = 262_143_328_850  # µJ, a common range


def zone(root: Path, folder: str, name: str, energy: int) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(name + "\n")
    (path / "energy_uj").write_text(f"{energy}\n")
    (path / "max_energy_range_uj").write_text(f"{LIMIT}\n")
    return path / "energy_uj"


def test_packages_and_their_dram_are_summed(tmp_path):
    first = zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 5)
    dram = zone(tmp_path, "intel-rapl:0:1", "dram", 0)
    others = [
        zone(tmp_path, "intel-rapl:0:0", "core", 0),
        zone(tmp_path, "intel-rapl:2", "psys", 0),
        zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0),
    ]
    meter = find_meter(CPU, powercap=tmp_path)
    assert meter is not None
    assert meter.source == "RAPL package-0, dram, package-1"
    assert meter.joules() == 0
    first.write_text("3000000\n")
    second.write_text("500005\n")
    dram.write_text("250000\n")
    for other in others:
        other.write_text("99000000\n")
    assert meter.joules() == pytest.approx(2 + 0.5 + 0.25)


def test_a_counter_that_wraps_around(tmp_path):
    counter = zone(tmp_path, "intel-rapl:0", "package-0", LIMIT - 1_000_000)
    meter = rapl_meter(tmp_path)
    assert meter is not None
    counter.write_text("2000000")
    assert meter.joules() == pytest.approx(3)
    counter.write_text("2500000")
    assert meter.joules() == pytest.approx(3.5)
    counter.write_text("500000")  # once more around
    assert meter.joules() == pytest.approx(3.5 + (LIMIT - 2_000_000) * 1e-6)


def test_what_cannot_be_read_is_not_measured(tmp_path):
    assert rapl_meter(tmp_path) is None
    assert rapl_meter(tmp_path / "missing") is None
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    counter.write_text("n/a")
    assert rapl_meter(tmp_path) is None
    counter.unlink()
    counter.mkdir()  # as unreadable as one without permission, also for root
    assert rapl_meter(tmp_path) is None


class NVMLError(Exception):
    pass


class FakeNvml:
    """Two GPUs by UUID, the second without a counter."""

    NVMLError = NVMLError

    def __init__(self) -> None:
        self.millijoules = 5000

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in {"GPU-one", "GPU-two"}:
            raise NVMLError("not found")
        return uuid

    def lost(self, handle: str) -> int:
        raise NVMLError("lost")

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if handle == "GPU-two":
            raise NVMLError("not supported")
        return self.millijoules


@pytest.mark.parametrize("uuid", ["one", "two", "three", None])
def test_a_gpu_is_found_by_its_uuid_or_not_measured(monkeypatch, uuid):
    properties = SimpleNamespace() if uuid is None else SimpleNamespace(uuid=uuid)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    nvml = FakeNvml()
    meter = nvml_meter(torch.device("cuda", 0), nvml)
    assert (meter is not None) == (uuid == "one")
    if meter is None:
        return
    assert meter.joules() == 0
    nvml.millijoules += 2500
    assert meter.joules() == pytest.approx(2.5)
    # it stops answering
    monkeypatch.setattr(FakeNvml, "nvmlDeviceGetTotalEnergyConsumption", FakeNvml.lost)
    assert measure_energy(lambda: None, images=1, meter=meter, device=CPU, seconds=0.01) is None


class Bench:
    """A device of constant power and the time its steps take."""

    source = "fake"

    def __init__(self, watts: float, seconds: float) -> None:
        self.watts, self.seconds = watts, seconds
        self.now = 0.0
        self.steps = 0
        self.reads = 0

    def step(self) -> None:
        self.now += self.seconds
        self.steps += 1

    def joules(self) -> float:
        self.reads += 1
        return self.now * self.watts


def measured(bench: Bench, *, images: int = 1, seconds: float = 2.0) -> Energy | None:
    return measure_energy(
        bench.step, images=images, meter=bench, device=CPU, seconds=seconds, clock=lambda: bench.now
    )


@pytest.mark.parametrize(("seconds", "reads"), [(2.0, 2), (200.0, 5)])
def test_the_counter_is_read_at_both_ends_and_once_a_minute(seconds, reads):
    """Reading after every step would be part of what is measured."""
    bench = Bench(watts=80.0, seconds=1.0)
    assert measured(bench, seconds=seconds) is not None
    assert bench.reads == reads


def test_joules_per_image():
    bench = Bench(watts=80.0, seconds=0.25)
    found = measured(bench, images=4)
    assert found == Energy(joules=160.0, seconds=2.0, images=32, source="fake")
    assert bench.steps == 8 + 1  # one to warm up
    assert found.joules_per_image == pytest.approx(5)
    assert found.watts == pytest.approx(80)


def test_no_meter_or_one_that_stands_still_is_not_measured():
    bench = Bench(watts=0.0, seconds=1.0)
    assert measure_energy(bench.step, images=1, meter=None, device=CPU) is None
    assert bench.steps == 0
    assert measured(bench) is None
