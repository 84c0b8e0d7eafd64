"""DenseNet's parts: a stage of densely connected layers, and the transition between stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.blocks.checks import hidden_width, require_positive
from models.blocks.conv import Block, Conv, batch_norm, make_activation
from models.registry import register

GROWTH = 32  # k of DenseNet-121, -169 and -201
COMPRESSION = 0.5  # theta of DenseNet-BC


class DenseLayer(nn.Module):
    """The input, and `growth` new channels of it: BN, act, 1x1, BN, act, 3x3; concatenated.

    (B, c_in, H, W) -> (B, c_in + growth, H, W).  The 1x1 has bottleneck * growth channels.  Only
    the second BN follows a convolution: the first cannot be folded.
    """

    def __init__(self, c_in: int, growth: int, bottleneck: int, act: str | bool) -> None:
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
        growth: int = GROWTH,
        n: int = 1,
        bottleneck: int = 4,
        act: str | bool = True,
    ) -> None:
        super().__init__()
        require_positive("DenseStage", c_in=c_in, growth=growth, n=n, bottleneck=bottleneck)
        self.c_out = c_in + n * growth
        self.m = nn.Sequential(
            *(DenseLayer(c_in + i * growth, growth, bottleneck, act) for i in range(n))
        )

    @classmethod
    def width_out(cls, c_in: int | list[int], args: Mapping[str, Any]) -> int:
        assert isinstance(c_in, int)
        growth = args.get("growth", GROWTH)
        require_positive("DenseStage", growth=growth)
        return c_in + int(growth) * int(args.get("n", 1))

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

    def __init__(self, c_in: int, compression: float = COMPRESSION, act: str | bool = True) -> None:
        super().__init__()
        require_positive("DenseTransition", c_in=c_in)
        self.c_out = hidden_width("DenseTransition", c_in, compression)
        self.bn = batch_norm(c_in)
        self.act = make_activation(act)
        self.conv = nn.Conv2d(c_in, self.c_out, 1, bias=False)
        self.pool = nn.AvgPool2d(2)

    @classmethod
    def width_out(cls, c_in: int | list[int], args: Mapping[str, Any]) -> int:
        assert isinstance(c_in, int)
        return hidden_width("DenseTransition", c_in, args.get("compression", COMPRESSION))

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(self.act(self.bn(x))))
