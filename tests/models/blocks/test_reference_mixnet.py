"""MixNet equals timm's (symmetric padding, BN epsilon 1e-5)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from timm.layers import MixedConv2d
from torch import nn

from models.yaml.parser import load_classifier

TAPS = ("blocks.1", "blocks.2", "blocks.4", "blocks.5")


def timm_mixnet(name: str) -> nn.Module:
    """timm's net with every pair of 1x1 convolutions on halves written as one of two groups.

    The pairs are what grouping means; that each one computes the same is checked here.
    """
    net = timm.create_model(name)
    pairs = {
        path: part for path, part in net.named_modules()
        if isinstance(part, MixedConv2d) and part["0"].kernel_size == (1, 1)
    }  # fmt: skip
    assert pairs
    for path, pair in pairs.items():
        halves = list(pair.values())
        grouped = nn.Conv2d(sum(pair.splits), sum(half.out_channels for half in halves), 1,
                            groups=len(halves), bias=False)  # fmt: skip
        x = torch.randn(2, grouped.in_channels, 3, 4)
        with torch.no_grad():
            grouped.weight.copy_(torch.cat([half.weight for half in halves]))
            torch.testing.assert_close(grouped(x), pair(x), rtol=1e-5, atol=1e-5)
        net.set_submodule(path, grouped)
    return net


def swish_in_the_stem(net: nn.Module) -> None:
    """The first convolution activated like the deeper blocks."""
    found = [name for name, part in net.named_modules() if isinstance(part, nn.ReLU)]
    net.set_submodule(found[0], nn.SiLU())


@pytest.mark.parametrize(
    ("size", "params", "macs", "published"),
    [
        ("s", 4_134_606, 239_173_360, "4.1M / 256M"),
        ("m", 5_014_382, 339_172_672, "5.0M / 360M"),
        ("l", 7_329_252, 555_251_792, "7.3M / 565M"),
    ],
    ids=("s", "m", "l"),
)
def test_mixnet(
    prove: Callable[..., None], size: str, params: int, macs: int, published: str
) -> None:
    prove(
        f"mixnet-{size}",
        timm_mixnet(f"mixnet_{size}"),
        params=params,
        macs=macs,
        taps=TAPS,
        mutate=swish_in_the_stem,
        reference_name=f"timm mixnet_{size}",
        published=published,
    )


@pytest.mark.parametrize(("size", "stem", "widths"), [
    ("s", 16, [24, 40, 120, 200]), ("m", 24, [32, 40, 120, 200]), ("l", 32, [40, 56, 160, 264]),
])  # fmt: skip
def test_widths_of_stem_and_taps(size: str, stem: int, widths: list[int]) -> None:
    rows = {row.name: row for row in load_classifier(f"mixnet-{size}").layers if row.name}
    assert rows["stem"].args["c_out"] == stem
    assert [rows[f"P{level}"].args["c_out"] for level in (2, 3, 4, 5)] == widths
