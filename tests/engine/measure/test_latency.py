"""Interleaved timing with a clock of our own, and one order that is certain."""

from __future__ import annotations

import json
import time

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
        self.calls = ""

    def step(self, name: str, seconds: float) -> None:
        self.now += seconds
        self.calls += name


@pytest.fixture
def clock(monkeypatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(time, "perf_counter", lambda: fake.now)
    return fake


@pytest.mark.parametrize(
    ("steps", "rounds", "budget", "calls"),
    [  # each round begins with another step
        ({"a": 1.0, "b": 2.0, "c": 4.0}, 6, 1e9, "abcbcacababcbcacab"),
        ({"a": 0.5, "b": 0.5}, 50, 10.5, "abba" * 5 + "ab"),
        ({"a": 10.0}, 50, 1.0, "a" * MIN_ROUNDS),  # the budget ends no round before the minimum
        ({}, 50, 1.0, ""),
    ],
)
def test_rounds(clock, steps, rounds, budget, calls):
    config = LatencyConfig(rounds=rounds, seconds=budget)
    runs = [lambda item=item: clock.step(*item) for item in steps.items()]
    durations = interleave(runs, config, device=CPU)
    assert clock.calls == calls
    assert durations == [[seconds] * calls.count(name) for name, seconds in steps.items()]


def test_metrics_by_hand():
    durations = tuple(0.010 * i for i in range(1, 12))  # 10 to 110 ms for two images
    found = Latency(2, durations, flops=3 * 10**9, memory_bytes=1, memory_source=MODELLED)
    assert (found.p50_ms, found.p90_ms, found.least_ms) == pytest.approx((30, 50, 5))
    assert found.images_per_second == pytest.approx(1 / 0.030)
    assert found.gflops_per_second == pytest.approx(100)


class Waits(nn.Module):
    """Advances the clock by a known time for each image.

    `full` images are too many; call number `fails` fails, 0 is the copy to the device.
    """

    def __init__(self, clock: FakeClock, seconds: float, full: int = 99, fails: int = -1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.seconds, self.full, self.left = seconds, full, fails
        self.run = lambda seconds: clock.step("", seconds)  # a function is copied as itself

    def __deepcopy__(self, memo):
        self.count_down(0)
        copied = Waits(None, self.seconds, self.full, self.left)
        copied.run = self.run
        return copied

    def count_down(self, calls: int = 1) -> None:
        self.left -= calls
        if self.left == 0:
            raise RuntimeError("CUDA error: no more\nand so on")

    def forward(self, images: Tensor) -> Tensor:
        self.count_down()
        if len(images) >= self.full:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        if not images.is_meta:
            self.run(self.seconds * len(images))
        return self.conv(images)


def test_all_models_and_batches_are_measured(clock):
    models = [Candidate("a", Waits(clock, 0.5), 8), Candidate("b", Waits(clock, 0.25), 16)]
    config = LatencyConfig(batches=(1, 4), rounds=7, warm_up=1)
    results, settings = measure_latency(models, config, device=CPU)
    assert list(results) == [("a", 1), ("b", 1), ("a", 4), ("b", 4)]
    assert [item.p50_ms for item in results.values()] == pytest.approx([500, 250, 500, 250])
    a, b = results["a", 4], results["b", 4]
    assert (a.flops, b.flops) == (2 * 64 * 12, 2 * 256 * 12)
    assert a.memory_source == MODELLED
    assert a.memory_bytes == 4 * (16 + 4 * 64 * (3 + 4))  # weights, bias; images and result
    assert len(a.durations) == 7
    assert settings == json.loads(json.dumps(settings))
    assert settings["device"].startswith("cpu")
    assert settings["threads"] == torch.get_num_threads()


# in the copy, the warm-up, a round, for the memory
@pytest.mark.parametrize("call", [0, 2, 5, 9])
def test_one_that_fails_does_not_end_the_rest(clock, call):
    models = [Candidate("bad", Waits(clock, 1, fails=call), 8), Candidate("ok", Waits(clock, 1), 8)]
    config = LatencyConfig(batches=(1,), warm_up=3, rounds=5)
    results, _ = measure_latency(models, config, device=CPU)
    assert results["bad", 1] == "RuntimeError: CUDA error: no more"
    assert len(results["ok", 1].durations) == 5


def test_one_that_runs_out_of_memory_is_measured_where_it_fits(clock):
    models = [Candidate("big", Waits(clock, 1, full=4), 8), Candidate("ok", Waits(clock, 1), 8)]
    results, _ = measure_latency(models, LatencyConfig(batches=(4, 1), rounds=5), device=CPU)
    assert results.pop(("big", 4)) == "OutOfMemoryError: CUDA out of memory."
    assert sorted(results) == [("big", 1), ("ok", 1), ("ok", 4)]
    assert all(isinstance(found, Latency) for found in results.values())


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
    slow, fast = measure_latency([large, small], config, device=CPU)[0].values()
    assert slow.flops > 40 * fast.flops
    assert fast.p50_ms < slow.p50_ms
    assert fast.least_ms < slow.least_ms
    assert fast.memory_bytes < slow.memory_bytes
    assert slow.gflops_per_second > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_a_gpu_is_measured_for_each_model_alone():
    device = torch.device("cuda", 0)
    config = LatencyConfig(batches=(1, 8), rounds=7)
    models = {name: build_detector(load_spec(name), classes=3) for name in ("yolov5n", "yolov5s")}
    together = [Candidate(name, model, 256) for name, model in models.items()]
    both, _ = measure_latency(together, config, device=device)
    alone, _ = measure_latency(together[:1], config, device=device)
    for batch in config.batches:
        small, large, single = (
            both["yolov5n", batch],
            both["yolov5s", batch],
            alone["yolov5n", batch],
        )
        assert small.memory_source == MEASURED
        assert small.memory_bytes < large.memory_bytes
        assert small.memory_bytes == pytest.approx(single.memory_bytes, rel=0.05)
