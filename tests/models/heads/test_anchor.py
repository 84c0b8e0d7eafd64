"""The anchor head's decoding, first biases and anchors, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from models.builder import build_detector
from models.heads.anchor import Detect
from models.yaml.parser import load_spec


def head(device: torch.device) -> Detect:
    detect = Detect([4, 4], classes=2, anchors_per_level=2)
    detect.set_stride((8, 16), ((10, 14, 16, 30), (60, 80, 100, 90)))
    return detect.to(device)


def test_decode_by_hand(device: torch.device) -> None:
    detect = head(device)
    raw = [torch.full((2, 2, 4, 5, 7), -9.0), torch.full((2, 2, 2, 3, 7), -9.0)]
    # level 1, anchor 1, row 1, column 2: t = 0 is the middle of the ranges
    raw[1][1, 1, 1, 2] = torch.tensor(
        [0.0, math.log(3), 0.0, math.log(3), 0.0, math.log(3), -math.log(3)]
    )
    raw = [level.to(device) for level in raw]
    image, boxes, scores = detect.decode(raw, 0.49)
    # centre: x = (2*.5 - .5 + 2)*16 = 40, y = (2*.75 - .5 + 1)*16 = 32
    # size: w = (2*.5)^2*100 = 100, h = (2*.75)^2*90 = 202.5
    expected = torch.tensor([40 - 50, 32 - 101.25, 40 + 50, 32 + 101.25])
    assert image.tolist() == [1]
    assert torch.allclose(boxes[0].cpu(), expected)
    assert torch.allclose(scores[0].cpu(), torch.tensor([0.5 * 0.75, 0.5 * 0.25]))


def test_decode_keeps_the_cells_whose_objectness_is_over_conf_or_not_a_number(
    device: torch.device,
) -> None:
    """In the order of levels, images, anchors, rows, columns."""
    raw = [torch.full((2, 2, 4, 5, 7), 9.0), torch.full((2, 2, 2, 3, 7), 9.0)]
    raw = [level.to(device) for level in raw]
    image, boxes, scores = head(device).decode(raw, 0.5)
    assert image.tolist() == [0] * 40 + [1] * 40 + [0] * 12 + [1] * 12
    centre = (boxes[:, :2] + boxes[:, 2:]).cpu() / 2
    x, y = (float(torch.tensor(9.0).sigmoid() * 2 - 0.5 + cell) * 8 for cell in (3, 1))
    assert centre[40 + 20 + 5 + 3].tolist() == pytest.approx([x, y])
    raw[0][..., 4], raw[1][..., 4] = -9, 0
    raw[0][1, 0, 3, 2, 4] = torch.nan
    image, boxes, scores = head(device).decode(raw, 0.5)
    assert image.tolist() == [1]
    assert not scores.isfinite().any()


def test_raw_maps_are_the_convolutions_values(device: torch.device) -> None:
    detect = head(device)
    maps = [torch.randn(2, 4, 3, 5, device=device), torch.randn(2, 4, 2, 2, device=device)]
    raw = detect(maps)
    flat = detect.m[0](maps[0])
    assert torch.equal(raw[0][1, 1, 2, 4], flat[1, 7:14, 2, 4])


def test_no_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one class, got 0"):
        Detect([4], classes=0, anchors_per_level=3)


def test_first_biases_are_the_priors() -> None:
    torch.manual_seed(0)
    model = build_detector(load_spec("yolov5n"), classes=80)
    for convolution, stride in zip(model.head.m, model.stride, strict=True):
        bias = convolution.bias.view(3, 85)
        objectness, score = math.log(8 / (640 / stride) ** 2), math.log(0.6 / (80 - 0.99999))
        assert bias[:, 4].mean().item() == pytest.approx(objectness, abs=0.2)
        assert bias[:, 5:].mean().item() == pytest.approx(score, abs=0.05)


def test_anchors_go_to_their_strides_whatever_their_order() -> None:
    detect = Detect([4, 4], classes=2, anchors_per_level=2)
    detect.set_stride((8, 16), ((62, 45, 30, 61), (10, 13, 16, 30)))
    pixels = detect.anchors * torch.tensor([8, 16]).view(-1, 1, 1)
    assert pixels.tolist() == [[[10, 13], [16, 30]], [[62, 45], [30, 61]]]
