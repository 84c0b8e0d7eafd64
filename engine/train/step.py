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
from engine.train.optimizer import apply_rates, trainable, update_weights
from engine.train.state import NonFiniteError, TrainRun, TrainState
from utils.boxes import Targets
from utils.seeding import generator

READ_EVERY = 10  # steps between readings of a GPU's results; each one waits for the device
MIN_LOSS_SCALE = 1.0  # of fp16: under it 17 updates or more were skipped, and no weight moves
SCALES = (0.5, 1.5)  # of multi-scale training
DRAWN_BATCHES = 3  # train_batch0.jpg to train_batch2.jpg
CONSOLE = ("Epoch", "GPU_mem", "box_loss", "obj_loss", "cls_loss", "Instances", "Size")


class FiniteGuard:
    """Notes on the device which batches had a loss or gradient that is not finite.

    `check` reads the notes, which waits for the device.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._first_bad = torch.full((2,), -1, dtype=torch.int64, device=state.device)
        self._noted: list[tuple[int, tuple[int | str, ...]]] = []

    def note(self, values: Tensor, image_ids: tuple[int | str, ...]) -> None:
        """Remember the batch `state.batches` and its `values`, (2,): as train_step returns them."""
        new = (self._first_bad < 0) & ~torch.isfinite(values)
        self._first_bad = torch.where(new, len(self._noted), self._first_bad)
        self._noted.append((self._state.batches, image_ids))

    def check(self) -> None:
        """Raise NonFiniteError naming the first bad batch since the last check.

        With fp16 the scaler skips an update whose gradient is not finite and lowers its scale; that
        is normal until the scale falls under 1.
        """
        loss, norm = self._first_bad.tolist()
        noted, self._noted = self._noted, []
        self._first_bad = torch.full_like(self._first_bad, -1)
        scaler = self._state.scaler
        skipped = scaler.is_enabled() and scaler.get_scale() >= MIN_LOSS_SCALE
        bad = [index for index in ((loss,) if skipped else (loss, norm)) if index >= 0]
        if not bad:
            return
        index, image_ids = noted[min(bad)]
        what = "loss" if min(bad) == loss else "gradient"
        names = ", ".join(map(str, image_ids[:16])) + (" ..." if len(image_ids) > 16 else "")
        raise NonFiniteError(
            f"the {what} is not finite at epoch {self._state.epoch}, batch {index}, images {names};"
            " stopped without saving: last.pt, if there is one, holds the last good state; try a"
            " lower lr0, a longer warm-up, or --amp off"
        )


def to_network(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> float32 in [0, 1], channels last."""
    return images.to(dtype=torch.float32, memory_format=torch.channels_last).div_(255)


def rescale(
    images: Tensor, targets: Targets, *, stride: int, seed: int, step: int
) -> tuple[Tensor, Targets]:
    """Images, bilinear, and boxes at the size that --multi-scale draws for batch `step`.

    The long side becomes 0.5 to 1.5 times what it is, the other in proportion, both rounded up to
    multiples of `stride`.
    """
    height, width = images.shape[2:]
    long_side = max(height, width)
    low = math.ceil(long_side * SCALES[0] / stride)
    high = max(math.floor(long_side * SCALES[1] / stride), low)
    drawn = int(generator(seed, step).integers(low, high + 1)) * stride
    size = [math.ceil(side * drawn / long_side / stride) * stride for side in (height, width)]
    if size != [height, width]:
        images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    scale = targets.boxes.new_tensor([size[1] / width, size[0] / height] * 2)
    return images, replace(targets, boxes=targets.boxes * scale)


def train_step(run: TrainRun, batch: Batch) -> Tensor:
    """Forward, loss, backward and, when enough batches have come together, an update.

    Returns (2,) the loss and the norm of the update's gradient (0 without update).  Nothing waits
    for the device.
    """
    state, config, world, clock = run.state, run.config, run.world, run.clock
    step = state.epoch * run.schedule.steps_per_epoch + state.batches
    rates = run.schedule.at(step)
    # for layers that draw (dropout): what a step draws does not depend on its past
    torch.manual_seed(int(generator(config.seed, step, world.rank).integers(2**63)))
    batch = batch.to(world.device)
    images, targets = to_network(batch.images), batch.targets
    if config.multi_scale:
        stride = state.model.max_stride
        images, targets = rescale(images, targets, stride=stride, seed=config.seed, step=step)
    clock.end("copy")
    state.pending += 1
    updates = state.pending >= rates.accumulate or step == run.schedule.last_step
    reduce = distributed.all_reduce_sum if world.world_size > 1 else None
    with nullcontext() if updates else run.no_sync():
        with torch.autocast(world.device.type, run.autocast, enabled=run.autocast is not None):
            raw = run.forward(images)
        clock.end("forward")
        loss, parts = run.loss(raw, targets, reduce=reduce, world_size=world.world_size)
        clock.end("loss")
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
    clock.end("optimizer")
    state.losses += parts
    return torch.stack((total, norm))


def train_epoch(run: TrainRun, batches: Iterable[Batch], request: StopRequest) -> bool:
    """Run the epoch's remaining `batches`; False when any rank was asked to stop by its last one.

    The state is then between two steps, the same on all ranks.  Raises NonFiniteError.
    """
    state, world, total = run.state, run.world, run.schedule.steps_per_epoch
    read_every = READ_EVERY if state.device.type == "cuda" else 1
    guard = FiniteGuard(state)
    stopped = False
    asked = time.perf_counter()
    with tqdm(
        total=total, initial=state.batches, dynamic_ncols=True, disable=not world.is_main
    ) as bar:
        for batch in batches:
            run.clock.waited += time.perf_counter() - asked
            run.clock.end("data")
            draw_batch(run, batch)
            guard.note(train_step(run, batch), batch.image_ids)
            state.batches += 1
            bar.update()
            if state.batches % read_every == 0 or state.batches == total:
                guard.check()
                bar.set_description(console_row(run, batch), refresh=False)
                stopped = distributed.any_rank(request.signal != 0, state.device)
                if stopped:
                    break
            asked = time.perf_counter()
    guard.check()
    if state.pending and world.world_size > 1:
        # no backward pass has averaged these; equal ones, which one has, stay as they are
        for parameter in trainable(state.optimizer):
            if parameter.grad is not None:
                mean = distributed.all_reduce_sum(parameter.grad) / world.world_size
                parameter.grad = mean
    return not stopped and state.batches == total


def draw_batch(run: TrainRun, batch: Batch) -> None:
    """Rank 0: train_batch0.jpg to train_batch2.jpg from the run's first batches."""
    index = run.state.batches
    wanted = run.state.epoch == 0 and index < DRAWN_BATCHES
    if wanted and run.world.is_main and not run.config.noplots:
        plot_batch(batch, run.train.names, run.folder / f"train_batch{index}.jpg")


def console_header() -> str:
    """The names of the columns of `console_row`."""
    return ("%11s" * len(CONSOLE)) % CONSOLE


def console_row(run: TrainRun, batch: Batch) -> str:
    """One line under `console_header`: the epoch so far, and the size of its last batch."""
    epoch = f"{run.state.epoch}/{run.schedule.epochs - 1}"
    memory = f"{torch.cuda.max_memory_reserved() / 2**30:.3g}G"
    losses = "".join(f"{value:11.4g}" for value in run.state.mean_losses().tolist())
    size = max(batch.images.shape[2:])
    return f"{epoch:>11s}{memory:>11s}{losses}{len(batch.targets):11d}{size:11d}"
