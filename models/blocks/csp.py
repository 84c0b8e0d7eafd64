"""YOLOv5's blocks: bottlenecks, cross-stage partial stages, spatial pyramid pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.blocks.conv import Conv, batch_norm, make_activation
from models.registry import Act, Block, Count, Factor, Odd, Positive, hidden_width, register


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
        self.m = nn.Sequential(*(self.make_unit(hidden, shortcut, groups) for _ in range(n)))

    def make_unit(self, width: int, shortcut: bool, groups: int) -> nn.Module:
        return Bottleneck(width, width, shortcut, groups, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


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
class SPPF(Block):
    """SPP with three equal max-pools one after another: the same values as SPP(5, 9, 13) for 5.

    (B, c_in, H, W) -> (B, c_out, H, W).  After arXiv:1406.4729.
    """

    def __init__(self, c_in: int, c_out: Positive, kernel: Odd = 5) -> None:
        super().__init__(c_out)
        hidden = hidden_width(c_in, 0.5)
        self.cv1 = Conv(c_in, hidden, 1)
        self.cv2 = Conv(4 * hidden, c_out, 1)
        self.m = nn.MaxPool2d(kernel, 1, kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.cv1(x)]
        for _ in range(3):
            maps.append(self.m(maps[-1]))
        return self.cv2(torch.cat(maps, 1))
