"""Interleaved timing with a clock of our own, and one order that is certain."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from engine.measure.bench import prepare, sample_images
from engine.measure.latency import (
    MEASURED,
    MIN_ROUNDS,
    MODELLED,
    Candidate,
    Latency,
    LatencyConfig,
    interleave,
    measure_latency,
)
from models.builder import build_detector
from models.yaml.parser import load_spec

CPU = torch.device("cpu")


class FakeClock:
    """Stands still but for what steps take."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def step(self, name: str, seconds: float):
        def run() -> None:
            self.now += seconds
            self.calls.append(name)

        return run


def timed(clock: FakeClock, rounds: int, seconds: float = 1e9, **steps: float):
    config = LatencyConfig(rounds=rounds, seconds=seconds)
    runs = [clock.step(name, value) for name, value in steps.items()]
    return interleave(runs, config, device=CPU, clock=clock)


def test_rounds_go_through_all_and_begin_with_another_each_time():
    clock = FakeClock()
    durations = timed(clock, 6, a=1.0, b=2.0, c=4.0)
    assert "".join(clock.calls) == "abcbcacababcbcacab"
    assert durations == [[1.0] * 6, [2.0] * 6, [4.0] * 6]


def test_the_budget_ends_the_rounds_but_not_before_the_minimum():
    assert len(timed(FakeClock(), 50, seconds=10.5, a=0.5, b=0.5)[0]) == 11
    assert len(timed(FakeClock(), 50, seconds=1.0, a=10.0)[0]) == MIN_ROUNDS
    assert timed(FakeClock(), 50) == []


def test_metrics_by_hand():
    durations = tuple(0.010 * i for i in range(1, 12))  # 10 to 110 ms for two images
    found = Latency("m", 64, 2, durations, flops=3 * 10**9, memory_bytes=1, memory_source=MODELLED)
    assert found.p50 == pytest.approx(30)
    assert found.p90 == pytest.approx(50)
    assert found.fastest == pytest.approx(5)
    assert found.images_per_second == pytest.approx(1 / 0.030)
    assert found.gflops_per_second == pytest.approx(100)


class Waits(nn.Module):
    """Advances the clock by a known time for each image; `full` images are too many."""

    def __init__(self, clock: FakeClock, seconds: float, full: int = 99) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.run = lambda batch: clock.step("", seconds * batch)()
        self.full = full

    def forward(self, images: Tensor) -> Tensor:
        if len(images) >= self.full:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        if not images.is_meta:
            self.run(len(images))
        return self.conv(images)


def test_all_models_and_batches_are_measured():
    clock = FakeClock()
    models = [Candidate("a", Waits(clock, 0.5), 8), Candidate("b", Waits(clock, 0.25), 16)]
    config = LatencyConfig(batches=(1, 4), rounds=7, warm_up=1)
    report = measure_latency(models, config, device=CPU, clock=clock)
    assert list(report.results) == [("a", 1), ("b", 1), ("a", 4), ("b", 4)]
    found = [item.p50 for item in report.results.values()]
    assert found == pytest.approx([500, 250, 500, 250])
    a, b = report.results["a", 4], report.results["b", 4]
    assert (a.flops, b.flops) == (2 * 64 * 12, 2 * 256 * 12)
    assert a.memory_source == MODELLED
    assert a.memory_bytes == 4 * (16 + 4 * 64 * (3 + 4))  # weights, bias; images and result
    assert len(a.durations) == 7
    settings = json.loads(json.dumps(report.settings))
    assert settings == report.settings
    assert settings["device"].startswith("cpu")
    assert settings["threads"] == torch.get_num_threads()


class Fails(Waits):
    """Fails in its n-th call, or when it is copied to the device (0)."""

    def __init__(self, clock: FakeClock, call: int) -> None:
        super().__init__(clock, 1)
        self.left = call

    def __deepcopy__(self, memo):
        if self.left == 0:
            raise RuntimeError("CUDA error: no more\nand so on")
        copied = Fails(FakeClock(), self.left)
        copied.run = self.run
        return copied

    def forward(self, images: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("CUDA error: no more\nand so on")
        return super().forward(images)


@pytest.mark.parametrize("call", [0, 2, 5, 9])  # in the warm-up, in a round, for the memory
def test_one_that_fails_does_not_end_the_rest(call):
    clock = FakeClock()
    models = [Candidate("bad", Fails(clock, call), 8), Candidate("ok", Waits(clock, 1), 8)]
    config = LatencyConfig(batches=(1,), warm_up=3, rounds=5)
    report = measure_latency(models, config, device=CPU, clock=clock)
    assert report.results["bad", 1] == "RuntimeError: CUDA error: no more"
    assert len(report.results["ok", 1].durations) == 5


def test_one_that_runs_out_of_memory_is_measured_where_it_fits():
    clock = FakeClock()
    models = [Candidate("big", Waits(clock, 1, full=4), 8), Candidate("ok", Waits(clock, 1), 8)]
    config = LatencyConfig(batches=(4, 1), rounds=5)
    report = measure_latency(models, config, device=CPU, clock=clock)
    assert report.results.pop(("big", 4)) == "OutOfMemoryError: CUDA out of memory."
    assert sorted(report.results) == [("big", 1), ("ok", 1), ("ok", 4)]
    assert all(isinstance(found, Latency) for found in report.results.values())


def test_preparing_leaves_the_model_alone():
    torch.manual_seed(0)
    model = build_detector(load_spec("yolov5n"), classes=3).train()
    ready = prepare(model, CPU)
    assert model.training
    assert not ready.training
    kinds = [sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) for net in (model, ready)]
    assert kinds[0] > 0
    assert kinds[1] == 0
    images = sample_images(2, 64, CPU, like=ready)
    assert 0 <= images.min() < images.max() < 1
    with torch.inference_mode():
        expected, found = model.eval()(images), ready(images)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(expected, found, strict=True))


def test_the_order_of_two_models_is_right():
    """A nano model at 64 px against a small one at 256 px: some fifty times the work."""
    small = Candidate("small", build_detector(load_spec("yolov5n"), classes=3), 64)
    large = Candidate("large", build_detector(load_spec("yolov5s"), classes=3), 256)
    config = LatencyConfig(batches=(1,), rounds=7, warm_up=1)
    report = measure_latency([large, small], config, device=CPU)
    slow, fast = report.results.values()
    assert slow.flops > 40 * fast.flops
    assert fast.p50 < slow.p50
    assert fast.fastest < slow.fastest
    assert fast.memory_bytes < slow.memory_bytes
    assert slow.gflops_per_second > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_a_gpu_is_measured_for_each_model_alone():
    device = torch.device("cuda", 0)
    config = LatencyConfig(batches=(1, 8), rounds=7)
    models = {name: build_detector(load_spec(name), classes=3) for name in ("yolov5n", "yolov5s")}
    together = [Candidate(name, model, 256) for name, model in models.items()]
    both = measure_latency(together, config, device=device)
    alone = measure_latency(together[:1], config, device=device)
    for batch in config.batches:
        small, large, single = (
            both.results["yolov5n", batch],
            both.results["yolov5s", batch],
            alone.results["yolov5n", batch],
        )
        assert small.memory_source == MEASURED
        assert small.memory_bytes < large.memory_bytes
        assert small.memory_bytes == pytest.approx(single.memory_bytes, rel=0.05)
