"""Rows that join, resize, pool or pad maps, or end a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks.conv import make_activation
from models.registry import Act, Block, Natural, Positive, Ratio, must_divide, register

EPSILON = 1e-4  # the paper's; keeps the quotient finite where all weights are 0


@register
class Concat(Block):
    """Maps side by side on the channel axis.

    List of (B, c_i, H, W) -> (B, sum c_i, H, W).  `dimension` is YOLOv5's argument and can only
    be 1.
    """

    reads_several = True

    def __init__(self, c_in: Sequence[int], dimension: Literal[1] = 1) -> None:
        super().__init__(sum(c_in))
        if len(c_in) < 2:
            raise ValueError(f"needs at least two maps, got the widths {c_in!r}")

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(maps), 1)


@register
class WeightedSum(Block):
    """The mean of several maps with one learned weight each: sum w_i x_i / (epsilon + sum w_j).

    List of (B, c, H, W) -> (B, c, H, W); widths and sizes must agree.  Weights are ReLU of the
    parameter and start equal.  Fast normalized fusion of BiFPN, arXiv:1911.09070, section 3.3.
    """

    reads_several = True

    def __init__(self, c_in: Sequence[int]) -> None:
        super().__init__(c_in[0])
        if len(c_in) < 2:
            raise ValueError(f"needs at least two maps, got the widths {c_in!r}")
        if len(set(c_in)) != 1:
            raise ValueError(f"adds maps of equal width, got {c_in!r}; put a 1x1 Conv before")
        self.weight = nn.Parameter(torch.ones(len(c_in)))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        positive = F.relu(self.weight)
        weights = [positive[index] for index in range(len(maps))]
        shares = [weight / (sum(weights) + EPSILON) for weight in weights]
        first, *others = (feature * share for feature, share in zip(maps, shares, strict=True))
        return sum(others, first)


@register
class Upsample(Block):
    """Enlarge by a whole factor, nearest or bilinear.

    (B, c_in, H, W) -> (B, c_in, fH, fW).  Positions as in `nn.Upsample`; `size` must stay None,
    since a fixed size has no stride.
    """

    def __init__(
        self,
        c_in: int,
        size: None = None,
        scale_factor: Positive = 2,
        mode: Literal["nearest", "bilinear"] = "nearest",
    ) -> None:
        super().__init__(c_in)
        self.enlarge = nn.Upsample(scale_factor=scale_factor, mode=mode)


@register
class ConvTranspose2d(nn.ConvTranspose2d, Block):
    """torch's transposed convolution with bias, without BN or activation (`nn.ConvTranspose2d`).

    (B, c_in, H, W) -> (B, c_out, H', W'), H' = (H - 1) stride - 2 padding + kernel
    + output_padding: kernel 2 and stride 2 double the map.
    """

    def __init__(
        self,
        c_in: int,
        c_out: Positive,
        kernel: Positive = 2,
        stride: Positive = 1,
        padding: Natural = 0,
        output_padding: Natural = 0,
        groups: Positive = 1,
        bias: bool = True,
    ) -> None:
        must_divide(groups, c_in=c_in, c_out=c_out)
        super().__init__(c_in, c_out, kernel, stride, padding, output_padding, groups, bias)
        self.c_out = c_out


@register
class Contract(Block):
    """Squares of `gain` x `gain` pixels as channels; Expand's inverse.

    (B, c_in, gain H, gain W) -> (B, c_in gain^2, H, W): channel (row * gain + column) * c_in + c is
    channel c at that pixel of the square.  Both sides of the map must be multiples of `gain`.
    """

    def __init__(self, c_in: int, gain: Positive = 2) -> None:
        super().__init__(c_in * gain**2)
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        squares = x.unflatten(3, (-1, self.gain)).unflatten(2, (-1, self.gain))
        return squares.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)


@register
class Expand(Block):
    """Channels as squares of `gain` x `gain` pixels; Contract's inverse.

    (B, c_in, H, W) -> (B, c_in / gain^2, gain H, gain W).
    """

    def __init__(self, c_in: int, gain: Positive = 2) -> None:
        super().__init__(c_in // gain**2)
        must_divide(gain**2, c_in=c_in)
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        squares = x.unflatten(1, (self.gain, self.gain, -1))
        return squares.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)


@register
class MaxPool(Block):
    """(B, c_in, H, W) -> (B, c_in, H', W'); stride = kernel unless given (`nn.MaxPool2d`)."""

    def __init__(
        self,
        c_in: int,
        kernel: Positive = 2,
        stride: Positive | None = None,
        padding: Natural = 0,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__(c_in)
        stride = kernel if stride is None else stride
        if padding > kernel // 2:
            raise ValueError(f"padding must be 0 to kernel // 2 = {kernel // 2}, got {padding}")
        self.pool = nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil_mode)


@register
class ZeroPad(Block):
    """Zeros around the map: padding (left, right, top, bottom), as in `nn.ZeroPad2d`.

    (B, c_in, H, W) -> (B, c_in, H + top + bottom, W + left + right).
    """

    def __init__(
        self, c_in: int, padding: tuple[Natural, Natural, Natural, Natural] = (0, 0, 0, 0)
    ) -> None:
        super().__init__(c_in)
        self.pad = nn.ZeroPad2d(padding)


@register
class GlobalPool(Block):
    """The mean of each channel: (B, c, H, W) -> (B, c, 1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


@register
class Linear(Block):
    """Dropout, a linear layer, an activation: (B, c_in) or (B, c_in, 1, 1) -> (B, c_out).

    No multiplier touches its width.
    """

    channel_args = ()

    def __init__(
        self,
        c_in: int,
        c_out: Positive,
        act: Act = False,
        bias: bool = True,
        dropout: Ratio = 0.0,
    ) -> None:
        super().__init__(c_out)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.linear = nn.Linear(c_in, c_out, bias)
        self.act = make_activation(act)
