"""ShuffleNetV2: torchvision's form against torchvision, the authors' against its own definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

from models.blocks.shuffle import ShuffleUnit

# by size: widths of stages 2 to 4 and of the last 1x1, then published parameters and MACs
TABLE = {
    "0.5": ((48, 96, 192), 1024, "1.4M / 41M"),
    "1.0": ((116, 232, 464), 1024, "2.3M / 146M"),
    "1.5": ((176, 352, 704), 1024, "3.5M / 299M"),
    "2.0": ((244, 488, 976), 2048, "7.4M / 591M"),
}


def set_shuffle(net: nn.Module, value: str) -> None:
    for part in net.modules():
        if isinstance(part, ShuffleUnit):
            part.shuffle = value


class OfficialUnit(nn.Module):
    """The authors' unit; the main branch is registered first, as in their code."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        middle = c_out // 2
        entering = c_in if stride == 2 else c_in // 2
        leaving = c_out - entering
        self.main = nn.Sequential(
            *conv_bn(entering, middle, 1), nn.ReLU(),
            *conv_bn(middle, middle, 3, stride, middle),
            *conv_bn(middle, leaving, 1), nn.ReLU(),
        )  # fmt: skip
        self.projection = nn.Sequential()
        if stride == 2:
            self.projection = nn.Sequential(
                *conv_bn(c_in, c_in, 3, 2, c_in), *conv_bn(c_in, c_in, 1), nn.ReLU()
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            return torch.cat([self.projection(x), self.main(x)], dim=1)
        batch, channels, height, width = x.shape
        pairs = x.reshape(batch, channels // 2, 2, height, width)
        return torch.cat([pairs[:, :, 0], self.main(pairs[:, :, 1])], dim=1)


class OfficialShuffleNetV2(nn.Module):
    """ShuffleNetV2 as the authors' code has it; plain torch."""

    def __init__(self, size: str) -> None:
        super().__init__()
        widths, last, _ = TABLE[size]
        self.first = nn.Sequential(*conv_bn(3, 24, 3, 2), nn.ReLU())
        self.pool = nn.MaxPool2d(3, 2, 1)
        stages = []
        c_in = 24
        for width, units in zip(widths, (4, 8, 4), strict=True):
            stage = [OfficialUnit(c_in, width, 2)]
            stage += [OfficialUnit(width, width, 1) for _ in range(units - 1)]
            stages.append(nn.Sequential(*stage))
            c_in = width
        self.stages = nn.Sequential(*stages)
        self.last = nn.Sequential(*conv_bn(c_in, last, 1), nn.ReLU())
        self.drop = nn.Dropout(0.2) if size == "2.0" else nn.Identity()
        self.classifier = nn.Linear(last, 1000, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.stages(self.pool(self.first(x))))
        return self.classifier(self.drop(x.mean(dim=(2, 3))))


def conv_bn(
    c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(c_out)


@pytest.mark.parametrize(
    ("size", "params", "macs"),
    [
        ("0.5", 1_365_792, 40_476_448),
        ("1.0", 2_278_760, 145_814_296),
        ("1.5", 3_506_720, 298_970_656),
        ("2.0", 7_402_600, 590_783_000),
    ],
    ids=list(TABLE),
)
def test_official_shufflenetv2_equals_its_reference(
    prove: Callable[..., None], size: str, params: int, macs: int
) -> None:
    prove(
        f"shufflenetv2-{size}", OfficialShuffleNetV2(size), params=params, macs=macs,
        taps=["pool", "stages.0", "stages.1", "stages.2"],
        mutate=lambda net: set_shuffle(net, "end"), order="execution",
        reference_name="plain torch, independent of the blocks", published=TABLE[size][2],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("size", "params", "macs"),
    [
        ("0.5", 1_366_792, 40_476_448),
        ("1.0", 2_278_604, 144_907_992),
        ("1.5", 3_503_624, 295_759_392),
        ("2.0", 7_393_996, 583_253_464),
    ],
    ids=list(TABLE),
)
def test_torchvision_shufflenetv2_equals_its_reference(
    prove: Callable[..., None], size: str, params: int, macs: int
) -> None:
    name = f"shufflenet_v2_x{size.replace('.', '_')}"
    prove(
        f"shufflenetv2-{size}-tv", getattr(torchvision.models, name)(weights=None),
        params=params, macs=macs, taps=["maxpool", "stage2", "stage3", "stage4"],
        mutate=lambda net: set_shuffle(net, "start"), reference_name=f"torchvision {name}",
        published=TABLE[size][2],
    )  # fmt: skip


def test_even_channels_pass_and_come_first() -> None:
    x = torch.arange(8.0).view(1, 8, 1, 1)
    with torch.no_grad():
        out = ShuffleUnit(8, 8, shuffle="start").eval()(x)
    assert out.flatten()[:4].tolist() == [0, 2, 4, 6]
