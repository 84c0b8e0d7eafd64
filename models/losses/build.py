"""The loss of a head, and what every loss is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from models.detector import Detector
from models.heads.anchor import Detect
from models.heads.free import FreeDetect
from models.losses.anchor import AnchorLoss
from models.losses.free import FreeLoss
from utils.boxes import Targets
from utils.hyp import Hyperparameters


class Loss(Protocol):
    """Raw maps and targets -> the loss to differentiate, and its parts."""

    def __call__(
        self,
        raw: Sequence[Tensor],
        targets: Targets,
        *,
        grid: Any = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
        world_size: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """The loss times the batch, and its parts (3,), named in the head, as detached means.

        Under DDP `reduce` sums a tensor over the ranks, so that the averaged gradient is that of
        one process with the whole batch.
        """

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Set what depends on the epoch, from 0 to epochs - 1."""

    def grid(self, images: torch.Size) -> Any:
        """Constants on the head's device for images (B, 3, H, W), which a compiled call needs."""


def build_loss(
    model: Detector, hyp: Hyperparameters, *, image_size: int, label_smoothing: float = 0.0
) -> Loss:
    """The loss of the model's head.  UserError for settings it has no use for."""
    kinds: dict[type, Callable[..., Loss]] = {Detect: AnchorLoss, FreeDetect: FreeLoss}
    kind = kinds[type(model.head)]
    return kind(model, hyp, image_size=image_size, label_smoothing=label_smoothing)
