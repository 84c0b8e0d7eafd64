"""Mixed depthwise convolution (MixNet)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks.conv import SE, Conv, batch_norm, fold, make_activation, match
from models.registry import Act, Block, Count, Factor, Odd, Positive, Ratio, hidden_width, register

MAX_MERGED = 7  # kernel; a larger one multiplies by more zeros than cutting and joining maps costs


@register
class MixConv(Block):
    """Depthwise convolution with another kernel size for each part of the channels, BN, activation.

    (B, c_in, H, W) -> (B, c_in, H', W').  arXiv:1907.09595, section 3.1; parts are equal but for
    the remainder, which the first one gets.  Kernels must be odd.  Fused, kernels up to MAX_MERGED
    become one convolution of the largest.
    """

    def __init__(
        self,
        c_in: int,
        kernels: Sequence[Odd] = (3, 5),
        stride: Positive = 1,
        act: Act = True,
    ) -> None:
        super().__init__(c_in)
        if len(kernels) > c_in:
            raise ValueError(f"{len(kernels)} kernels for {c_in} channels")
        share, others = c_in // len(kernels), len(kernels) - 1
        self.widths = [c_in - share * others] + [share] * others
        self.convs: Any = nn.ModuleList(
            nn.Conv2d(width, width, kernel, stride, kernel // 2, groups=width, bias=False)
            for width, kernel in zip(self.widths, kernels, strict=True)
        )
        self.conv: Any = None  # all of them as one, once fused
        self.bn: nn.Module = batch_norm(c_in)
        self.act = make_activation(act)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            return self.act(self.conv(x))
        parts = x.split(self.widths, 1)
        mixed = [conv(part) for conv, part in zip(self.convs, parts, strict=True)]
        return self.act(self.bn(torch.cat(mixed, 1)))

    def fuse_(self) -> None:
        if isinstance(self.bn, nn.BatchNorm2d):
            fold(self.convs, self.bn)
            self.bn = nn.Identity()
            if max(conv.kernel_size[0] for conv in self.convs) <= MAX_MERGED:
                self.conv, self.convs = _merged(self.convs), nn.ModuleList()


def _merged(parts: Any) -> nn.Conv2d:
    """One depthwise convolution for several side by side: their kernels, padded with zeros."""
    kernel, width = max(part.kernel_size[0] for part in parts), sum(p.out_channels for p in parts)
    weights = [F.pad(part.weight, [(kernel - part.kernel_size[0]) // 2] * 4) for part in parts]
    stride, bias = parts[0].stride, torch.cat([part.bias for part in parts])
    merged = nn.Conv2d(width, width, kernel, stride, kernel // 2, groups=width, device="meta")
    merged.weight, merged.bias = nn.Parameter(torch.cat(weights)), nn.Parameter(bias)
    return merged


@register
class MixConv2d(Block):
    """Convolutions of several kernel sizes side by side, each of the whole input; BN, activation.

    (B, c_in, H, W) -> (B, c_out, ceil(H / stride), ceil(W / stride)).  YOLOv5's form of
    arXiv:1907.09595: each has gcd(c_in, own c_out) groups.  The parts are equally wide, or with
    `equal_ch` false as wide as makes width * kernel^2 equal.
    """

    def __init__(
        self,
        c_in: int,
        c_out: Positive,
        kernels: Sequence[Odd] = (1, 3),
        stride: Positive = 1,
        equal_ch: bool = True,
        act: Act = True,
    ) -> None:
        super().__init__(c_out)
        n, total = len(kernels), sum(kernel**-2 for kernel in kernels)
        if equal_ch:  # where n * i / (c_out - 1), for channel i, passes a whole number
            ends = [0, *(part * (c_out - 1) // n + 1 for part in range(1, n)), c_out]
            widths = [end - start for start, end in itertools.pairwise(ends)]
        else:
            widths = [round(c_out * kernel**-2 / total) for kernel in kernels]
            widths[0] += c_out - sum(widths)  # rounding
        if min(widths) < 1:
            raise ValueError(f"{c_out} channels are too few for the kernels {tuple(kernels)}")
        self.m = nn.ModuleList(
            nn.Conv2d(
                c_in, width, kernel, stride, kernel // 2, groups=math.gcd(c_in, width), bias=False
            )
            for kernel, width in zip(kernels, widths, strict=True)
        )
        self.bn: nn.Module = batch_norm(c_out)
        self.act = make_activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(torch.cat([conv(x) for conv in self.m], 1)))

    def fuse_(self) -> None:
        if isinstance(self.bn, nn.BatchNorm2d):
            fold(self.m, self.bn)
            self.bn = nn.Identity()


@register
class MixConvBlock(Block):
    """1x1 expansion, MixConv, SE, 1x1 projection without activation, plus the input if it fits.

    (B, c_in, H, W) -> (B, c_out, H', W').  MixNet's block, arXiv:1907.09595, section 3.3.
    `expand` 1 leaves the expansion out; expand_groups and project_groups group the 1x1
    convolutions; SE's inner width is int(c_in * se), of the block's own input (0: none).  The input
    is added with stride 1, c_in == c_out and `shortcut`.
    """

    def __init__(  # noqa: PLR0913  the arguments of a YAML row
        self,
        c_in: int,
        c_out: Positive,
        kernels: Sequence[Odd] = (3,),
        stride: Positive = 1,
        expand: Factor = 6,
        se: Ratio = 0.0,
        expand_groups: Positive = 1,
        project_groups: Positive = 1,
        shortcut: bool = True,
        act: Act = True,
    ) -> None:
        super().__init__(c_out)
        width = hidden_width(c_in, expand)
        self.expand: nn.Module = nn.Identity()
        if expand != 1:
            self.expand = Conv(c_in, width, groups=expand_groups, act=act)
        self.mix = MixConv(width, kernels, stride, act)
        self.se = SE(width, reduced=hidden_width(c_in, se), act=act) if se else nn.Identity()
        self.project = Conv(width, c_out, groups=project_groups, act=False)
        self.add = shortcut and stride == 1 and c_in == c_out


@register
class MixStage(Block):
    """Replaces C3 by n MixNet blocks; a 1x1 first where the widths differ.

    (B, c_in, H, W) -> (B, c_out, H, W).  The blocks are those of MixNet-S at 80 channels (kernels
    3 and 5, projection in two groups, SE 0.25), but expand 1.5 times, not 6: more would cost more
    than the C3 it replaces.  With c = c_out, w = c * expand, r = int(c * se), even halves: params =
    [c_in != c] (c_in + 2) c + n (3 c w / 2 + 22 w + 2 c + 2 r w + r).
    """

    ignores = ("groups", "expansion")

    def __init__(
        self,
        c_in: int,
        c_out: Positive,
        n: Count = 1,
        shortcut: bool = True,
        kernels: Sequence[Odd] = (3, 5),
        expand: Factor = 1.5,
        se: Ratio = 0.25,
        act: Act = True,
    ) -> None:
        super().__init__(c_out)
        self.enter = match(c_in, c_out, act)
        same = partial(MixConvBlock, expand=expand, se=se, project_groups=2, act=act)
        blocks = (same(c_out, c_out, kernels, shortcut=shortcut) for _ in range(n))
        self.m = nn.Sequential(*blocks)
