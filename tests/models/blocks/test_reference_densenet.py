"""DenseNet-121, -169 and -201 equal torchvision's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

from models.blocks.dense import DenseLayer
from models.builder import build_classifier
from models.profile.cost import parameters
from models.yaml.parser import load_classifier


def taps(reference: nn.Module, images: Tensor) -> list[Tensor]:
    """What the first three dense blocks give, and the last one after its BN and ReLU."""
    kept = []
    x = images
    for name, part in reference.features.named_children():
        x = part(x)
        if name in {"denseblock1", "denseblock2", "denseblock3"}:
            kept.append(x.clone())
    return [*kept, torch.relu(x)]


def new_channels_first(net: nn.Module) -> None:
    """One layer puts its output before its input."""
    layer = [part for part in net.modules() if isinstance(part, DenseLayer)][20]
    forward = layer.forward
    growth = layer.grow.out_channels
    layer.forward = lambda x: forward(x).roll(growth, 1)


@pytest.mark.parametrize(
    ("size", "params", "macs"),
    [
        (121, 7_978_856, 2_834_161_664),
        pytest.param(169, 14_149_480, 3_359_843_328, marks=pytest.mark.slow),
        pytest.param(201, 20_013_928, 4_291_365_888, marks=pytest.mark.slow),
    ],
)
def test_equals_the_reference(
    prove: Callable[..., None], size: int, params: int, macs: int
) -> None:
    prove(
        f"densenet-{size}",
        getattr(torchvision.models, f"densenet{size}")(),
        params=params,
        macs=macs,
        taps=taps,
        mutate=new_channels_first,
        reference_name=f"torchvision densenet{size}",
    )


def test_growth_and_transitions_follow_the_width() -> None:
    """At half the width: growth 16, and what a dense stage adds is halved with it."""
    with torch.device("meta"):
        net = build_classifier(load_classifier("densenet-121", width=0.5))
        reference = torchvision.models.DenseNet(16, (6, 12, 24, 16), 32)
    assert parameters(net) == parameters(reference)
