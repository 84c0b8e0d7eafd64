"""What all measurements on a device share: a prepared model, images, marks in time and waiting."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.blocks.conv import fuse
from models.spec import IMAGE_CHANNELS

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NCHW = "NCHW"
LAYOUTS = {NCHW: torch.contiguous_format, "channels last": torch.channels_last}


def prepare(
    model: nn.Module,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = NCHW,
) -> nn.Module:
    """A copy for inference on `device`, BN folded into the convolutions; the original stays.

    layout: the weights' order in memory, a key of LAYOUTS.
    """
    ready = copy.deepcopy(model).to(device).eval()
    fuse(ready)
    return ready.to(dtype).to(memory_format=LAYOUTS[layout])


def sample_images(
    batch: int, image_size: int, device: torch.device, *, like: nn.Module, layout: str = NCHW
) -> Tensor:
    """(batch, 3, S, S) noise in [0, 1), the same each time, in the type of the model's weights."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, IMAGE_CHANNELS, image_size, image_size, generator=generator)
    images = images.to(device, next(like.parameters()).dtype)
    return images.contiguous(memory_format=LAYOUTS[layout])


def forward_step(
    model: nn.Module, images: Tensor, *, graph: bool, pool: Any = None
) -> Callable[[], Any]:
    """One forward pass as a function: eager or, with `graph`, the replay of a CUDA graph.

    A replay starts all kernels by one call.  `pool` is memory that graphs share which do not run
    at the same time; what an earlier one returned is lost.
    """
    if not graph:
        return lambda: model(images)
    device = images.device
    with torch.cuda.device(device), torch.inference_mode():
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # libraries must settle outside of a capture
            model(images)
        torch.cuda.current_stream(device).wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, pool=pool):
            model(images)
    return captured.replay


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work given to it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def mark(device: torch.device) -> Any:
    """This instant in the order of the device's work, without making CUDA wait.

    A CUDA event in the device's current stream, else a clock reading.
    """
    if device.type != "cuda":
        synchronize(device)
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Between two marks of one device, after `synchronize`."""
    return float(end - start if isinstance(start, float) else start.elapsed_time(end) / 1000)


class Speed(NamedTuple):
    """Milliseconds per image: letterbox and copy, network and decoding, suppression."""

    pre: float
    inference: float
    nms: float

    def text(self) -> str:
        """The speed line."""
        return (
            f"Speed: {self.pre:.1f} ms pre-process, {self.inference:.1f} ms inference, "
            f"{self.nms:.1f} ms NMS per image"
        )


class Stopwatch:
    """Sums the durations between marks over many rounds of the same `stages`."""

    def __init__(self, device: torch.device, stages: int) -> None:
        self._stages = stages
        self._device = device
        self._taken: list[Any] = []

    def mark(self) -> None:
        """The start of a round, the end of a stage, and so on through the stages."""
        self._taken.append(mark(self._device))

    def seconds(self) -> tuple[float, ...]:
        """The sum for each stage over the rounds, which must be complete; waits for the device."""
        synchronize(self._device)
        durations = [seconds_between(a, b) for a, b in itertools.pairwise(self._taken)]
        round_length = self._stages + 1  # the last duration of a round lies between two rounds
        return tuple(sum(durations[stage::round_length]) for stage in range(self._stages))
