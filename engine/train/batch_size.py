"""How many images fit on a GPU: measured, not guessed."""

from __future__ import annotations

import copy

import torch

from models.detector import Detector
from models.losses.anchor import AnchorLoss
from utils.boxes import Targets
from utils.errors import UserError
from utils.terminal import say

DEFAULT_BATCH = 16  # on a CPU
SHARE = 0.85  # of the free memory; the rest is for validation, fragments and crowded batches
BOXES_PER_IMAGE = 40  # of the trial batches
MAX_BATCH = 1024
STATE_COPIES = 3  # momentum, a second moment and the moving average, which the trial lacks


def largest_batch(
    model: Detector,
    loss: AnchorLoss,
    *,
    image_size: int,
    device: torch.device,
    autocast: torch.dtype | None,
) -> int:
    """Images per step that use `SHARE` of the free memory of a GPU, at most 1024; 16 on a CPU.

    Doubles a trial batch until memory runs out or is used up, then interpolates memory over batch
    linearly.  The model's state is left as it was.  UserError when one image is too much.
    """
    if device.type != "cuda":
        say(f"--batch-size -1 measures GPU memory; on a CPU the batch is {DEFAULT_BATCH}")
        return DEFAULT_BATCH
    trial = copy.deepcopy(model).train()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    budget = free * SHARE - STATE_COPIES * weights
    used: dict[int, int] = {}
    batch = 1
    while batch <= MAX_BATCH:
        try:
            used[batch] = _step_memory(
                trial, loss, batch=batch, size=image_size, device=device, autocast=autocast
            )
        except torch.OutOfMemoryError:
            break
        finally:
            trial.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        if used[batch] > budget:
            break
        batch *= 2
    fitting = batch_on_line(used, budget)
    if fitting < 1:
        raise UserError(
            f"--batch-size -1: not even one image of {image_size} px fits into the"
            f" {free / 2**30:.1f} GiB free on {device}; try a smaller --imgsz"
        )
    say(f"--batch-size -1: {fitting} images use {SHARE:.0%} of {free / 2**30:.1f} GiB free")
    return fitting


def batch_on_line(used: dict[int, int], budget: float) -> int:
    """The batch whose memory meets `budget` on the line through the two largest trials.

    `used` is bytes by batch.  0 when not even the first trial fits; never more than twice the
    largest trial, nor more than `MAX_BATCH`.
    """
    batches = sorted(used)
    if not batches or used[batches[0]] > budget:
        return 0
    if len(batches) == 1:
        return batches[0]
    below, above = batches[-2:]
    slope = (used[above] - used[below]) / (above - below)
    if slope <= 0:
        return min(above, MAX_BATCH)
    fitting = int(below + (budget - used[below]) / slope)
    return max(min(fitting, 2 * above, MAX_BATCH), 1)


def _step_memory(
    model: Detector,
    loss: AnchorLoss,
    *,
    batch: int,
    size: int,
    device: torch.device,
    autocast: torch.dtype | None,
) -> int:
    """Peak bytes of one forward and backward pass."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    images = torch.zeros(batch, 3, size, size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    index = torch.arange(batch, device=device).repeat_interleave(BOXES_PER_IMAGE)
    corners = torch.tensor([0.25, 0.25, 0.5, 0.5], device=device) * size
    labels = torch.zeros_like(index)
    targets = Targets(index, labels, corners.expand(len(index), 4))
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        raw = model(images)
    loss(raw, targets).total.backward()
    return torch.cuda.max_memory_reserved(device) - before
