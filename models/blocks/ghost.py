"""Ghost blocks: YOLOv5's form (5x5 cheap operation, halving) and the papers' (GhostNet, V2)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks.conv import SE, Conv, DWConv
from models.blocks.csp import C3
from models.registry import Act, Block, Odd, Positive, Range, Ratio, must_divide, register
from models.spec import round_channels

CHEAP_KERNEL = 5  # YOLOv5's choice; the paper takes 3
SE_DIVISOR = 4  # GhostNet rounds SE's inner width to a multiple of this
DFC_KERNEL = 5  # length of the horizontal and of the vertical convolution
DFC_POOL = 2  # the gate is computed on a map of half the size


@register
class GhostConv(Block):
    """Half of the channels by a convolution, the other half from those by a 5x5 depthwise one.

    (B, c_in, H, W) -> (B, c_out, H', W').  YOLOv5's form of arXiv:1911.11907; c_out must be even.
    """

    def __init__(
        self,
        c_in: int,
        c_out: Positive,
        kernel: Positive = 1,
        stride: Positive = 1,
        groups: Positive = 1,
        act: Act = True,
    ) -> None:
        super().__init__(c_out)
        must_divide(2, c_out=c_out)
        half = c_out // 2
        self.cv1 = Conv(c_in, half, kernel, stride, groups=groups, act=act)
        self.cv2 = Conv(half, half, CHEAP_KERNEL, groups=half, act=act)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv1(x)
        return torch.cat((y, self.cv2(y)), 1)


def _shortcut(c_in: int, c_out: int, kernel: int, stride: int) -> nn.Module:
    """The identity where it fits, else depthwise + 1x1."""
    if stride == 1 and c_in == c_out:
        return nn.Identity()
    return nn.Sequential(
        DWConv(c_in, c_in, kernel, stride, act=False), Conv(c_in, c_out, act=False)
    )


@register
class GhostBottleneck(Block):
    """GhostConv to half, depthwise when strided, GhostConv without activation, plus the shortcut.

    (B, c_in, H, W) -> (B, c_out, H', W').  YOLOv5's form: the shortcut is the identity at stride 1
    (so c_in must equal c_out) and depthwise + 1x1 at stride 2; `kernel` serves stride 2 alone.
    c_out must be a multiple of 4.
    """

    def __init__(
        self, c_in: int, c_out: Positive, kernel: Odd = 3, stride: Literal[1, 2] = 1
    ) -> None:
        super().__init__(c_out)
        must_divide(4, c_out=c_out)
        if stride == 1 and c_in != c_out:
            raise ValueError(f"stride 1 keeps the width, got c_in {c_in} and c_out {c_out}")
        half = c_out // 2
        strided = stride == 2
        self.conv = nn.Sequential(
            GhostConv(c_in, half),
            DWConv(half, half, kernel, stride, act=False) if strided else nn.Identity(),
            GhostConv(half, c_out, act=False),
        )
        self.shortcut = _shortcut(c_in, c_out, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.shortcut(x)


@register
class C3Ghost(C3):
    """C3 whose n inner blocks are GhostBottlenecks: always residual, without groups.

    (B, c_in, H, W) -> (B, c_out, H, W).  `shortcut` and `groups` mean nothing here.
    With h = c_out * expansion, params = 2 h (c_in + 2) + (2 h + 2) c_out + n (h^2 / 2 + 87 h / 4).
    """

    ignores = ("shortcut", "groups")

    def make_unit(self, width: int, shortcut: bool, groups: int) -> nn.Module:
        return GhostBottleneck(width, width)


@register
class GhostModule(Block):
    """ceil(c_out / ratio) channels by a convolution, the rest from those by cheap depthwise ones.

    (B, c_in, H, W) -> (B, c_out, H', W').  Ghost module, arXiv:1911.11907, section 3.1: ratio is
    its s, cheap_kernel its d; BN and `act` in both halves, primary channels first, cut to c_out.
    """

    def __init__(
        self,
        c_in: int,
        c_out: Positive,
        kernel: Positive = 1,
        stride: Positive = 1,
        ratio: Annotated[int, Range(2)] = 2,
        cheap_kernel: Odd = 3,
        act: Act = True,
    ) -> None:
        super().__init__(c_out)
        primary = math.ceil(c_out / ratio)
        self.primary = Conv(c_in, primary, kernel, stride, act=act)
        self.cheap = Conv(primary, primary * (ratio - 1), cheap_kernel, groups=primary, act=act)

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(x)
        return torch.cat((y, self.cheap(y)), 1)[:, : self.c_out]


class DFC(nn.Module):
    """The gate of decoupled fully connected attention: what a pixel's row and column weigh it by.

    (B, c_in, H, W) -> (B, c_out, H, W) in (0, 1).  arXiv:2211.12905, section 4: the fully connected
    layers along a row and a column are a 1x5 and a 5x1 depthwise convolution after a 1x1, with BN
    and without activation, on the 2x2 average-pooled map.  An odd last row or column is left out,
    as in the authors' code; a side of 1, where that code fails, is not pooled.
    """

    def __init__(self, c_in: int, c_out: Positive) -> None:
        super().__init__()
        self.mix = Conv(c_in, c_out, act=False)
        self.horizontal = Conv(c_out, c_out, (1, DFC_KERNEL), groups=c_out, act=False)
        self.vertical = Conv(c_out, c_out, (DFC_KERNEL, 1), groups=c_out, act=False)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        pooled = F.avg_pool2d(x, (min(DFC_POOL, height), min(DFC_POOL, width)))
        gate = self.gate(self.vertical(self.horizontal(self.mix(pooled))))
        return F.interpolate(gate, size=(height, width), mode="nearest")


@register
class GhostUnit(Block):
    """The Ghost bottleneck: module to `hidden`, depthwise when strided, SE, module to c_out.

    (B, c_in, H, W) -> (B, c_out, H', W').  arXiv:1911.11907, section 3.2.  `hidden` is the table's
    exp (2 c_out when None), `se` the SE ratio (0: none).  The shortcut is the identity at stride 1
    with equal widths, else depthwise + 1x1; nothing is activated after the addition.  `kernel`
    serves the strided convolution and the shortcut; cheap operations are always 3x3.  `dfc`
    multiplies the first module's output by DFC of its input (GhostNetV2, arXiv:2211.12905, section
    4).
    """

    channel_args = ("c_out", "hidden")

    def __init__(  # noqa: PLR0913  the arguments of a YAML row
        self,
        c_in: int,
        c_out: Positive,
        kernel: Odd = 3,
        stride: Literal[1, 2] = 1,
        hidden: Positive | None = None,
        se: Ratio = 0.0,
        shortcut: bool = True,
        dfc: bool = False,
        act: Act = True,
    ) -> None:
        super().__init__(c_out)
        width = 2 * c_out if hidden is None else hidden
        self.ghost1 = GhostModule(c_in, width, act=act)
        self.dfc: nn.Module | None = DFC(c_in, width) if dfc else None
        strided = stride == 2
        self.down = DWConv(width, width, kernel, 2, act=False) if strided else nn.Identity()
        reduced = round_channels(width * se, SE_DIVISOR)
        self.se = SE(width, reduced=reduced, act=act, gate="Hardsigmoid") if se else nn.Identity()
        self.ghost2 = GhostModule(width, c_out, act=False)
        self.shortcut: nn.Module | None = None
        if shortcut:
            self.shortcut = _shortcut(c_in, c_out, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ghost1(x)
        if self.dfc is not None:
            y = y * self.dfc(x)
        y = self.ghost2(self.se(self.down(y)))
        return y if self.shortcut is None else y + self.shortcut(x)
