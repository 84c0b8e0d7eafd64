"""What all measurements on a device share: the model made ready, images, clock and waiting."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.blocks.conv import fuse
from models.spec import IMAGE_CHANNELS

Clock = Callable[[], float]  # seconds


def prepare(
    model: nn.Module, device: torch.device, *, fused: bool, channels_last: bool
) -> nn.Module:
    """A copy for inference on `device`; the original stays as it is."""
    ready = copy.deepcopy(model).to(device).eval()
    if fused:
        fuse(ready)
    return ready.to(memory_format=torch.channels_last) if channels_last else ready


def sample_images(
    batch: int, image_size: int, device: torch.device, *, like: nn.Module, channels_last: bool
) -> Tensor:
    """(batch, 3, S, S) noise in [0, 1), the same each time, in the type of the model's weights."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, IMAGE_CHANNELS, image_size, image_size, generator=generator)
    weight = next(like.parameters(), None)
    images = images.to(device, torch.float32 if weight is None else weight.dtype)
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize()


@contextmanager
def no_collection() -> Iterator[None]:
    """The garbage collector stays out of the timed part, as in timeit."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
