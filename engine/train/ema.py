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

    decay(n) = 0.9999 (1 - exp(-n / 2000)) at update n, from 1.  Integer state (batch counters) is
    copied.  The tensors are paired once: the model must stay on its device and in its memory
    format.  An update is one operator by type of tensor, and never waits for the device.
    """

    def __init__(self, model: M) -> None:
        self.model: M = copy.deepcopy(model).eval()
        self.model.requires_grad_(False)
        # (averages, values) by dtype
        self._pairs: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        values = model.state_dict()
        for name, average in self.model.state_dict().items():
            pair = self._pairs.setdefault(average.dtype, ([], []))
            pair[0].append(average)
            pair[1].append(values[name])
        device = next(model.parameters()).device
        self._calls = 0  # updates, and those of fp16 that were skipped
        # counted exactly; Apple's GPUs, which have no float64, skip none
        kind = torch.float32 if device.type == "mps" else torch.float64
        self._skipped = torch.zeros((), dtype=kind, device=device)

    @property
    def updates(self) -> int:
        """How many updates went in; waits for the device."""
        return self._calls - int(self._skipped)

    @torch.no_grad()
    def update(self, taken: Tensor | None = None) -> None:
        """Average in the model's present state, in place.

        `taken`, with fp16: a 0-dim bool tensor; False leaves the average and the number of updates
        as they are.
        """
        self._calls += 1
        weight: float | Tensor = 1 - DECAY * (1 - math.exp(self._calls / -RAMP))
        if taken is not None:
            self._skipped += ~taken
            updates = self._calls - self._skipped
            weight = (1 - DECAY * (1 - torch.exp(updates / -RAMP))) * taken
        for dtype, (averages, values) in self._pairs.items():
            if not dtype.is_floating_point:
                torch._foreach_copy_(averages, values)
            elif isinstance(weight, float):
                torch._foreach_lerp_(averages, values, weight)
            else:
                difference = torch._foreach_sub(values, averages)
                torch._foreach_mul_(difference, weight.to(dtype))
                torch._foreach_add_(averages, difference)

    def tensors(self) -> list[Tensor]:
        """All tensors of the average, for a broadcast."""
        return list(self.model.state_dict().values())

    def state_dict(self) -> dict[str, Any]:
        """The average and the number of updates."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; raises RuntimeError when names or shapes differ."""
        self.model.load_state_dict(state["model"])
        self._calls = state["updates"]
        self._skipped.zero_()
