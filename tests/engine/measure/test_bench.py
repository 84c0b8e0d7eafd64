"""Durations of a device's work: on its own stream, whatever device is the current one."""

from __future__ import annotations

import itertools

import torch

from engine.measure.bench import Stopwatch


def test_stages_are_summed_over_rounds_without_the_time_between(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 100.0, 101.0, 103.0])
    watch = Stopwatch(torch.device("cpu"), stages=2)
    monkeypatch.setattr("engine.measure.bench.mark", lambda _: next(clock))
    for _ in range(6):
        watch.mark()
    assert watch.seconds() == (2.0, 4.0)


def test_cuda_events_are_recorded_on_the_models_device(monkeypatch):
    """With --device 1 the current device is still GPU 0: events there time nothing."""
    recorded, waited = [], []
    ticks = itertools.count()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object = "stream of the current device") -> None:
            recorded.append(stream)
            self.tick = next(ticks)

        def elapsed_time(self, other: Event) -> float:
            return 1000.0 * (other.tick - self.tick)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    watch = Stopwatch(torch.device("cuda", 1), stages=2)
    for _ in range(3):
        watch.mark()
    assert watch.seconds() == (1.0, 1.0)
    assert recorded == ["stream of cuda:1"] * 3
    assert waited == [torch.device("cuda", 1)]
