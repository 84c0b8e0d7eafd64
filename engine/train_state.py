"""Everything a training run is made of between two steps, and its form in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from engine.ema import ModelEma
from engine.optimizer import gradients, trainable
from models.detector import Detector
from utils.errors import UserError


@dataclass
class TrainState:
    """What changes while training; all of it goes into last.pt, so that a resumed run is exact.

    Order and augmentation of the data depend on (seed, epoch, index) alone and need no state.
    """

    model: Detector
    ema: ModelEma[Detector]
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    epoch: int = 0
    batches: int = 0  # of this epoch that are done
    pending: int = 0  # batches whose gradients wait for an update
    losses: Tensor = field(default_factory=lambda: torch.zeros(3))  # box, obj, cls summed this epoch
    instances: int = 0  # boxes seen this epoch
    best_fitness: float = -1.0
    best_epoch: int = -1
    rows: list[dict[str, float]] = field(default_factory=list)  # results.csv

    def start_epoch(self, epoch: int) -> None:
        """Reset what is counted per epoch."""
        self.epoch, self.batches, self.instances = epoch, 0, 0
        self.losses = torch.zeros(3, device=self.device)

    def mean_losses(self) -> Tensor:
        """(3,) box, obj, cls: the mean over this epoch's batches so far, on the device."""
        return self.losses / max(self.batches, 1)

    def to_dict(self) -> dict[str, Any]:
        """Tensors and plain values; nothing is copied, so save it before the next step."""
        waiting = self.pending > 0
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "gradients": gradients(trainable(self.optimizer)) if waiting else None,
            "epoch": self.epoch,
            "batches": self.batches,
            "pending": self.pending,
            "losses": self.losses,
            "instances": self.instances,
            "best_fitness": self.best_fitness,
            "best_epoch": self.best_epoch,
            "rows": self.rows,
            "rng": random_state(),
        }

    def load_dict(self, saved: Mapping[str, Any]) -> None:
        """The inverse of `to_dict`. UserError when the model or optimizer does not fit."""
        try:
            self.model.load_state_dict(saved["model"])
            self.ema.load_state_dict(saved["ema"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
        except (KeyError, RuntimeError, ValueError) as error:
            cause = str(error).splitlines()[0]
            raise UserError(f"the run cannot be resumed with this model: {cause}") from error
        for name in ("epoch", "batches", "pending", "instances", "best_fitness", "best_epoch"):
            setattr(self, name, saved[name])
        self.losses = saved["losses"].to(self.device)
        self.rows = [dict(row) for row in saved["rows"]]
        if saved["gradients"] is not None:
            parameters = trainable(self.optimizer)
            for parameter, gradient in zip(parameters, saved["gradients"], strict=True):
                parameter.grad = None if gradient is None else _like(gradient, parameter)
        restore_random_state(saved["rng"])

    def all_finite(self) -> bool:
        """Whether every weight, statistic and average is a number; waits for the device."""
        tensors = [
            *self.model.state_dict().values(),
            *self.ema.tensors(),
        ]
        floats = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
        largest = torch.stack([tensor.detach().abs().amax().float() for tensor in floats])
        return bool(torch.isfinite(largest).all())


def _like(saved: Tensor, parameter: Tensor) -> Tensor:
    """`saved` on the parameter's device, in its own memory order: a norm sums in that order."""
    return saved.to(parameter.device)


def random_state() -> dict[str, Any]:
    """The states of torch's generators (layers with dropout draw from them)."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` returned; GPUs that are not here any more are skipped."""
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for index, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(value.cpu(), index)
