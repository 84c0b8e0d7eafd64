"""One-shot aggregation (VoVNet)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, nn

from models.blocks.conv import ESE, Conv, match
from models.registry import Act, Block, Count, Factor, Positive, hidden_width, register

KERNEL = 3


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
                conv = nn.Conv2d(width, width, KERNEL, padding=1, groups=width, bias=False)
                pair = OrderedDict(depthwise=conv, pointwise=Conv(width, width, act=act))
                self.m.append(nn.Sequential(pair))
            elif bottleneck:
                narrow = hidden_width(width, bottleneck)
                self.m.append(
                    nn.Sequential(Conv(c, narrow, act=act), Conv(narrow, width, KERNEL, act=act))
                )
            else:
                self.m.append(Conv(c, width, KERNEL, act=act))
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
