"""Optimizers with YOLOv5's three parameter groups, and one update of the weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from engine.train.schedule import Rates
from utils.hyp import Hyperparameters

GROUPS = ("biases", "weights", "norms")  # also the order of x/lr0, x/lr1, x/lr2 in results.csv
SCALE = "lr_scale"  # of a group


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters by group; decay belongs on `weights` alone.

    Biases by name; a tensor of one axis (a normalisation's weight, a scale) counts as a norm.
    """
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.rpartition(".")[2] == "bias":
            groups["biases"].append(parameter)
        elif parameter.ndim <= 1:
            groups["norms"].append(parameter)
        else:
            groups["weights"].append(parameter)
    return groups


def build_optimizer(
    model: nn.Module,
    name: str,
    hyp: Hyperparameters,
    *,
    weight_decay: float,
    scales: Mapping[nn.Parameter, float] | None = None,
) -> Optimizer:
    """SGD with Nesterov momentum, Adam or AdamW (momentum is beta1) over three groups.

    `weight_decay` acts on the group `weights` only.  `scales` multiply the rate of single
    parameters (1 where none is given); every scale but 1 adds three groups behind the first three.
    The fused kernels do the whole update in one pass.  Raises ValueError for another name.
    """
    scales = scales or {}
    groups = [
        {
            "params": [item for item in parameters if scales.get(item, 1.0) == scale],
            "weight_decay": weight_decay if kind == "weights" else 0.0,
            SCALE: scale,
        }
        for scale in (1.0, *sorted(set(scales.values()) - {1.0}))
        for kind, parameters in parameter_groups(model).items()
    ]
    if name == "SGD":
        momentum = hyp.momentum
        sgd = SGD(groups, lr=hyp.lr0, momentum=momentum, nesterov=momentum > 0, fused=True)
        if momentum > 0:
            # The fused kernel leaves new buffers unwritten when fp16's first update overflows; from
            # zero the first momentum is the gradient, as without a buffer.
            for parameter in trainable(sgd):
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    if name in {"Adam", "AdamW"}:
        kind = Adam if name == "Adam" else AdamW
        return kind(groups, lr=hyp.lr0, betas=(hyp.momentum, 0.999), fused=True)
    raise ValueError(f"unknown optimizer {name!r}")


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


def trainable(optimizer: Optimizer) -> list[Tensor]:
    """All parameters the optimizer moves, in a fixed order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def gradients(parameters: Iterable[Tensor]) -> list[Tensor | None]:
    """The gradients at hand, None where there is none."""
    return [parameter.grad for parameter in parameters]
