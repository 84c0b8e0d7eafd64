"""Time per stage of a loop, without making a CUDA device wait inside it."""

from __future__ import annotations

import itertools
import time

import torch


class Stopwatch:
    """Sums the time between marks over many rounds of the same `stages`.

    On CUDA the marks are events in the stream and are read once, in `seconds`; elsewhere they are
    clock readings.
    """

    def __init__(self, device: torch.device, stages: int) -> None:
        self._marks_per_round = stages + 1
        self._cuda = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._clock: list[float] = []

    def mark(self) -> None:
        """The start of a round, the end of a stage, and so on through the stages."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._clock.append(time.perf_counter())

    def seconds(self) -> tuple[float, ...]:
        """The sum for each stage over the rounds, which must be complete."""
        if self._cuda:
            torch.cuda.synchronize()
            laps = [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(self._events)]
        else:
            laps = [b - a for a, b in itertools.pairwise(self._clock)]
        stages = range(
            self._marks_per_round - 1
        )  # the lap after the last stage lies between rounds
        return tuple(sum(laps[stage :: self._marks_per_round]) for stage in stages)
