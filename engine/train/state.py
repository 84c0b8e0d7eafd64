"""A training run: what stays as it is, what changes between two steps, and its form in last.pt."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from data.index.records import DataIndex
from data.loading.device import DeviceImages
from data.loading.loader import TrainLoader, ValLoader
from engine.distributed import Distributed
from engine.train.config import TrainConfig
from engine.train.ema import ModelEma
from engine.train.optimizer import Schedule, load_optimizer, trainable
from models.detector import Detector
from models.losses.build import Loss
from utils.boxes import Targets
from utils.errors import FeatherDetError
from utils.hyp import Hyperparameters

PLAIN = ("epoch", "batches", "pending", "losses", "best_fitness", "best_epoch", "rows")


class NonFiniteError(FeatherDetError):
    """A loss, gradient or weight is not a number; nothing was saved after it."""


@dataclass
class TrainState:
    """What changes while training; all of it goes into last.pt, so that a resumed run is exact.

    Order and augmentation of the data depend on (seed, epoch, index) alone, and torch's generators
    are seeded by (seed, step): no random state needs saving.
    """

    model: Detector
    ema: ModelEma[Detector]
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    epoch: int = 0
    batches: int = 0  # of this epoch that are done
    pending: int = 0  # batches whose gradients wait for an update
    losses: Tensor = field(init=False)  # the parts of the loss, summed this epoch
    best_fitness: float = -1.0
    best_epoch: int = -1
    rows: list[dict[str, float]] = field(default_factory=list)  # results.csv

    def __post_init__(self) -> None:
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Reset what is counted per epoch."""
        self.epoch, self.batches = epoch, 0
        self.losses = torch.zeros(3, device=self.device)

    def mean_losses(self) -> Tensor:
        """(3,) the parts of the loss: the mean over this epoch's batches so far, on the device."""
        return self.losses / max(self.batches, 1)

    def to_dict(self) -> dict[str, Any]:
        """Tensors and plain values; nothing is copied, so save it before the next step."""
        gradients = [parameter.grad for parameter in trainable(self.optimizer)]
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "gradients": gradients if self.pending else None,
            **{name: getattr(self, name) for name in PLAIN},
        }

    def load_dict(self, saved: Mapping[str, Any], *, epochs: int, steps: int) -> None:
        """The inverse of `to_dict`, for a run of `epochs` epochs of `steps` batches.

        Raises an error of any kind when a value is missing, or has another type or size.
        """
        self.model.load_state_dict(saved["model"])
        self.ema.load_state_dict(saved["ema"])
        load_optimizer(self.optimizer, saved["optimizer"])
        if saved["scaler"]:  # empty where the run was saved without fp16
            self.scaler.load_state_dict(saved["scaler"])
        for name, limit in (("epoch", epochs), ("batches", steps), ("pending", epochs * steps)):
            if type(saved[name]) is not int or not 0 <= saved[name] <= limit:
                raise ValueError(f"{name} is {saved[name]!r}, expected 0 to {limit}")
            setattr(self, name, saved[name])
        self.best_fitness, self.best_epoch = float(saved["best_fitness"]), int(saved["best_epoch"])
        self.losses = saved["losses"].to(self.device).reshape(3)
        self.rows = [{str(k): float(v) for k, v in row.items()} for row in saved["rows"]]
        if bool(saved["scaler"]) != self.scaler.is_enabled():
            self.pending = 0  # gradients of another scale cannot be added to
        elif self.pending:
            parameters = trainable(self.optimizer)
            for parameter, gradient in zip(parameters, saved["gradients"], strict=True):
                # the memory order travels with the tensor: a norm sums in that order
                parameter.grad = None if gradient is None else gradient.to(parameter.device)

    def all_finite(self) -> bool:
        """Whether every weight, statistic and average is a number; waits for the device."""
        tensors = [*self.model.state_dict().values(), *self.ema.tensors()]
        return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


class StepClock:
    """Seconds of each part of training, kept when `enabled`: then it waits for the device.

    `waited` is always kept: the seconds since `start` in which this process waited for batches.
    """

    def __init__(self, device: torch.device, enabled: bool = False) -> None:
        self.device, self.enabled = device, enabled
        self.seconds: dict[str, float] = defaultdict(float)
        self.start()

    def start(self) -> None:
        """The first part begins here."""
        self.waited = 0.0
        self._last = time.perf_counter()

    def end(self, part: str) -> None:
        """`part` ends and the next one begins here."""
        if self.enabled:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            now = time.perf_counter()
            self.seconds[part] += now - self._last
            self._last = now

    def text(self) -> str:
        """The parts with their seconds and shares."""
        total = max(sum(self.seconds.values()), 1e-9)
        parts = [f"{k} {v:.1f} s ({v / total:.0%})" for k, v in self.seconds.items()]
        return "time: " + ", ".join(parts)


@dataclass(frozen=True)
class TrainRun:
    """A run that is ready to start; only `state` and `clock` change from here on."""

    config: TrainConfig
    hyp: Hyperparameters
    world: Distributed
    folder: Path
    train: DataIndex
    val: DataIndex
    loader: TrainLoader
    val_loader: ValLoader
    device_images: DeviceImages | None  # where the device composes the images
    # ForwardAndLoss, perhaps compiled and distributed
    forward_and_loss: Callable[[Tensor, Targets], tuple[Tensor, Tensor]]
    loss: Loss  # of forward_and_loss
    # in this context a backward pass leaves its gradients on their rank
    no_sync: Callable[[], AbstractContextManager[None]]
    schedule: Schedule
    autocast: torch.dtype | None  # fp16 or bf16 on CUDA
    state: TrainState
    clock: StepClock
    data_info: dict[str, Any]  # what a resumed run must find unchanged, and the number of ranks
    environment: dict[str, Any]  # versions and device, as plain values
    callbacks: Sequence[object] = ()  # engine/train/writers.py

    def emit(self, event: str, *values: object) -> None:
        """On rank 0, tell the callbacks that have a method of this name."""
        if self.world.is_main:
            for callback in self.callbacks:
                if method := getattr(callback, event, None):
                    method(self, *values)
