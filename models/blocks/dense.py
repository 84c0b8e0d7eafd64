"""Densely connected layers: DenseNet's stage and transition, PeleeNet's stem and stage."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from models.blocks.conv import Conv, batch_norm, make_activation
from models.registry import Act, Block, Count, Factor, Positive, hidden_width, must_divide, register


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

    channel_args = ("growth",)

    def __init__(
        self,
        c_in: int,
        growth: Positive = 32,
        n: Count = 1,
        bottleneck: Positive = 4,
        act: Act = True,
    ) -> None:
        super().__init__(c_in + n * growth)
        widths = [c_in + index * growth for index in range(n)]
        self.m = nn.Sequential(*(DenseLayer(width, growth, bottleneck, act) for width in widths))


@register
class DenseTransition(Block):
    """BN, activation, 1x1 to c_in * compression, 2x2 average-pooling.

    (B, c_in, H, W) -> (B, int(c_in * compression), H // 2, W // 2).  DenseNet-C's transition,
    arXiv:1608.06993, section 3.  The BN stands before the convolution: fusing leaves it.
    """

    channel_args = ()

    def __init__(self, c_in: int, compression: Factor = 0.5, act: Act = True) -> None:
        super().__init__(hidden_width(c_in, compression))
        self.bn = batch_norm(c_in)
        self.act = make_activation(act)
        self.conv = nn.Conv2d(c_in, self.c_out, 1, bias=False)
        self.pool = nn.AvgPool2d(2)


@register
class PeleeStem(Block):
    """3x3 of stride 2, then max-pooling next to 1x1 + 3x3 of stride 2, concatenated, a 1x1.

    (B, c_in, H, W) -> (B, c_out, ceil(H / 4), ceil(W / 4)).  PeleeNet's stem block,
    arXiv:1804.06882, figure 2.
    """

    def __init__(self, c_in: int, c_out: Positive = 32, act: Act = True) -> None:
        super().__init__(c_out)
        half = hidden_width(c_out, 0.5)
        self.enter = Conv(c_in, c_out, 3, 2, act=act)
        self.branch = nn.Sequential(Conv(c_out, half, act=act), Conv(half, c_out, 3, 2, act=act))
        self.join = Conv(2 * c_out, c_out, act=act)
        # The ceiling matters for odd maps only, where the authors' floor fits no branch.
        self.pool = nn.MaxPool2d(2, 2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x)
        return self.join(torch.cat((self.pool(y), self.branch(y)), 1))


class TwoWayDenseLayer(nn.Module):
    """The input, a 3x3 of it and two 3x3s of it, each after a 1x1, concatenated.

    (B, c_in, H, W) -> (B, c_in + 2 * way, H, W).  arXiv:1804.06882, figure 1, in post-activation
    order (convolution, BN, activation).  The 1x1s have way * bottleneck channels in multiples of 4,
    or c_in / 2 in multiples of 4 where that is less.
    """

    def __init__(self, c_in: int, way: int, bottleneck: int, act: Act) -> None:
        super().__init__()
        inner = way * bottleneck // 4 * 4
        if inner > c_in / 2:
            inner = c_in // 8 * 4
        if inner < 1:
            raise ValueError(
                f"{c_in} channels and a growth of {2 * way} leave none for the 1x1s; "
                "at least 8 of each are needed"
            )
        self.short = nn.Sequential(Conv(c_in, inner, act=act), Conv(inner, way, 3, act=act))
        self.long = nn.Sequential(
            Conv(c_in, inner, act=act), Conv(inner, way, 3, act=act), Conv(way, way, 3, act=act)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.short(x), self.long(x)), 1)


@register
class PeleeStage(Block):
    """n two-way dense layers that add `growth` channels each, then a 1x1.

    (B, c_in, H, W) -> (B, c_out, H, W), or (B, c_out, H // 2, W // 2) with stride 2: 2x2 average
    pooling first, which in arXiv:1804.06882, table 1, ends the transition before.  `n` is the
    row's number of repeats; `growth` must be even.  The paper's 1x1 keeps the width:
    c_out = c_in + n * growth.
    """

    channel_args = ("c_out", "growth")

    def __init__(
        self,
        c_in: int,
        c_out: Positive,
        n: Count = 1,
        growth: Positive = 32,
        bottleneck: Positive = 4,
        stride: Literal[1, 2] = 1,
        act: Act = True,
    ) -> None:
        super().__init__(c_out)
        must_divide(2, growth=growth)  # shared by two ways
        self.pool: nn.Module = nn.AvgPool2d(2, 2) if stride == 2 else nn.Identity()
        layers = (
            TwoWayDenseLayer(c_in + index * growth, growth // 2, bottleneck, act)
            for index in range(n)
        )
        self.m = nn.Sequential(*layers)
        self.transition = Conv(c_in + n * growth, c_out, act=act)
