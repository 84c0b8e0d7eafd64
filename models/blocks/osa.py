"""One-shot aggregation (VoVNet)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.blocks.attention import ESE
from models.blocks.checks import hidden_width, require_flag, require_positive
from models.blocks.conv import Block, Conv
from models.registry import register

KERNEL = 3
ESE_MODULES = ("none", "last", "every")


class SeparableConv(nn.Module):
    """Depthwise 3x3 without BN or activation, then a 1x1 with both: VoVNetV2-19-dw's convolution.

    (B, width, H, W) -> (B, width, H, W).
    """

    def __init__(self, width: int, act: str | bool) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            width, width, KERNEL, padding=KERNEL // 2, groups=width, bias=False
        )
        self.pointwise = Conv(width, width, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


@register
class OSA(Block):
    """n 3x3 convolutions of `width` in a chain, input and all outputs concatenated once, a 1x1.

    (B, c_in, H, W) -> (B, c_out, H, W).  One-shot aggregation, arXiv:1904.09730, section 3.2.
    `width` is c_out // 2 when None.  `bottleneck` > 0 puts a 1x1 of bottleneck * width before each
    3x3 (the paper's table 3); `depthwise` makes each 3x3 separable, after a 1x1 to `width` where
    c_in differs.  `ese` (arXiv:1911.06667) gates the result, `identity` then adds the input, which
    needs c_in == c_out.  `n` is the row's number of repeats.
    """

    channel_args: ClassVar[tuple[str, ...]] = ("c_out", "width")

    def __init__(  # noqa: PLR0913  the arguments of a YAML row
        self,
        c_in: int,
        c_out: int,
        n: int = 5,
        width: int | None = None,
        bottleneck: float = 0.0,
        depthwise: bool = False,
        identity: bool = False,
        ese: bool = False,
        act: str | bool = True,
    ) -> None:
        super().__init__()
        width = hidden_width("OSA", c_out, 0.5) if width is None else width
        require_positive("OSA", c_in=c_in, c_out=c_out, n=n, width=width)
        require_flag("OSA", depthwise=depthwise, identity=identity, ese=ese)
        if bottleneck < 0 or (bottleneck and depthwise):
            raise ValueError(
                "OSA: bottleneck must be at least 0, and 0 with depthwise; "
                f"got {bottleneck} with depthwise={depthwise}"
            )
        if identity and c_in != c_out:
            raise ValueError(f"OSA: identity needs c_in == c_out, got {c_in} and {c_out}")
        self.c_out = c_out
        self.identity = identity
        self.reduce: nn.Module = nn.Identity()
        if depthwise:
            if c_in != width:
                self.reduce = Conv(c_in, width, act=act)
            self.m = nn.ModuleList(SeparableConv(width, act) for _ in range(n))
        else:
            inputs = [c_in] + [width] * (n - 1)
            self.m = nn.ModuleList(_chain(c, width, bottleneck, act) for c in inputs)
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


def _chain(c_in: int, width: int, bottleneck: float, act: str | bool) -> nn.Module:
    if not bottleneck:
        return Conv(c_in, width, KERNEL, act=act)
    narrow = hidden_width("OSA", width, bottleneck)
    return nn.Sequential(Conv(c_in, narrow, act=act), Conv(narrow, width, KERNEL, act=act))


@register
class OSAStage(Block):
    """A C3's place taken by one OSA of n 3x3 convolutions; a 1x1 first where the widths differ.

    (B, c_in, H, W) -> (B, c_out, H, W).  Each convolution has c_out * expansion channels.
    `shortcut` adds the stage's (entered) input, as VoVNetV2's identity (arXiv:1911.06667);
    `bottleneck`, `depthwise` and `ese` are OSA's.  With c = c_out, h = c * expansion: params =
    [c_in != c] (c_in + 2) c + 9 c h + 2 h + (n - 1) (9 h^2 + 2 h) + (c + n h + 2) c.
    """

    ignores: ClassVar[tuple[str, ...]] = ("groups",)

    def __init__(  # noqa: PLR0913  the arguments of a YAML row
        self,
        c_in: int,
        c_out: int,
        n: int = 1,
        shortcut: bool = True,
        expansion: float = 0.5,
        depthwise: bool = False,
        ese: bool = False,
        bottleneck: float = 0.0,
        act: str | bool = True,
    ) -> None:
        super().__init__()
        require_flag("OSAStage", shortcut=shortcut)
        self.c_out = c_out
        self.enter: nn.Module = nn.Identity() if c_in == c_out else Conv(c_in, c_out, act=act)
        self.osa = OSA(
            c_out,
            c_out,
            n,
            hidden_width("OSAStage", c_out, expansion),
            bottleneck=bottleneck,
            depthwise=depthwise,
            identity=shortcut,
            ese=ese,
            act=act,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.osa(self.enter(x))


@register
class VoVStage(Block):
    """n OSA modules in a row: a stage of VoVNet, without the pooling before it.

    (B, c_in, H, W) -> (B, c_out, H, W).  The first module makes c_out of c_in, the others keep it;
    each has `layers` 3x3 convolutions of `width` (c_out // 2 when None).  VoVNet, arXiv:1904.09730,
    table 1; `bottleneck` is OSA's.  `identity` adds its input to every module but the first, and
    `ese` gates the `last` module (timm), `every` one (the authors' code) or `none`: VoVNetV2,
    arXiv:1911.06667, section 3.2.  ValueError for any other word.
    """

    channel_args: ClassVar[tuple[str, ...]] = ("c_out", "width")

    def __init__(  # noqa: PLR0913  the arguments of a YAML row
        self,
        c_in: int,
        c_out: int,
        n: int = 1,
        width: int | None = None,
        layers: int = 5,
        identity: bool = False,
        ese: str = "none",
        bottleneck: float = 0.0,
        act: str | bool = True,
    ) -> None:
        super().__init__()
        require_positive("VoVStage", c_in=c_in, c_out=c_out, n=n, layers=layers)
        require_flag("VoVStage", identity=identity)
        if ese not in ESE_MODULES:
            raise ValueError(f"VoVStage: ese must be one of {', '.join(ESE_MODULES)}, got {ese!r}")
        self.c_out = c_out
        self.m = nn.Sequential(
            *(
                OSA(
                    c_out if index else c_in,
                    c_out,
                    layers,
                    width,
                    bottleneck=bottleneck,
                    identity=identity and index > 0,
                    ese=ese == "every" or (ese == "last" and index == n - 1),
                    act=act,
                )
                for index in range(n)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.m(x)
