"""ResNet's residual units: two 3x3, or 1x1, 3x3, 1x1, with the shortcut activated together."""

from __future__ import annotations

from torch import Tensor, nn

from models.arguments import Act, Factor, Positive, hidden_width
from models.blocks.conv import Conv, make_activation
from models.registry import Block, register


def _shortcut(c_in: int, c_out: Positive, stride: int) -> nn.Module:
    """The identity where it fits, else the 1x1 projection (arXiv:1512.03385, option B)."""
    if stride == 1 and c_in == c_out:
        return nn.Identity()
    return Conv(c_in, c_out, stride=stride, act=False)


@register
class ResidualBasic(Block):
    """act(3x3 (3x3 x) + shortcut x), BN after each convolution.

    (B, c_in, H, W) -> (B, c_out, ceil(H / stride), ceil(W / stride)).  The first 3x3 has the
    stride.  ResNet-18's and -34's unit, arXiv:1512.03385, figure 5 left.
    """

    def __init__(self, c_in: int, c_out: Positive, stride: Positive = 1, act: Act = True) -> None:
        super().__init__()
        self.c_out = c_out
        self.cv1 = Conv(c_in, c_out, 3, stride, act=act)
        self.cv2 = Conv(c_out, c_out, 3, act=False)
        self.shortcut = _shortcut(c_in, c_out, stride)
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
        super().__init__()
        hidden = hidden_width(c_out, expansion)
        self.c_out = c_out
        self.cv1 = Conv(c_in, hidden, act=act)
        self.cv2 = Conv(hidden, hidden, 3, stride, act=act)
        self.cv3 = Conv(hidden, c_out, act=False)
        self.shortcut = _shortcut(c_in, c_out, stride)
        self.act = make_activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.cv3(self.cv2(self.cv1(x))) + self.shortcut(x))
