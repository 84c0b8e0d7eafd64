"""Which rows are trained, at which rate in which step, in YOLOv5's groups; and one update."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from engine.train.musgd import MuSGD
from models.detector import Detector
from models.spec import SECTIONS, ModelSpec
from utils.errors import UserError, nearest
from utils.hyp import Hyperparameters

BIASES, WEIGHTS, NORMS = range(3)  # the groups, as x/lr0, x/lr1, x/lr2 in results.csv
SCALE = "lr_scale"  # of a group
ADAPTIVE = ("Adam", "AdamW")
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

    With `cosine` or hyp.cosine the decay is a cosine over the last epochs, whose share of all is
    hyp.cosine (1 without it); before them the rate is lr0 (RTMDet, arXiv:2212.07784, table 8).

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
        share = self.hyp.cosine or float(self.cosine)
        if share:
            done = max(done - (1 - share), 0) / share
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


def freeze(model: Detector, items: Sequence[str]) -> None:
    """Stop training the rows that `--freeze` means, and their batch statistics.

    One number N: the first N rows, as in YOLOv5; several: these very rows; a section (backbone,
    neck, head) or a row's name: those rows.  UserError for a row that does not exist.  Call it
    after `model.train()`.
    """
    count = len(model.layers)
    if len(items) == 1 and items[0].isdigit():
        if int(items[0]) > count:
            raise UserError(f"--freeze {items[0]}: the model has only {count} rows")
        items = [str(row) for row in range(int(items[0]))]
    for item in items:
        for row in _rows_named(model.spec, item, "--freeze"):
            model.layers[row].requires_grad_(False).eval()
    if items and not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("--freeze: every row is frozen, nothing is left to train")


def _rows_named(spec: ModelSpec, item: str, flag: str) -> list[int]:
    """The rows of a section, of a name or of a number, ascending. UserError when there is none."""
    found = [
        index
        for index, layer in enumerate(spec.layers)
        if item in {layer.section, layer.name, str(index)}
    ]
    if not found:
        known = [*SECTIONS, *(layer.name for layer in spec.layers if layer.name)]
        raise UserError(
            f"{flag} {item}: neither a row (0 to {len(spec.layers) - 1}) nor a name;"
            f" known names: {', '.join(known)}{nearest(item, known)}"
        )
    return found


def rate_scales(model: Detector, items: Sequence[str]) -> dict[nn.Parameter, float]:
    """The factors by which `--lr-scale NAME=FACTOR ...` multiplies the rates of parameters.

    NAME is a section (backbone, neck, head), a row's name or its number; where two name a row, the
    later one counts.  UserError for a row that does not exist, or a factor that is not positive.
    """
    scales: dict[nn.Parameter, float] = {}
    for item in items:
        name, _, text = item.partition("=")
        try:
            factor = float(text)
        except ValueError:
            factor = math.nan
        if not (name and 0 < factor < math.inf):
            hint = f"; to leave rows untrained use --freeze {name}" if factor == 0 else ""
            raise UserError(
                f"--lr-scale {item}: expected NAME=FACTOR with a positive factor, e.g."
                f" backbone=0.1{hint}"
            )
        for row in _rows_named(model.spec, name, "--lr-scale"):
            scales.update(dict.fromkeys(model.layers[row].parameters(), factor))
    return scales


def build_optimizer(
    model: nn.Module,
    name: str,
    hyp: Hyperparameters,
    *,
    weight_decay: float,
    scales: Mapping[nn.Parameter, float] | None = None,
) -> Optimizer:
    """SGD with Nesterov momentum, MuSGD, Adam or AdamW (momentum is beta1) over three groups.

    biases (by name), weights, on which alone `weight_decay` acts, and norms (any other tensor of
    one axis).  `scales` multiply the rate of single parameters (1 where none is given); every scale
    but 1 adds three groups after the first three.  The fused kernels do the whole update in one
    pass.
    """
    scales = scales or {}
    ordered = (1.0, *sorted(set(scales.values()) - {1.0}))
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay if kind == WEIGHTS else 0.0, SCALE: scale}
        for scale in ordered
        for kind in range(3)
    ]
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            bias = key.rpartition(".")[2] == "bias"
            kind = BIASES if bias else NORMS if parameter.ndim <= 1 else WEIGHTS
            first = 3 * ordered.index(scales.get(parameter, 1.0))
            groups[first + kind]["params"].append(parameter)
    if name == "MuSGD":
        return MuSGD(groups, lr=hyp.lr0, momentum=hyp.momentum)
    if name in ADAPTIVE:
        adaptive = {"Adam": Adam, "AdamW": AdamW}[name]
        return adaptive(groups, lr=hyp.lr0, betas=(hyp.momentum, 0.999), fused=True)
    momentum = hyp.momentum
    sgd = SGD(groups, lr=hyp.lr0, momentum=momentum, nesterov=momentum > 0, fused=True)
    if momentum > 0:
        # The fused kernel leaves new buffers unwritten when fp16's first update overflows; from
        # zero the first momentum is the gradient, as without a buffer.
        for moved in trainable(sgd):
            sgd.state[moved]["momentum_buffer"] = torch.zeros_like(moved)
    return sgd


def apply_rates(optimizer: Optimizer, rates: Rates) -> None:
    """Set the rates of all groups for the next update, each times the group's scale."""
    for group, rate in zip(optimizer.param_groups, itertools.cycle(rates.lr), strict=False):
        group["lr"] = rate * group.get(SCALE, 1.0)  # older checkpoints bring groups without one
        if "momentum" in group:
            group["momentum"] = rates.momentum
        else:
            group["betas"] = (rates.momentum, group["betas"][1])


def update_weights(
    optimizer: Optimizer, scaler: torch.amp.GradScaler, *, max_norm: float
) -> Tensor:
    """Unscale, clip to `max_norm` (0: no clip), step, clear the gradients.

    Returns the gradient's norm before the clip, a 0-dim tensor on the device.  With fp16 a
    non-finite norm makes the scaler skip the step and lower its scale.
    """
    scaler.unscale_(optimizer)
    limit = max_norm if max_norm > 0 else float("inf")
    norm = nn.utils.clip_grad_norm_(trainable(optimizer), limit)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Restore a `state_dict`; ValueError when it has other groups or tensors of another shape.

    The weight decay stays the present one: a run with more epochs may accumulate more batches.
    """
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    for parameter, buffers in optimizer.state.items():
        for name, buffer in buffers.items():
            if buffer.ndim and buffer.shape != parameter.shape:
                raise ValueError(f"{name} has the shape {tuple(buffer.shape)}")


def trainable(optimizer: Optimizer) -> list[Tensor]:
    """All parameters the optimizer moves, in a fixed order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
