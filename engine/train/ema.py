"""An exponential moving average of a model: the weights that are validated and saved."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

DECAY = 0.9999
RAMP = 2000.0  # updates; early on the average follows the model closely


class ModelEma(Generic[M]):
    """All floating state of `model` (weights and statistics) averaged over updates.

    decay(n) = 0.9999 (1 - exp(-n / 2000)).  Whole-number state (batch counters) is copied.
    The tensors are paired once: the model must stay on its device and in its memory format.
    """

    def __init__(self, model: M) -> None:
        self.model: M = copy.deepcopy(model).eval()
        self.model.requires_grad_(False)
        self.updates = 0
        self._follow(model)

    def _follow(self, model: M) -> None:
        """Pair the tensors once: a step then is a few calls for the whole model."""
        ours, theirs = self.model.state_dict(), model.state_dict()
        self._floats: list[tuple[list[Tensor], list[Tensor]]] = []
        by_kind: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
        self._counters: list[tuple[Tensor, Tensor]] = []
        for name, average in ours.items():
            if average.is_floating_point():
                pair = by_kind.setdefault((average.dtype, average.device), ([], []))
                pair[0].append(average)
                pair[1].append(theirs[name])
            else:
                self._counters.append((average, theirs[name]))
        self._floats = list(by_kind.values())

    @staticmethod
    def decay(updates: int) -> float:
        """The weight of the old average at update number `updates` (from 1)."""
        return DECAY * (1 - math.exp(-updates / RAMP))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model's present state (in place, no copies)."""
        self.updates += 1
        weight = 1 - self.decay(self.updates)
        for averages, values in self._floats:
            torch._foreach_lerp_(averages, values, weight)
        for average, value in self._counters:
            average.copy_(value)

    def tensors(self) -> list[Tensor]:
        """All tensors of the average, for a broadcast."""
        return list(self.model.state_dict().values())

    def state_dict(self) -> dict[str, Any]:
        """The average and the number of updates."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; raises RuntimeError when names or shapes differ."""
        self.model.load_state_dict(state["model"])
        self.updates = int(state["updates"])
