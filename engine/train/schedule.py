"""Learning rate, momentum and accumulation as pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from utils.hyp import Hyperparameters

MIN_WARMUP_STEPS = 100  # YOLOv5's floor for small data sets


@dataclass(frozen=True)
class Rates:
    """What one step uses."""

    lr: tuple[float, float, float]  # biases, weights, normalisation weights
    momentum: float
    accumulate: int  # batches whose gradients add up to one update


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then linear or cosine decay per epoch from lr0 to lr0 * lrf.

    `batch_size` is the total over ranks.  `step` counts batches from 0 over the whole run.
    `adaptive` optimizers (Adam, AdamW) take steps of the size of the rate whatever the gradient, so
    their biases do not start above lr0.
    """

    hyp: Hyperparameters
    epochs: int
    steps_per_epoch: int
    batch_size: int
    cosine: bool = False
    adaptive: bool = False

    @property
    def warmup_steps(self) -> int:
        """max(warm-up epochs, 100 batches); none with warmup_epochs 0."""
        if self.hyp.warmup_epochs == 0:
            return 0
        return max(round(self.hyp.warmup_epochs * self.steps_per_epoch), MIN_WARMUP_STEPS)

    @property
    def nominal_batch(self) -> float:
        """hyp.nbs; fewer images, at least one batch, in a run too short for hyp.min_updates."""
        if not self.hyp.min_updates:
            return self.hyp.nbs
        batches = (self.last_step + 1) // self.hyp.min_updates
        return min(self.hyp.nbs, max(batches, 1) * self.batch_size)

    @property
    def accumulate(self) -> int:
        """Batches per update after the warm-up: the nominal batch over the batch, at least 1."""
        return max(round(self.nominal_batch / self.batch_size), 1)

    @property
    def weight_decay(self) -> float:
        """The decay scaled by the images of an update over the nominal batch."""
        return self.hyp.weight_decay * self.batch_size * self.accumulate / self.nominal_batch

    def shortened(self) -> str:
        """What hyp.min_updates makes of the nominal batch, as text."""
        return (
            f"an update for every {self.accumulate * self.batch_size} images instead of"
            f" {self.hyp.nbs:g} (nbs), so that {self.last_step + 1} batches make"
            f" {(self.last_step + 1) // self.accumulate} updates (min_updates"
            f" {self.hyp.min_updates:g}; 0 in the --hyp file switches this off)"
        )

    @property
    def last_step(self) -> int:
        """The number of the last batch of the run."""
        return self.epochs * self.steps_per_epoch - 1

    def factor(self, epoch: int) -> float:
        """The learning rate of `epoch` (from 0) as a share of lr0, without warm-up."""
        lrf, done = self.hyp.lrf, epoch / self.epochs
        if self.cosine:
            return lrf + (1 - lrf) * (1 + math.cos(math.pi * done)) / 2
        return lrf + (1 - lrf) * (1 - done)

    def at(self, step: int) -> Rates:
        """The rates of batch `step`."""
        hyp = self.hyp
        peak = hyp.lr0 * self.factor(step // self.steps_per_epoch)
        if step >= self.warmup_steps:
            return Rates((peak, peak, peak), hyp.momentum, self.accumulate)
        done = step / self.warmup_steps
        bias_start = min(hyp.warmup_bias_lr, hyp.lr0) if self.adaptive else hyp.warmup_bias_lr
        accumulate = 1 + (self.nominal_batch / self.batch_size - 1) * done
        return Rates(
            (bias_start + (peak - bias_start) * done, peak * done, peak * done),
            hyp.warmup_momentum + (hyp.momentum - hyp.warmup_momentum) * done,
            max(round(accumulate), 1),
        )
