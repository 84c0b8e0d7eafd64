"""MobileNetV2, MobileNetV3-Large and -Small equal torchvision's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn

from models.blocks.attention import SE
from models.builder import build_classifier
from models.profile.cost import parameters
from models.yaml.parser import load_classifier


def plain_relu(net: nn.Module) -> None:
    """ReLU where ReLU6 should be."""
    for part in net.modules():
        for name, child in part.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(part, name, nn.ReLU())


def smooth_gate(net: nn.Module) -> None:
    """The gate of one SE is a sigmoid, not a hard one."""
    gates = [part for part in net.modules() if isinstance(part, SE)]
    gates[1].gate = nn.Sigmoid()


CASES = {
    "mobilenetv2-1.0": ("mobilenet_v2", (3, 6, 13, 17), plain_relu),
    "mobilenetv3-large": ("mobilenet_v3_large", (3, 6, 12, 15), smooth_gate),
    "mobilenetv3-small": ("mobilenet_v3_small", (1, 3, 8, 11), smooth_gate),
}


@pytest.mark.parametrize(
    ("name", "params", "macs", "published"),
    [
        ("mobilenetv2-1.0", 3_504_872, 300_774_272, "3.4M / 300M"),
        ("mobilenetv3-large", 5_483_032, 216_589_760, "5.4M / 219M"),
        ("mobilenetv3-small", 2_542_856, 56_510_400, "-"),
    ],
)
def test_equals_the_reference(
    prove: Callable[..., None], name: str, params: int, macs: int, published: str
) -> None:
    built, features, mutate = CASES[name]
    prove(
        name,
        getattr(torchvision.models, built)(),
        params=params,
        macs=macs,
        taps=[f"features.{index}" for index in features],
        mutate=mutate,
        reference_name=f"torchvision {built}",
        published=published,
    )


@pytest.mark.parametrize("width", [0.35, 0.5, 0.75, 1.4])
@pytest.mark.parametrize("name", CASES)
def test_width_multiplier_rounds_as_the_reference_does(name: str, width: float) -> None:
    built, features, _ = CASES[name]
    with torch.device("meta"):
        net = build_classifier(load_classifier(name, width=width))
        reference = getattr(torchvision.models, built)(width_mult=width)
    own = [layer for layer, row in zip(net.layers, net.spec.layers, strict=True)
           if row.section == "backbone"]  # fmt: skip
    expected = parameters(reference.features[: features[-1] + 1])
    assert sum(parameters(layer) for layer in own) == expected
