"""ShuffleNetV2's units, in torchvision's arrangement and in the authors'."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from models.blocks.conv import Conv, match
from models.registry import Act, Block, Count, Odd, Positive, must_divide, register

GROUPS = 2
Shuffle = Literal["end", "start"]


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave `groups` equal runs of channels: out[i * groups + g] = in[g * C / groups + i].

    (B, C, H, W) -> (B, C, H, W).  arXiv:1707.01083, section 3.1.
    """
    if torch.onnx.is_in_onnx_export():  # ONNX has no such operator
        return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)
    # torch's own keeps channels_last and is several times faster than the views on a CPU
    return torch.channel_shuffle(x, groups)


@register
class ShuffleUnit(Block):
    """Half passes, half goes through 1x1, depthwise, 1x1; concatenated, then shuffled.

    (B, c, H, W) -> (B, c, H, W); c_in must equal c_out and be even.  ShuffleNetV2's unit of stride
    1, arXiv:1807.11164, figure 3c.  `shuffle: start` is the authors' arrangement: even channels
    pass, odd ones are worked on, and nothing is shuffled at the end.  With h = c / 2 and kernel k:
    params = 2 h^2 + (k^2 + 6) h.
    """

    def __init__(
        self,
        c_in: int,
        c_out: Positive,
        kernel: Odd = 3,
        shuffle: Shuffle = "end",
        act: Act = True,
    ) -> None:
        super().__init__(c_out)
        must_divide(2, c_out=c_out)
        half = c_out // 2
        if c_in != c_out:
            raise ValueError(f"keeps its width, got c_in {c_in} and c_out {c_out}")
        self.shuffle = shuffle
        self.branch = nn.Sequential(
            Conv(half, half, act=act),
            Conv(half, half, kernel, groups=half, act=False),
            Conv(half, half, act=act),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.shuffle == "start":  # even and odd channels: halves of what a shuffle gives
            return torch.cat((x[:, 0::2], self.branch(x[:, 1::2])), 1)
        passed, worked = x.chunk(2, 1)
        return channel_shuffle(torch.cat((passed, self.branch(worked)), 1), GROUPS)


@register
class ShuffleDown(Block):
    """Two branches of stride 2, depthwise + 1x1 and 1x1 + depthwise + 1x1; concatenated, shuffled.

    (B, c_in, H, W) -> (B, c_out, ceil(H / 2), ceil(W / 2)); c_out must be even.  ShuffleNetV2's
    unit for spatial down sampling, arXiv:1807.11164, figure 3d.  Both branches end at c_out / 2, so
    that c_in may equal c_out; with `official_widths` the first keeps c_in and the second makes
    c_out - c_in, as the authors' code does.  With `shuffle: start` the next unit shuffles.
    """

    def __init__(
        self,
        c_in: int,
        c_out: Positive,
        kernel: Odd = 3,
        stride: Literal[2] = 2,
        official_widths: bool = False,
        shuffle: Shuffle = "end",
        act: Act = True,
    ) -> None:
        super().__init__(c_out)
        must_divide(2, c_out=c_out)
        half = c_out // 2
        if official_widths and c_in >= c_out:
            raise ValueError(f"official_widths needs c_in < c_out, got {c_in} and {c_out}")
        first, second = (c_in, c_out - c_in) if official_widths else (half, half)
        self.shuffle = shuffle
        self.branch1 = nn.Sequential(
            Conv(c_in, c_in, kernel, stride, groups=c_in, act=False), Conv(c_in, first, act=act)
        )
        self.branch2 = nn.Sequential(
            Conv(c_in, half, act=act),
            Conv(half, half, kernel, stride, groups=half, act=False),
            Conv(half, second, act=act),
        )

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat((self.branch1(x), self.branch2(x)), 1)
        return joined if self.shuffle == "start" else channel_shuffle(joined, GROUPS)


@register
class ShuffleStage(Block):
    """Replaces C3 by n ShuffleUnits; a 1x1 first where the widths differ.

    (B, c_in, H, W) -> (B, c_out, H, W).  Half of the channels pass each unit, so `shortcut` means
    nothing here.  With c = c_out, h = c / 2, kernel 3: params = [c_in != c] (c_in + 2) c
    + n (2 h^2 + 15 h).
    """

    ignores = ("shortcut", "groups", "expansion")

    def __init__(
        self, c_in: int, c_out: Positive, n: Count = 1, kernel: Odd = 3, act: Act = True
    ) -> None:
        super().__init__(c_out)
        self.enter = match(c_in, c_out, act)
        self.m = nn.Sequential(*(ShuffleUnit(c_out, c_out, kernel, act=act) for _ in range(n)))
