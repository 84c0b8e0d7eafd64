"""YOLOv5's transformer stage."""

from __future__ import annotations

from torch import Tensor, nn

from models.blocks.conv import match
from models.blocks.csp import C3
from models.registry import Block, Count, Factor, Positive, hidden_width, must_divide, register

HEADS = 4  # of C3TR's attention


class TransformerLayer(nn.Module):
    """Self-attention and two linear layers, each added to its input.

    (positions, B, channels) -> the same.  An encoder layer after arXiv:2010.11929, section 3.1, as
    YOLOv5 has it: one more linear layer each for query, key and value, neither normalisation nor a
    hidden activation, all linear layers square.  params = 9 c^2 + 4 c.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.ma = nn.MultiheadAttention(channels, heads)
        self.fc1, self.fc2 = (nn.Linear(channels, channels, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.ma(self.q(x), self.k(x), self.v(x), need_weights=False)[0] + x
        return self.fc2(self.fc1(x)) + x


@register
class TransformerBlock(Block):
    """n TransformerLayers over all pixels of a map; a 1x1 first where the widths differ.

    (B, c_in, H, W) -> (B, c_out, H, W).  A linear layer added to the pixels stands for a position
    embedding, so that maps may have any size; time and memory grow with (H W)^2.
    """

    def __init__(self, c_in: int, c_out: Positive, heads: Positive = HEADS, n: Count = 1) -> None:
        super().__init__(c_out)
        must_divide(heads, c_out=c_out)
        self.conv = match(c_in, c_out, True)
        self.linear = nn.Linear(c_out, c_out)
        self.tr = nn.Sequential(*(TransformerLayer(c_out, heads) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        pixels = x.flatten(2).permute(2, 0, 1)
        mixed = self.tr(pixels + self.linear(pixels))
        return mixed.permute(1, 2, 0).unflatten(2, x.shape[2:])


@register
class C3TR(C3):
    """C3 with a TransformerBlock of n layers and 4 heads in place of its units.

    (B, c_in, H, W) -> (B, c_out, H, W).  `shortcut` and `groups` mean nothing here.  With
    h = c_out * expansion, params = 2 h (c_in + 2) + (2 h + 2) c_out + h^2 + h + n (9 h^2 + 4 h).
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
        super().__init__(c_in, c_out, expansion=expansion)
        hidden = hidden_width(c_out, expansion)
        self.m = TransformerBlock(hidden, hidden, n=n)
