"""Box arithmetic against by-hand values and torchvision."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_convert, complete_box_iou_loss

from utils.boxes import complete_iou, xyxy_to_cxcywh


def test_conversions_by_hand() -> None:
    boxes = torch.tensor([[10.0, 20.0, 30.0, 60.0]])
    assert xyxy_to_cxcywh(boxes).tolist() == [[20, 40, 20, 40]]
    assert torch.equal(xyxy_to_cxcywh(boxes), box_convert(boxes, "xyxy", "cxcywh"))


def test_ciou_of_equal_and_apart_boxes() -> None:
    a = torch.tensor([[5.0, 5.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0]])
    b = torch.tensor([[5.0, 5.0, 2.0, 2.0], [5.0, 1.0, 2.0, 2.0]])
    # apart: IoU 0, centres 4 apart, hull 6 x 2: 0 - 16/40
    assert complete_iou(a[:, :2], a[:, 2:], b[:, :2], b[:, 2:]).tolist() == pytest.approx(
        [1.0, -0.4], abs=1e-6
    )


def test_ciou_equals_torchvision_value_and_gradient() -> None:
    torch.manual_seed(0)
    a = torch.rand(50, 4) + 0.2
    b = torch.rand(50, 4) + 0.2
    ours, theirs = (a.clone().requires_grad_() for _ in range(2))
    value = complete_iou(ours[:, :2], ours[:, 2:], b[:, :2], b[:, 2:])
    corners = (box_convert(item, "cxcywh", "xyxy") for item in (theirs, b))
    loss = complete_box_iou_loss(*corners)
    assert torch.allclose(1 - value, loss, atol=1e-5)
    value.sum().backward()
    (-loss.sum()).backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-4)
