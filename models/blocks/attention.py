"""Channel attention: squeeze-and-excitation and its effective form."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from models.arguments import Act, Positive, Ratio
from models.blocks.conv import make_activation
from models.registry import Block, register

Gate = Literal["Sigmoid", "Hardsigmoid"]  # the latter is relu6(x + 3) / 6


@register
class SE(Block):
    """x * gate(expand(act(reduce(mean x)))): both 1x1 convolutions with bias, no BN.

    (B, c_in, H, W) -> (B, c_in, H, W).  The inner width is `reduced`, or int(c_in * ratio) where
    that is None.  Squeeze-and-excitation, arXiv:1709.01507.
    """

    def __init__(
        self,
        c_in: int,
        ratio: Ratio = 0.25,
        reduced: Positive | None = None,
        act: Act = "ReLU",
        gate: Gate = "Sigmoid",
    ) -> None:
        super().__init__(c_in)
        width = int(c_in * ratio) if reduced is None else reduced
        if not 1 <= width <= c_in:
            asked = f"ratio {ratio}" if reduced is None else f"reduced {reduced!r}"
            raise ValueError(f"{asked} gives {width!r} of {c_in} channels; need 1 to {c_in}")
        self.reduce = nn.Conv2d(c_in, width, 1)
        self.act = make_activation(act)
        self.expand = nn.Conv2d(width, c_in, 1)
        self.gate = getattr(nn, gate)()

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.expand(self.act(self.reduce(mean))))


@register
class ESE(Block):
    """x * hardsigmoid(fc(mean x)) with one 1x1 convolution of full width, with bias.

    (B, c_in, H, W) -> (B, c_in, H, W).  Effective SE of VoVNetV2, arXiv:1911.06667, section 3.2.
    """

    def __init__(self, c_in: int) -> None:
        super().__init__(c_in)
        self.fc = nn.Conv2d(c_in, c_in, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc(x.mean((2, 3), keepdim=True)))
