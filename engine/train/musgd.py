"""MuSGD: Muon's orthogonal steps on weights, mixed with those of SGD."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

MUON, SGD = 0.5, 0.5  # shares of the two steps
SCALE = 0.2  # of an orthogonal step, times the root of the longer side: about the size of Adam's
ROUNDS = 5
A, B, C = 3.4445, -4.7750, 2.0315  # of the polynomial in each round
EPS = 1e-7


class MuSGD(Optimizer):
    """m = momentum * m + g; n = g + momentum * m (Nesterov).

    Tensors of two axes or more, as matrices (first axis, rest), move by
    lr * (MUON * SCALE * sqrt(longer side) * orthogonalised(n) + SGD * n), others by lr * n.  Weight
    decay is decoupled: w *= 1 - lr * decay.  Muon: Jordan et al. 2024, the scale
    arXiv:2502.16982, section 2.2.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        weight_decay: float = 0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; `closure` is not used."""
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not moved:
                continue
            for parameter in moved:
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            gradients = [parameter.grad for parameter in moved]
            buffers = [self.state[parameter]["momentum_buffer"] for parameter in moved]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, gradients)
            steps = torch._foreach_add(gradients, buffers, alpha=group["momentum"])
            matrices = [step for step in steps if step.ndim > 1]
            if matrices:
                orthogonal = orthogonalised(matrices, fill=matrices[0].is_cuda)
                scales = [MUON * SCALE * max(_matrix(x).shape) ** 0.5 for x in matrices]
                torch._foreach_mul_(orthogonal, scales)
                torch._foreach_mul_(matrices, SGD)
                torch._foreach_add_(matrices, orthogonal)
            if group["weight_decay"]:
                torch._foreach_mul_(moved, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(moved, steps, alpha=-group["lr"])


def orthogonalised(tensors: Sequence[Tensor], *, fill: bool) -> list[Tensor]:
    """Each as a matrix (first axis, rest) with all singular values near 1, in its own shape.

    Newton-Schulz in float32.  Matrices of one shape run together; with `fill` those of one shorter
    side, filled up with columns of zeros, which stay zero: more arithmetic, but a third of the
    operators, for whose launches a small network on a GPU waits.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    wide = []
    for index, tensor in enumerate(tensors):
        matrix = _matrix(tensor)
        wide.append(matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix)
        groups.setdefault(tuple(wide[-1].shape[: 1 if fill else 2]), []).append(index)
    found = list(tensors)
    for indices in groups.values():
        width = max(wide[index].shape[1] for index in indices)
        x = torch.stack([F.pad(wide[i], (0, width - wide[i].shape[1])) for i in indices]).float()
        x = x / (x.norm(dim=(1, 2), keepdim=True) + EPS)
        for _ in range(ROUNDS):
            square = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=B, alpha=C), x, beta=A)
        for index, y in zip(indices, x, strict=True):
            tensor = tensors[index]
            y = y[:, : wide[index].shape[1]]
            y = y.mT if wide[index].shape != _matrix(tensor).shape else y
            found[index] = y.reshape(tensor.shape)
    return found


def _matrix(tensor: Tensor) -> Tensor:
    """(first axis, rest)."""
    return tensor.flatten(1)
