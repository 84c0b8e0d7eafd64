"""PeleeNet against a definition of its own: no package has it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks.pelee import PeleeStage

GROWTH = 32


def unit(c_in: int, c_out: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    """Convolution, BN, ReLU."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU(),
    )


class PlainDenseLayer(nn.Module):
    def __init__(self, c_in: int, bottleneck: int) -> None:
        super().__init__()
        way = GROWTH // 2
        inter = int(way * bottleneck / 4) * 4
        if inter > c_in / 2:
            inter = int(c_in / 8) * 4
        self.branch1a = unit(c_in, inter)
        self.branch1b = unit(inter, way, 3)
        self.branch2a = unit(c_in, inter)
        self.branch2b = unit(inter, way, 3)
        self.branch2c = unit(way, way, 3)

    def forward(self, x: Tensor) -> Tensor:
        one = self.branch1b(self.branch1a(x))
        two = self.branch2c(self.branch2b(self.branch2a(x)))
        return torch.cat([x, one, two], dim=1)


class PlainPeleeNet(nn.Module):
    """PeleeNet for 1000 classes; plain torch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem1 = unit(3, 32, 3, 2)
        self.stem2a = unit(32, 16)
        self.stem2b = unit(16, 32, 3, 2)
        self.stem3 = unit(64, 32)
        width = 32
        self.dense, self.transitions = nn.ModuleList(), nn.ModuleList()
        for layers, bottleneck in ((3, 1), (4, 2), (8, 4), (6, 4)):
            self.dense.append(
                nn.Sequential(
                    *(PlainDenseLayer(width + i * GROWTH, bottleneck) for i in range(layers))
                )
            )
            width += layers * GROWTH
            self.transitions.append(unit(width, width))
        self.classifier = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem1(x)
        x = self.stem3(torch.cat([F.max_pool2d(x, 2), self.stem2b(self.stem2a(x))], dim=1))
        for index, (dense, transition) in enumerate(zip(self.dense, self.transitions, strict=True)):
            x = transition(dense(x))
            if index < 3:
                x = F.avg_pool2d(x, 2)
        x = F.dropout(x.mean(dim=(2, 3)), 0.05, self.training)
        return self.classifier(x)


def max_instead_of_average(net: nn.Module) -> None:
    for part in net.modules():
        if isinstance(part, PeleeStage) and isinstance(part.pool, nn.AvgPool2d):
            part.pool = nn.MaxPool2d(2)


def test_peleenet_equals_its_reference(prove: Callable[..., None]) -> None:
    prove(
        "peleenet", PlainPeleeNet(), params=2_802_248, macs=507_757_568,
        taps=[f"transitions.{index}" for index in range(4)], mutate=max_instead_of_average,
        order="execution", reference_name="plain torch, independent of the blocks",
        published="2.8M / 508M",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("c_in", "arguments", "message"),
    [
        (32, {"growth": 7}, "growth is shared by two ways, so even; got 7"),
        (32, {"stride": 3}, "stride must be 1 or 2, got 3"),
        (4, {"growth": 8}, "4 channels and a growth of 8 leave none for the 1x1s"),
    ],
)
def test_impossible_stages(c_in: int, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PeleeStage(c_in, 16, **arguments)
