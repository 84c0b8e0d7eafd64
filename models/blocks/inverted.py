"""Inverted residuals of MobileNetV2 and V3: 1x1 to more channels, depthwise, SE, 1x1 to fewer."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from models.arguments import Act, Factor, Odd, Positive, Ratio, hidden_width
from models.blocks.attention import SE
from models.blocks.conv import Conv
from models.registry import Block, register
from models.spec import round_channels

SE_DIVISOR = 8  # MobileNetV3 rounds SE's inner width to a multiple of this


@register
class InvertedResidual(Block):
    """1x1 expansion, depthwise kernel x kernel, SE, 1x1 without activation, plus the input.

    (B, c_in, H, W) -> (B, c_out, ceil(H / stride), ceil(W / stride)).  arXiv:1801.04381, section
    3.3; with `se` the form of MobileNetV3, arXiv:1905.02244, section 5.3: after the activation, of
    inner width hidden * se in multiples of 8, ReLU inside, hard-sigmoid gate.  The inner width is
    `hidden` where given, else c_in * expand; where it equals c_in there is no expansion.  The input
    is added with stride 1, c_in == c_out and `shortcut`.
    """

    channel_args: ClassVar[tuple[str, ...]] = ("c_out", "hidden")

    def __init__(  # noqa: PLR0913  the arguments of a YAML row
        self,
        c_in: int,
        c_out: Positive,
        kernel: Odd = 3,
        stride: Positive = 1,
        expand: Factor = 6,
        hidden: Positive | None = None,
        se: Ratio = 0.0,
        shortcut: bool = True,
        act: Act = True,
    ) -> None:
        super().__init__()
        width = hidden_width(c_in, expand) if hidden is None else hidden
        self.c_out = c_out
        self.expand: nn.Module = nn.Identity() if width == c_in else Conv(c_in, width, act=act)
        self.depthwise = Conv(width, width, kernel, stride, groups=width, act=act)
        self.se: nn.Module = nn.Identity()
        if se:
            reduced = min(round_channels(width * se, SE_DIVISOR), width)
            self.se = SE(width, reduced=reduced, act="ReLU", gate="Hardsigmoid")
        self.project = Conv(width, c_out, act=False)
        self.add = shortcut and stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.se(self.depthwise(self.expand(x))))
        return x + y if self.add else y
