"""Residual units: ResNet's two, and the inverted one of MobileNetV2 and V3.

ResNet's shortcut is the identity, or a 1x1 projection (arXiv:1512.03385, option B).
"""

from __future__ import annotations

from torch import Tensor, nn

from models.blocks.conv import SE, Conv, make_activation, match
from models.registry import Act, Block, Factor, Odd, Positive, Ratio, hidden_width, register
from models.spec import round_channels

SE_DIVISOR = 8  # MobileNetV3 rounds SE's inner width to a multiple of this


@register
class ResidualBasic(Block):
    """act(3x3 (3x3 x) + shortcut x), BN after each convolution.

    (B, c_in, H, W) -> (B, c_out, ceil(H / stride), ceil(W / stride)).  The first 3x3 has the
    stride.  ResNet-18's and -34's unit, arXiv:1512.03385, figure 5 left.
    """

    def __init__(self, c_in: int, c_out: Positive, stride: Positive = 1, act: Act = True) -> None:
        super().__init__(c_out)
        self.cv1 = Conv(c_in, c_out, 3, stride, act=act)
        self.cv2 = Conv(c_out, c_out, 3, act=False)
        self.shortcut = match(c_in, c_out, False, stride)
        self.act = make_activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.cv2(self.cv1(x)) + self.shortcut(x))


@register
class ResidualBottleneck(Block):
    """act(1x1 (3x3 (1x1 x)) + shortcut x), BN after each convolution.

    (B, c_in, H, W) -> (B, c_out, ceil(H / stride), ceil(W / stride)).  The inner width is c_out *
    expansion.  ResNet-50's unit, arXiv:1512.03385, figure 5 right, but with the stride in the 3x3,
    not in the first 1x1 ("v1.5", as torchvision and most weights have it).
    """

    def __init__(
        self,
        c_in: int,
        c_out: Positive,
        stride: Positive = 1,
        expansion: Factor = 0.25,
        act: Act = True,
    ) -> None:
        super().__init__(c_out)
        hidden = hidden_width(c_out, expansion)
        self.cv1 = Conv(c_in, hidden, act=act)
        self.cv2 = Conv(hidden, hidden, 3, stride, act=act)
        self.cv3 = Conv(hidden, c_out, act=False)
        self.shortcut = match(c_in, c_out, False, stride)
        self.act = make_activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.cv3(self.cv2(self.cv1(x))) + self.shortcut(x))


@register
class InvertedResidual(Block):
    """1x1 expansion, depthwise kernel x kernel, SE, 1x1 without activation, plus the input.

    (B, c_in, H, W) -> (B, c_out, ceil(H / stride), ceil(W / stride)).  arXiv:1801.04381, section
    3.3; with `se` the form of MobileNetV3, arXiv:1905.02244, section 5.3: after the activation, of
    inner width hidden * se in multiples of 8, ReLU inside, hard-sigmoid gate.  The inner width is
    `hidden` where given, else c_in * expand; where it equals c_in there is no expansion.  The input
    is added with stride 1, c_in == c_out and `shortcut`.
    """

    channel_args = ("c_out", "hidden")

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
        super().__init__(c_out)
        width = hidden_width(c_in, expand) if hidden is None else hidden
        self.expand: nn.Module = nn.Identity() if width == c_in else Conv(c_in, width, act=act)
        self.depthwise = Conv(width, width, kernel, stride, groups=width, act=act)
        reduced = min(round_channels(width * se, SE_DIVISOR), width)
        self.se: nn.Module = nn.Identity()
        if se:
            self.se = SE(width, reduced=reduced, act="ReLU", gate="Hardsigmoid")
        self.project = Conv(width, c_out, act=False)
        self.add = shortcut and stride == 1 and c_in == c_out
