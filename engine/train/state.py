"""Everything a training run is made of between two steps, and its form in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from engine.train.ema import ModelEma
from engine.train.optimizer import load_optimizer, trainable
from models.detector import Detector


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
    losses: Tensor = field(
        default_factory=lambda: torch.zeros(3)
    )  # box, obj, cls summed this epoch
    best_fitness: float = -1.0
    best_epoch: int = -1
    rows: list[dict[str, float]] = field(default_factory=list)  # results.csv

    def start_epoch(self, epoch: int) -> None:
        """Reset what is counted per epoch."""
        self.epoch, self.batches = epoch, 0
        self.losses = torch.zeros(3, device=self.device)

    def mean_losses(self) -> Tensor:
        """(3,) box, obj, cls: the mean over this epoch's batches so far, on the device."""
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
            "epoch": self.epoch,
            "batches": self.batches,
            "pending": self.pending,
            "losses": self.losses,
            "best_fitness": self.best_fitness,
            "best_epoch": self.best_epoch,
            "rows": self.rows,
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
        floats = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
        peaks = torch.stack([tensor.detach().abs().amax().float() for tensor in floats])
        return bool(torch.isfinite(peaks).all())
