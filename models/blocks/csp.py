"""Residual units, of YOLOv5, ResNet and MobileNet; YOLOv5's stages of them and pyramid pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.blocks.conv import SE, Conv, batch_norm, make_activation, match
from models.registry import Act, Block, Count, Factor, Odd, Positive, Ratio, hidden_width, register
from models.spec import round_channels

SE_DIVISOR = 8  # MobileNetV3 rounds SE's inner width to a multiple of this


@register
class Bottleneck(Block):
    """1x1 to c_out * expansion, 3x3 to c_out, plus the input when asked and the widths agree.

    (B, c_in, H, W) -> (B, c_out, H, W).  arXiv:1804.02767 (Darknet-53's residual unit).
    """

    def __init__(
        self,
        c_in: int,
        c_out: Positive,
        shortcut: bool = True,
        groups: Positive = 1,
        expansion: Factor = 0.5,
    ) -> None:
        super().__init__(c_out)
        hidden = hidden_width(c_out, expansion)
        self.cv1 = Conv(c_in, hidden, 1)
        self.cv2 = Conv(hidden, c_out, 3, groups=groups)
        self.add = shortcut and c_in == c_out


@register
class C3(Block):
    """Cross-stage partial stage with three 1x1 convolutions: cv3(cat(m(cv1 x), cv2 x)).

    (B, c_in, H, W) -> (B, c_out, H, W); m = n Bottlenecks of width c_out * expansion.
    CSPNet, arXiv:1911.11929.  With h that width, params = 2 h (c_in + 2) + (2 h + 2) c_out
    + n (10 h^2 + 4 h) for one group.
    """

    def __init__(
        self,
        c_in: int,
        c_out: Positive,
        n: Count = 1,
        shortcut: bool = True,
        groups: Positive = 1,
        expansion: Factor = 0.5,
    ) -> None:
        super().__init__(c_out)
        hidden = hidden_width(c_out, expansion)
        self.cv1 = Conv(c_in, hidden, 1)
        self.cv2 = Conv(c_in, hidden, 1)
        self.cv3 = Conv(2 * hidden, c_out, 1)
        self.m: nn.Module = nn.Sequential(
            *(self.make_unit(hidden, shortcut, groups) for _ in range(n))
        )

    def make_unit(self, width: int, shortcut: bool, groups: int) -> nn.Module:
        return Bottleneck(width, width, shortcut, groups, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


@register
class CrossConv(Block):
    """1 x k to c_out * expansion, k x 1 to c_out, plus the input when asked and the widths agree.

    (B, c_in, H, W) -> (B, c_out, ceil(H / stride), ceil(W / stride)).  YOLOv5's unit of C3x; a
    shortcut needs stride 1.
    """

    def __init__(
        self,
        c_in: int,
        c_out: Positive,
        kernel: Odd = 3,
        stride: Positive = 1,
        groups: Positive = 1,
        expansion: Factor = 1.0,
        shortcut: bool = False,
    ) -> None:
        super().__init__(c_out)
        hidden = hidden_width(c_out, expansion)
        self.cv1 = Conv(c_in, hidden, (1, kernel), (1, stride))
        self.cv2 = Conv(hidden, c_out, (kernel, 1), (stride, 1), groups=groups)
        self.add = shortcut and c_in == c_out


@register
class C3x(C3):
    """C3 whose n inner units are CrossConvs of kernel 3.

    (B, c_in, H, W) -> (B, c_out, H, W).  With h = c_out * expansion, params = 2 h (c_in + 2)
    + (2 h + 2) c_out + n (6 h^2 + 4 h) for one group.
    """

    def make_unit(self, width: int, shortcut: bool, groups: int) -> nn.Module:
        return CrossConv(width, width, 3, 1, groups, 1.0, shortcut)


@register
class BottleneckCSP(Block):
    """The cross-stage partial stage of YOLOv5 v1-v3: cv4(act(bn(cat(cv3 m(cv1 x), cv2 x)))).

    (B, c_in, H, W) -> (B, c_out, H, W); cv2 and cv3 are plain 1x1 convolutions, `act` is the inner
    activation alone.  CSPNet, arXiv:1911.11929.  The BN reads a concatenation: fusing leaves it.
    """

    def __init__(
        self,
        c_in: int,
        c_out: Positive,
        n: Count = 1,
        shortcut: bool = True,
        groups: Positive = 1,
        expansion: Factor = 0.5,
        act: Act = "LeakyReLU(0.1)",
    ) -> None:
        super().__init__(c_out)
        hidden = hidden_width(c_out, expansion)
        self.cv1 = Conv(c_in, hidden, 1)
        self.cv2 = nn.Conv2d(c_in, hidden, 1, bias=False)
        self.cv3 = nn.Conv2d(hidden, hidden, 1, bias=False)
        self.cv4 = Conv(2 * hidden, c_out, 1)
        self.bn = batch_norm(2 * hidden)
        self.act = make_activation(act)
        units = (Bottleneck(hidden, hidden, shortcut, groups, 1.0) for _ in range(n))
        self.m = nn.Sequential(*units)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat((self.cv3(self.m(self.cv1(x))), self.cv2(x)), 1)
        return self.cv4(self.act(self.bn(joined)))


@register
class SPP(Block):
    """1x1 to half, concatenated with its max-pools of several sizes, 1x1.

    (B, c_in, H, W) -> (B, c_out, H, W).  Spatial pyramid pooling, arXiv:1406.4729.
    """

    def __init__(self, c_in: int, c_out: Positive, kernels: Sequence[Odd] = (5, 9, 13)) -> None:
        super().__init__(c_out)
        hidden = hidden_width(c_in, 0.5)
        self.cv1 = Conv(c_in, hidden, 1)
        self.cv2 = Conv(hidden * (len(kernels) + 1), c_out, 1)
        self.m = nn.ModuleList(nn.MaxPool2d(kernel, 1, kernel // 2) for kernel in kernels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return self.cv2(torch.cat([x, *(pool(x) for pool in self.m)], 1))


@register
class C3SPP(C3):
    """C3 with an SPP in place of its units: (B, c_in, H, W) -> (B, c_out, H, W)."""

    ignores = ("shortcut", "groups")

    def __init__(
        self,
        c_in: int,
        c_out: Positive,
        kernels: Sequence[Odd] = (5, 9, 13),
        expansion: Factor = 0.5,
    ) -> None:
        super().__init__(c_in, c_out, expansion=expansion)
        hidden = hidden_width(c_out, expansion)
        self.m = SPP(hidden, hidden, kernels)


@register
class SPPF(Block):
    """SPP with three equal max-pools one after another: the same values as SPP(5, 9, 13) for 5.

    (B, c_in, H, W) -> (B, c_out, H, W).  After arXiv:1406.4729.
    """

    def __init__(self, c_in: int, c_out: Positive, kernel: Odd = 5) -> None:
        super().__init__(c_out)
        hidden = hidden_width(c_in, 0.5)
        self.cv1 = Conv(c_in, hidden, 1)
        self.cv2 = Conv(4 * hidden, c_out, 1)
        self.m = nn.MaxPool2d(kernel, 1, kernel // 2)  # one module, as in genuine checkpoints

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.cv1(x)]
        for _ in range(3):
            maps.append(self.m(maps[-1]))
        return self.cv2(torch.cat(maps, 1))


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
