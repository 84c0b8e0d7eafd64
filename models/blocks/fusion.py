"""Fusion of maps of one size by addition, with weights that are learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks.conv import Block
from models.registry import register

EPSILON = 1e-4  # the paper's; keeps the quotient finite where all weights are 0


@register
class WeightedSum(Block):
    """The mean of several maps with one learnt weight each: sum w_i x_i / (epsilon + sum w_j).

    List of (B, c, H, W) -> (B, c, H, W); widths and sizes must agree.  Weights are ReLU of the
    parameter and start equal.  Fast normalized fusion of BiFPN, arXiv:1911.09070, section 3.3.
    """

    reads_several: ClassVar[bool] = True

    def __init__(self, c_in: Sequence[int]) -> None:
        super().__init__()
        if not isinstance(c_in, Sequence) or len(c_in) < 2:
            raise ValueError(f"WeightedSum needs at least two maps, got the widths {c_in!r}")
        if len(set(c_in)) != 1:
            raise ValueError(
                f"WeightedSum adds maps of equal width, got {list(c_in)}; put a 1x1 Conv before"
            )
        self.c_out = c_in[0]
        self.weight = nn.Parameter(torch.ones(len(c_in)))

    @classmethod
    def width_out(cls, c_in: int | list[int], args: Mapping[str, Any]) -> int:
        return c_in[0] if isinstance(c_in, list) else c_in

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        positive = F.relu(self.weight)
        weights = [positive[index] for index in range(len(maps))]
        shares = [weight / (sum(weights) + EPSILON) for weight in weights]
        first, *others = (feature * share for feature, share in zip(maps, shares, strict=True))
        return sum(others, first)
