"""The gate of GhostNetV2: against timm, by hand, on odd maps and exported."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm.models.ghostnet as timm_ghost
import torch
from torch import Tensor, nn

from models.blocks.conv import row_defaults
from models.blocks.ghost import DFC, GhostUnit

ODD = [(7, 9), (2, 3), (13, 2), (8, 8)]


def calibrated(**args: Any) -> GhostUnit:
    """A unit with DFC whose BN has real statistics and whose gate is far from constant."""
    torch.manual_seed(0)
    unit = GhostUnit(6, 8, hidden=20, dfc=True, act="ReLU", **args)
    for part in unit.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None
            nn.init.uniform_(part.weight, 1, 3)
            nn.init.normal_(part.bias)
    with torch.no_grad():
        unit(torch.randn(4, 6, 16, 16))
    return unit.eval()


@pytest.mark.parametrize("size", ODD)
@pytest.mark.parametrize(("stride", "se"), [(1, 0.0), (2, 0.25)])
def test_unit_with_dfc_equals_timm(size: tuple[int, int], stride: int, se: float) -> None:
    with row_defaults(norm=(1e-5, 0.1)):
        own = calibrated(stride=stride, kernel=5, se=se)
    reference = timm_ghost.GhostBottleneck(6, 20, 8, 5, stride, se_ratio=se, mode="attn").eval()
    for one, other in zip(reference.state_dict().values(), own.state_dict().values(), strict=True):
        one.copy_(other)
    x = torch.randn(2, 6, *size)
    with torch.no_grad():
        found, expected = own(x), reference(x.clone())
        own.dfc = None
        assert (own(x) - expected).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_dfc_by_hand() -> None:
    """One channel, all weights one: each half-size value sums a 5x5 window of 2x2 means."""
    gate = DFC(1, 1).eval()
    for conv in (gate.mix, gate.horizontal, gate.vertical):
        nn.init.ones_(conv.conv.weight)
        conv.bn = nn.Identity()
    x = torch.zeros(1, 1, 5, 15)
    x[..., 0, 0], x[..., 4, :], x[..., :, 14] = 4.0, 100.0, 100.0  # the odd row and column: unseen
    with torch.no_grad():
        found = gate(x)
    # the mean 1 of the first 2x2 reaches half-size columns 0 to 2 (of 7) in both rows.  Nearest:
    # pixel i of 15 takes column floor(7 i / 15), so pixels 0 to 6
    reached = torch.zeros(5, 15)
    reached[:, :7] = 1
    torch.testing.assert_close(found[0, 0], torch.sigmoid(reached))


@pytest.mark.parametrize("size", [(1, 6), (6, 1), (1, 1)])
def test_dfc_on_a_map_one_pixel_high_or_wide(size: tuple[int, int]) -> None:
    """Where timm fails: the side of 1 stays, as if both rows of a map of twice the height agreed."""
    gate = calibrated().dfc
    x = torch.randn(2, 6, *size)
    twice = x.repeat_interleave(2 if size[0] == 1 else 1, 2)
    twice = twice.repeat_interleave(2 if size[1] == 1 else 1, 3)
    with torch.no_grad():
        found, expected = gate(x), gate(twice)[..., : size[0], : size[1]]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", ODD)
def test_unit_with_dfc_exports(size: tuple[int, int]) -> None:
    unit = calibrated(stride=2, se=0.25)
    x = torch.randn(2, 6, *size)
    with torch.no_grad():
        expected = unit(x)
        exported = torch.export.export(unit, (x,)).module()
        torch.testing.assert_close(exported(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_unit_with_dfc_keeps_its_values_in_onnx_at_any_size() -> None:
    unit = calibrated(stride=2, se=0.25)
    file = io.BytesIO()
    axes = {"x": {2: "height", 3: "width"}}
    torch.onnx.export(
        unit, (torch.randn(2, 6, 8, 8),), file, dynamo=False, opset_version=17,
        input_names=["x"], dynamic_axes=axes,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(file.getvalue())
    for size in [*ODD, (21, 27), (40, 64)]:
        x = torch.randn(2, 6, *size)
        with torch.no_grad():
            expected: Tensor = unit(x)
        (found,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_activation_of_the_section_reaches_se() -> None:
    with row_defaults("ReLU"):
        unit = GhostUnit(6, 8, se=0.25)
    assert isinstance(unit.se.act, nn.ReLU)
