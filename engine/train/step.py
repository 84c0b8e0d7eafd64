"""One batch through the model, and one epoch of batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from data.loading.sample import Batch
from engine import distributed
from engine.distributed import Distributed
from engine.train.config import TrainConfig
from engine.train.interrupts import StopRequest
from engine.train.optimizer import apply_rates, trainable, update_weights
from engine.train.runlog import console_row
from engine.train.schedule import Schedule
from engine.train.state import TrainState
from models.losses.anchor import AnchorLoss, Losses
from utils.boxes import Targets
from utils.errors import FeatherDetError
from utils.seeding import generator, seed_step

READ_EVERY = 10  # steps between readings of a GPU's results; each one waits for the device
MIN_LOSS_SCALE = 1.0  # of fp16: under it 17 updates or more were skipped, and no weight moves
SCALES = (0.5, 1.5)  # of multi-scale training


class NonFiniteError(FeatherDetError):
    """A loss or gradient is not a number; nothing was saved after it."""


@dataclass(frozen=True)
class StepPlan:
    """How a batch becomes an update; the same for the whole run."""

    forward: Callable[[Tensor], list[Tensor]]  # the model, perhaps compiled or distributed
    loss: AnchorLoss
    schedule: Schedule
    config: TrainConfig
    world: Distributed
    autocast: torch.dtype | None = None  # fp16 or bf16 on CUDA
    # in this context a backward pass leaves its gradients on their rank
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def read_every(self) -> int:
        """Steps between readings of results: on a CPU every step, where reading costs nothing."""
        return READ_EVERY if self.world.device.type == "cuda" else 1


@dataclass
class StepClock:
    """The time of each part of training; without `enabled` it costs nothing.

    `waited` is always kept: the seconds in which this process waited for batches, since it was set
    to 0.  On CUDA the device may still be at work then.
    """

    device: torch.device
    enabled: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    waited: float = 0.0
    _last: float = 0.0

    def start(self) -> None:
        """The first part begins here."""
        if self.enabled:
            self._last = self._now()

    def end(self, part: str) -> None:
        """`part` ends and the next one begins here."""
        if self.enabled:
            now = self._now()
            self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
            self._last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def text(self) -> str:
        """The parts with their seconds and shares."""
        total = max(sum(self.seconds.values()), 1e-9)
        parts = [f"{k} {v:.1f} s ({v / total:.0%})" for k, v in self.seconds.items()]
        return "time: " + ", ".join(parts)


class FiniteGuard:
    """Notes on the device which batches had a loss or gradient that is not finite.

    `check` reads the notes, which waits for the device.
    """

    def __init__(self, device: torch.device, scaler: torch.amp.GradScaler) -> None:
        self._scaler = scaler
        self._first_bad = torch.full((2,), -1, dtype=torch.int64, device=device)
        self._noted: list[tuple[int, int, tuple[int | str, ...]]] = []

    def note(self, values: Tensor, *, epoch: int, batch: Batch, index: int) -> None:
        """Remember a batch and its `values`, (2,): the loss, and the norm of an update or 0."""
        new = (self._first_bad < 0) & ~torch.isfinite(values)
        self._first_bad = torch.where(new, len(self._noted), self._first_bad)
        self._noted.append((epoch, index, batch.image_ids))

    def check(self) -> None:
        """Raise NonFiniteError naming the first bad batch since the last check.

        With fp16 the scaler skips an update whose gradient is not finite and lowers its scale; that
        is normal until the scale falls under 1.
        """
        loss, norm = self._first_bad.tolist()
        noted, self._noted = self._noted, []
        self._first_bad = torch.full_like(self._first_bad, -1)
        skipped = self._scaler.is_enabled() and self._scaler.get_scale() >= MIN_LOSS_SCALE
        bad = [index for index in ((loss,) if skipped else (loss, norm)) if index >= 0]
        if not bad:
            return
        epoch, index, image_ids = noted[min(bad)]
        what = "loss" if min(bad) == loss else "gradient"
        names = ", ".join(map(str, image_ids[:16])) + (" ..." if len(image_ids) > 16 else "")
        raise NonFiniteError(
            f"the {what} is not finite at epoch {epoch}, batch {index}, images {names}; stopped"
            " without saving: last.pt, if there is one, holds the last good state; try a lower lr0,"
            " a longer warm-up, or --amp off"
        )


def to_network(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> float32 in [0, 1], channels last."""
    return images.to(dtype=torch.float32, memory_format=torch.channels_last).div_(255)


def rescale(images: Tensor, targets: Targets, size: tuple[int, int]) -> tuple[Tensor, Targets]:
    """Images resized to `size` (height, width), bilinear, and the boxes with them."""
    height, width = images.shape[2:]
    if (height, width) == size:
        return images, targets
    scale = targets.boxes.new_tensor([size[1] / width, size[0] / height] * 2)
    resized = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    return resized, Targets(targets.image_index, targets.labels, targets.boxes * scale)


