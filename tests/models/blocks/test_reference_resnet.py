"""ResNet-18, -50 and -101 equal torchvision's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn

from models.blocks.residual import ResidualBasic, ResidualBottleneck

TAPS = ("layer1", "layer2", "layer3", "layer4")


def forget_last_activation(net: nn.Module) -> None:
    """The sums of the units of stride 2 stay without ReLU."""
    for part in net.modules():
        if isinstance(part, (ResidualBasic, ResidualBottleneck)) and part.cv2.conv.stride == (2, 2):
            part.act = nn.Identity()


def forget_shortcut(net: nn.Module) -> None:
    """The first unit that could pass its input on does not."""
    for part in net.modules():
        if isinstance(part, ResidualBasic) and isinstance(part.shortcut, nn.Identity):
            part.shortcut.forward = torch.zeros_like
            return


@pytest.mark.parametrize(
    ("name", "params", "macs", "mutate"),
    [
        ("resnet-18", 11_689_512, 1_814_073_344, forget_shortcut),
        pytest.param(
            "resnet-50", 25_557_032, 4_089_184_256, forget_last_activation, marks=pytest.mark.slow
        ),
        pytest.param(
            "resnet-101", 44_549_160, 7_801_405_440, forget_last_activation, marks=pytest.mark.slow
        ),
    ],
)
def test_equals_the_reference(
    prove: Callable[..., None],
    name: str,
    params: int,
    macs: int,
    mutate: Callable[[nn.Module], None],
) -> None:
    built = name.replace("-", "")
    prove(
        name,
        getattr(torchvision.models, built)(),
        params=params,
        macs=macs,
        taps=TAPS,
        mutate=mutate,
        reference_name=f"torchvision {built}",
    )
