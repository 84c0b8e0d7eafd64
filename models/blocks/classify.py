"""The end of an image classifier: what follows a backbone's last stage."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from models.arguments import Act, Positive, Ratio
from models.blocks.conv import Conv, batch_norm, make_activation
from models.registry import Block, register


@register
class HeadConv(Conv):
    """A Conv whose width no multiplier touches: the last 1x1 of many papers.

    (B, c_in, H, W) -> (B, c_out, H', W').
    """

    channel_args: ClassVar[tuple[str, ...]] = ()


@register
class GlobalPool(Block):
    """The mean of each channel: (B, c_in, H, W) -> (B, c_in, 1, 1)."""

    def __init__(self, c_in: int) -> None:
        super().__init__()
        self.c_out = c_in

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


@register
class Linear(Block):
    """Dropout, a linear layer, an activation: (B, c_in) or (B, c_in, 1, 1) -> (B, c_out).

    No multiplier touches its width.
    """

    channel_args: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        c_in: int,
        c_out: Positive,
        act: Act = False,
        bias: bool = True,
        dropout: Ratio = 0.0,
    ) -> None:
        super().__init__()
        self.c_out = c_out
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.linear = nn.Linear(c_in, c_out, bias)
        self.act = make_activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(self.dropout(x.flatten(1))))


@register
class NormAct(Block):
    """BN and activation without a convolution: (B, c_in, H, W) -> (B, c_in, H, W)."""

    def __init__(self, c_in: int, act: Act = True) -> None:
        super().__init__()
        self.c_out = c_in
        self.bn = batch_norm(c_in)
        self.act = make_activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(x))
