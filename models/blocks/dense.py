"""Concatenated layers: of DenseNet and PeleeNet at each one, of VoVNet (one-shot) at the end."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, nn

from models.blocks.conv import ESE, Conv, batch_norm, make_activation, match
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


@register
class OSA(Block):
    """n 3x3 convolutions of `width` in a chain, input and all outputs concatenated once, a 1x1.

    (B, c_in, H, W) -> (B, c_out, H, W).  One-shot aggregation, arXiv:1904.09730, section 3.2.
    `width` is c_out // 2 when None.  `bottleneck` > 0 puts a 1x1 of bottleneck * width before each
    3x3 (the paper's table 3); `depthwise` makes each 3x3 separable, after a 1x1 to `width` where
    c_in differs.  `ese` (arXiv:1911.06667) gates the result, `identity` then adds the input, which
    needs c_in == c_out.  `n` is the row's number of repeats.
    """

    channel_args = ("c_out", "width")

    def __init__(  # noqa: PLR0913  the arguments of a YAML row
        self,
        c_in: int,
        c_out: Positive,
        n: Count = 5,
        width: Positive | None = None,
        bottleneck: Factor = 0.0,
        depthwise: bool = False,
        identity: bool = False,
        ese: bool = False,
        act: Act = True,
    ) -> None:
        super().__init__(c_out)
        width = hidden_width(c_out, 0.5) if width is None else width
        if bottleneck and depthwise:
            raise ValueError(f"bottleneck must be 0 with depthwise, got {bottleneck}")
        if identity and c_in != c_out:
            raise ValueError(f"identity needs c_in == c_out, got {c_in} and {c_out}")
        self.identity = identity
        self.reduce = match(c_in, width, act) if depthwise else nn.Identity()
        self.m = nn.ModuleList()
        for c in [c_in] + [width] * (n - 1):
            if depthwise:  # without BN or activation between the two, as in VoVNetV2-19-dw
                conv = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
                pair = OrderedDict(depthwise=conv, pointwise=Conv(width, width, act=act))
                self.m.append(nn.Sequential(pair))
            elif bottleneck:
                narrow = hidden_width(width, bottleneck)
                self.m.append(
                    nn.Sequential(Conv(c, narrow, act=act), Conv(narrow, width, 3, act=act))
                )
            else:
                self.m.append(Conv(c, width, 3, act=act))
        self.aggregate = Conv(c_in + n * width, c_out, act=act)
        self.ese: nn.Module = ESE(c_out) if ese else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        y = self.reduce(x)
        for conv in self.m:
            y = conv(y)
            maps.append(y)
        y = self.ese(self.aggregate(torch.cat(maps, 1)))
        return x + y if self.identity else y


@register
class OSAStage(Block):
    """Replaces C3 by one OSA of n 3x3 convolutions; a 1x1 first where the widths differ.

    (B, c_in, H, W) -> (B, c_out, H, W).  Each convolution has c_out * expansion channels.
    `shortcut` adds the stage's (entered) input, as VoVNetV2's identity (arXiv:1911.06667);
    `bottleneck`, `depthwise` and `ese` are OSA's.  With c = c_out, h = c * expansion: params =
    [c_in != c] (c_in + 2) c + 9 c h + 2 h + (n - 1) (9 h^2 + 2 h) + (c + n h + 2) c.
    """

    ignores = ("groups",)

    def __init__(  # noqa: PLR0913  the arguments of a YAML row
        self,
        c_in: int,
        c_out: Positive,
        n: Count = 1,
        shortcut: bool = True,
        expansion: Factor = 0.5,
        depthwise: bool = False,
        ese: bool = False,
        bottleneck: Factor = 0.0,
        act: Act = True,
    ) -> None:
        super().__init__(c_out)
        self.enter = match(c_in, c_out, act)
        width = hidden_width(c_out, expansion)
        self.osa = OSA(c_out, c_out, n, width, bottleneck, depthwise, shortcut, ese, act)


@register
class VoVStage(Block):
    """n OSA modules in a row: a stage of VoVNet, without the pooling before it.

    (B, c_in, H, W) -> (B, c_out, H, W).  The first module makes c_out of c_in, the others keep it;
    each has `layers` 3x3 convolutions of `width` (c_out // 2 when None).  VoVNet, arXiv:1904.09730,
    table 1; `bottleneck` is OSA's.  `identity` adds its input to every module but the first, and
    `ese` gates the `last` module (timm), `every` one (the authors' code) or `none`: VoVNetV2,
    arXiv:1911.06667, section 3.2.
    """

    channel_args = ("c_out", "width")

    def __init__(  # noqa: PLR0913  the arguments of a YAML row
        self,
        c_in: int,
        c_out: Positive,
        n: Count = 1,
        width: Positive | None = None,
        layers: Count = 5,
        identity: bool = False,
        ese: Literal["none", "last", "every"] = "none",
        bottleneck: Factor = 0.0,
        act: Act = True,
    ) -> None:
        super().__init__(c_out)
        self.m = nn.Sequential()
        for index in range(n):
            gated = ese == "every" or (ese == "last" and index == n - 1)
            added = identity and index > 0
            self.m.append(OSA(c_in, c_out, layers, width, bottleneck, False, added, gated, act))
            c_in = c_out