def drawn_size(shape: tuple[int, int], *, stride: int, seed: int, step: int) -> tuple[int, int]:
    """The (height, width) of batch `step` with --multi-scale, multiples of `stride`.

    The long side is 0.5 to 1.5 times that of `shape`, the other in proportion, rounded up.
    """
    long_side = max(shape)
    low = math.ceil(long_side * SCALES[0] / stride)
    high = max(math.floor(long_side * SCALES[1] / stride), low)
    drawn = int(generator(seed, step).integers(low, high + 1)) * stride
    height, width = (math.ceil(side * drawn / long_side / stride) * stride for side in shape)
    return height, width


def train_step(
    state: TrainState, plan: StepPlan, batch: Batch, clock: StepClock
) -> tuple[Losses, Tensor]:
    """Forward, loss, backward and, when enough batches have come together, an update.

    Returns the losses, and (2,) the loss and the norm of the update's gradient (0 without update).
    Nothing waits for the device.
    """
    step = state.epoch * plan.schedule.steps_per_epoch + state.batches
    rates = plan.schedule.at(step)
    config, world = plan.config, plan.world
    seed_step(config.seed, step, world.rank)  # for layers that draw: dropout
    batch = batch.to(world.device)
    images, targets = to_network(batch.images), batch.targets
    if config.multi_scale:
        height, width = images.shape[2:]
        stride = state.model.max_stride
        size = drawn_size((height, width), stride=stride, seed=config.seed, step=step)
        images, targets = rescale(images, targets, size)
    clock.end("copy")
    state.pending += 1
    updates = state.pending >= rates.accumulate or step == plan.schedule.last_step
    reduce = distributed.all_reduce_sum if world.world_size > 1 else None
    with nullcontext() if updates else plan.no_sync():
        with torch.autocast(world.device.type, plan.autocast, enabled=plan.autocast is not None):
            raw = plan.forward(images)
        clock.end("forward")
        losses = plan.loss(raw, targets, reduce=reduce, world_size=world.world_size)
        clock.end("loss")
        state.scaler.scale(losses.total).backward()
    clock.end("backward")
    total = losses.total.detach()
    norm = torch.zeros_like(total)
    if updates:
        apply_rates(state.optimizer, rates)
        norm = update_weights(state.optimizer, state.scaler, max_norm=config.grad_clip)
        # fp16's scaler has skipped the update where the gradient is not finite
        state.ema.update(torch.isfinite(norm) if state.scaler.is_enabled() else None)
        state.pending = 0
    clock.end("optimizer")
    return losses, torch.stack((total, norm))


def train_epoch(
    state: TrainState,
    plan: StepPlan,
    batches: Iterable[Batch],
    *,
    request: StopRequest,
    clock: StepClock,
    on_batch: Callable[[int, Batch], None] | None = None,
    progress: bool = True,
) -> bool:
    """Run the epoch's remaining `batches`; False when any rank was asked to stop by its last one.

    The state is then between two steps, the same on all ranks.  Raises NonFiniteError.
    """
    guard = FiniteGuard(state.device, state.scaler)
    stopped = False
    total = plan.schedule.steps_per_epoch
    bar = tqdm(total=total, initial=state.batches, dynamic_ncols=True, disable=not progress)
    clock.start()
    with bar:
        for batch in _timed(batches, clock):
            if on_batch is not None:
                on_batch(state.batches, batch)
            losses, watched = train_step(state, plan, batch, clock)
            guard.note(watched, epoch=state.epoch, batch=batch, index=state.batches)
            state.losses += torch.stack((losses.box, losses.obj, losses.cls))
            state.batches += 1
            bar.update()
            if state.batches % plan.read_every == 0 or state.batches == total:
                guard.check()
                bar.set_description(_row(state, plan, batch), refresh=False)
                stopped = distributed.any_rank(request.signal != 0, state.device)
                if stopped:
                    break
    guard.check()
    if state.pending and plan.world.world_size > 1:
        average_gradients(trainable(state.optimizer), plan.world.world_size)
    return not stopped and state.batches == total


def average_gradients(parameters: Iterable[Tensor], world_size: int) -> None:
    """Give every rank the mean of the gradients that no backward pass has averaged yet.

    So rank 0 can save them for all; the average of equal gradients changes nothing.
    """
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = distributed.all_reduce_sum(parameter.grad) / world_size


def _timed(batches: Iterable[Batch], clock: StepClock) -> Iterator[Batch]:
    asked = time.perf_counter()
    for batch in batches:
        clock.waited += time.perf_counter() - asked
        clock.end("data")
        yield batch
        asked = time.perf_counter()


def _row(state: TrainState, plan: StepPlan, batch: Batch) -> str:
    memory = "0G"
    if state.device.type == "cuda":
        memory = f"{torch.cuda.max_memory_reserved(state.device) / 2**30:.3g}G"
    return console_row(
        f"{state.epoch}/{plan.schedule.epochs - 1}",
        memory,
        state.mean_losses().tolist(),
        instances=len(batch.targets),
        size=max(batch.images.shape[2:]),
    )
