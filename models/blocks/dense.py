"""DenseNet's parts: a stage of densely connected layers, and the transition between stages."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.arguments import Act, Count, Factor, Positive, hidden_width
from models.blocks.conv import Conv, batch_norm, make_activation
from models.registry import Block, register


class DenseLayer(nn.Module):
    """The input, and `growth` new channels of it: BN, act, 1x1, BN, act, 3x3; concatenated.

    (B, c_in, H, W) -> (B, c_in + growth, H, W).  The 1x1 has bottleneck * growth channels.  Only
    the second BN follows a convolution: the first cannot be folded.
    """

    def __init__(self, c_in: int, growth: int, bottleneck: int, act: Act) -> None:
        super().__init__()
        self.bn = batch_norm(c_in)
        self.act = make_activation(act)
        self.reduce = Conv(c_in, bottleneck * growth, act=act)
        self.grow = nn.Conv2d(bottleneck * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.grow(self.reduce(self.act(self.bn(x))))), 1)


@register
class DenseStage(Block):
    """n dense layers, each of which reads everything before it and adds `growth` channels.

    (B, c_in, H, W) -> (B, c_in + n * growth, H, W).  `n` is the row's number of repeats.  The dense
    block of DenseNet-B, arXiv:1608.06993, section 3.
    """

    channel_args: ClassVar[tuple[str, ...]] = ("growth",)

    def __init__(
        self,
        c_in: int,
        growth: Positive = 32,
        n: Count = 1,
        bottleneck: Positive = 4,
        act: Act = True,
    ) -> None:
        super().__init__()
        self.c_out = c_in + n * growth
        self.m = nn.Sequential(
            *(DenseLayer(c_in + i * growth, growth, bottleneck, act) for i in range(n))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.m(x)


@register
class DenseTransition(Block):
    """BN, activation, 1x1 to c_in * compression, 2x2 average-pooling.

    (B, c_in, H, W) -> (B, int(c_in * compression), H // 2, W // 2).  The transition layer of
    DenseNet-C, arXiv:1608.06993, section 3.  The BN stands before the convolution and stays when
    fusing.
    """

    channel_args: ClassVar[tuple[str, ...]] = ()

    def __init__(self, c_in: int, compression: Factor = 0.5, act: Act = True) -> None:
        super().__init__()
        self.c_out = hidden_width(c_in, compression)
        self.bn = batch_norm(c_in)
        self.act = make_activation(act)
        self.conv = nn.Conv2d(c_in, self.c_out, 1, bias=False)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(self.act(self.bn(x))))
