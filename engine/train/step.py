"""One batch through the model, and one epoch of batches."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from data.loading.plots import plot_batch
from data.loading.sample import Batch
from engine import distributed
from engine.train.interrupts import StopRequest
from engine.train.loading import mosaic_epochs
from engine.train.model import to_network
from engine.train.optimizer import apply_rates, trainable, update_weights
from engine.train.state import NonFiniteError, TrainRun, TrainState
from utils.seeding import generator

READ_EVERY = 10  # steps between readings of a GPU's results; each one waits for the device
MIN_LOSS_SCALE = 1.0  # of fp16: under it 17 updates or more were skipped, and no weight moves
SCALES = (0.5, 1.5)  # of multi-scale training
DRAWN_BATCHES = 3  # train_batch0.jpg to train_batch2.jpg

Noted = list[tuple[int, tuple[int | str, ...], Tensor]]  # batch, its images, what a step returned


def check_finite(state: TrainState, noted: Noted) -> None:
    """Raise NonFiniteError naming the first of the `noted` batches with a bad loss or gradient.

    Waits for the device.  With fp16 the scaler skips an update whose gradient is not finite and
    lowers its scale; that is normal until the scale falls under 1.
    """
    skipped = state.scaler.is_enabled() and state.scaler.get_scale() >= MIN_LOSS_SCALE
    finite = torch.stack([values for _, _, values in noted]).isfinite().tolist()
    for (index, image_ids, _), (loss, norm) in zip(noted, finite, strict=True):
        if not loss or not (norm or skipped):
            names = ", ".join(map(str, image_ids[:16])) + (" ..." if len(image_ids) > 16 else "")
            raise NonFiniteError(
                f"the {'gradient' if loss else 'loss'} is not finite in epoch {state.epoch + 1},"
                f" batch {index + 1}, images {names}; stopped without saving: last.pt, if there is"
                " one, holds the last good state; try a lower lr0, a longer warm-up, or --amp off"
            )


def rescale(batch: Batch, *, stride: int, seed: int, step: int) -> Batch:
    """The batch, its images bilinear, at the size that --multi-scale draws for batch `step`.

    The long side becomes 0.5 to 1.5 times what it is, the other in proportion, both rounded up to
    multiples of `stride`.
    """
    height, width = batch.images.shape[2:]
    long_side = max(height, width)
    low = math.ceil(long_side * SCALES[0] / stride)
    high = max(math.floor(long_side * SCALES[1] / stride), low)
    drawn = int(generator(seed, step).integers(low, high + 1)) * stride
    size = [math.ceil(side * drawn / long_side / stride) * stride for side in (height, width)]
    images, targets = to_network(batch.images), batch.targets
    if size != [height, width]:
        images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    scale = targets.boxes.new_tensor([size[1] / width, size[0] / height] * 2)
    return replace(batch, images=images, targets=replace(targets, boxes=targets.boxes * scale))


def train_step(run: TrainRun, batch: Batch) -> Tensor:
    """Forward, loss, backward and, when enough batches have come together, an update.

    `batch` lies on the device.  Returns (2,) the loss and the norm of the update's gradient (0
    without update).  Nothing waits for the device.
    """
    state, config, world, clock = run.state, run.config, run.world, run.clock
    step = state.epoch * run.schedule.steps_per_epoch + state.batches
    rates = run.schedule.at(step)
    # for layers that draw (dropout): what a step draws does not depend on its past
    torch.manual_seed(int(generator(config.seed, step, world.rank).integers(2**63)))
    state.pending += 1
    updates = state.pending >= rates.accumulate or step == run.schedule.last_step
    with nullcontext() if updates else run.no_sync():
        loss, parts = run.forward_and_loss(batch.images, batch.targets)
        clock.end("forward and loss")
        state.scaler.scale(loss).backward()
    clock.end("backward")
    total = loss.detach()
    norm = torch.zeros_like(total)
    if updates:
        apply_rates(state.optimizer, rates)
        norm = update_weights(state.optimizer, state.scaler, max_norm=config.grad_clip)
        # fp16's scaler has skipped the update where the gradient is not finite
        state.ema.update(torch.isfinite(norm) if state.scaler.is_enabled() else None)
        state.pending = 0
    elif state.pending == 1 and config.compile:
        # the next step's CUDA graph would overwrite them
        for parameter in trainable(state.optimizer):
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()
    clock.end("optimizer")
    state.losses += parts
    return torch.stack((total, norm))


def train_epoch(run: TrainRun, batches: Iterable[Batch], request: StopRequest) -> bool:
    """Run the epoch's remaining `batches`; False when any rank was asked to stop by its last one.

    They lie on the device.  The state is then between two steps, the same on all ranks.  Raises
    NonFiniteError.
    """
    state, world, total = run.state, run.world, run.schedule.steps_per_epoch
    read_every = READ_EVERY if state.device.type == "cuda" else 1
    noted: Noted = []
    stopped = False
    bar = tqdm(total=total, initial=state.batches, dynamic_ncols=True, disable=not world.is_main)
    asked = time.perf_counter()
    with bar:
        for batch in batches:
            run.clock.waited += time.perf_counter() - asked
            run.clock.end("data")
            draw_batch(run, batch)
            if run.config.multi_scale:
                step = state.epoch * total + state.batches
                batch = rescale(
                    batch, stride=state.model.max_stride, seed=run.config.seed, step=step
                )
            noted.append((state.batches, batch.image_ids, train_step(run, batch)))
            state.batches += 1
            bar.update()
            run.emit("on_batch_end")
            if state.batches % read_every == 0 or state.batches == total:
                check_finite(state, noted)
                noted.clear()
                bar.set_description(console_row(run, batch), refresh=False)
                signalled = torch.tensor(float(request.signal != 0), device=state.device)
                stopped = bool(distributed.all_reduce_sum(signalled))
                if stopped:
                    break
            asked = time.perf_counter()
    if state.pending and world.world_size > 1:
        # no backward pass has averaged these; equal ones, which one has, stay as they are
        for parameter in trainable(state.optimizer):
            if parameter.grad is not None:
                mean = distributed.all_reduce_sum(parameter.grad) / world.world_size
                parameter.grad = mean
    return not stopped and state.batches == total


def draw_batch(run: TrainRun, batch: Batch) -> None:
    """Rank 0: train_batch0.jpg to train_batch2.jpg from the run's first batches.

    And train_batch_no_mosaic.jpg from the first one that close_mosaic leaves without mosaics.
    """
    config, epoch, index = run.config, run.state.epoch, run.state.batches
    if config.noplots or not run.world.is_main:
        return
    names = [str(index)] * (epoch == 0 and index < DRAWN_BATCHES)
    if (
        index == 0
        and epoch == mosaic_epochs(config, run.hyp)
        and run.hyp.mosaic
        and not config.rect
    ):
        names.append("_no_mosaic")
    for name in names:
        plot_batch(batch, run.train, run.folder / f"train_batch{name}.jpg")


def console_header(run: TrainRun) -> str:
    """The names of the columns of `console_row`."""
    losses = (f"{name}_loss" for name in run.state.model.head.losses)
    return "".join(f"{name:>11}" for name in ("Epoch", "GPU_mem", *losses, "Instances", "Size"))


def console_row(run: TrainRun, batch: Batch) -> str:
    """One line under `console_header`: the epoch so far, and the size of its last batch."""
    epoch = f"{run.state.epoch + 1}/{run.schedule.epochs}"
    memory = f"{torch.cuda.max_memory_reserved() / 2**30:.3g}G"
    losses = "".join(f"{value:11.4g}" for value in run.state.mean_losses().tolist())
    size = max(batch.images.shape[2:])
    return f"{epoch:>11s}{memory:>11s}{losses}{len(batch.targets):11d}{size:11d}"
