"""Box arithmetic against by-hand values and torchvision; letterboxes forwards and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.ops import box_convert, complete_box_iou_loss

from utils.boxes import GREY, Letterbox, complete_iou, xyxy_to_cxcywh


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


def test_square_by_hand() -> None:
    box = Letterbox((480, 640), (320, 320))
    assert (box.scale, box.size, box.offset) == (0.5, (240, 320), (0, 40))
    image = np.full((480, 640, 3), 7, np.uint8)
    canvas = box.apply(image)
    assert canvas.shape == (320, 320, 3)
    assert (canvas[:40] == GREY).all()
    assert (canvas[40:280] == 7).all()
    assert (canvas[280:] == GREY).all()
    assert box.to_network(np.array([[0, 0, 640, 480]], np.float32)).tolist() == [[0, 40, 320, 280]]
    clipped = box.to_image(torch.tensor([[-9.0, 0.0, 400.0, 400.0]]))
    assert clipped.tolist() == [[0, 0, 640, 480]]


@pytest.mark.parametrize(
    ("kind", "src", "expected"),
    [
        ("rect", (480, 640), (512, 672)),  # ceil(.75*640/32 + .5)*32 = 512; ceil(20.5)*32 = 672
        ("rect", (640, 480), (672, 512)),
        ("rect", (333, 500), (448, 672)),  # .666*20 + .5 = 13.82
        ("rect", (500, 500), (672, 672)),
        ("tight", (480, 640), (480, 640)),
        ("tight", (333, 500), (448, 640)),
        ("tight", (1, 4000), (32, 640)),
        ("tight", (50, 100), (320, 640)),  # small images are enlarged
    ],
)
def test_canvases(kind: str, src: tuple[int, int], expected: tuple[int, int]) -> None:
    box = getattr(Letterbox, kind)(src, 640, 32)
    assert box.dst == expected
    assert max(box.size) == 640


@pytest.mark.parametrize("src", [(37, 91), (480, 640), (12, 4000), (333, 500), (640, 640)])
@pytest.mark.parametrize("size", [64, 96, 640])
def test_round_trip(src: tuple[int, int], size: int) -> None:
    h, w = src
    boxes = np.array([[0, 0, w, h], [w * 0.1, h * 0.2, w * 0.7, h * 0.9]], np.float32)
    kinds = (
        Letterbox(src, (size, size)),
        Letterbox.rect(src, size, 32),
        Letterbox.tight(src, size, 32),
    )
    for box in kinds:
        network = box.to_network(boxes)
        assert network.min() >= 0
        assert (network[:, 2:] <= np.array([box.dst[1], box.dst[0]]) + 1e-3).all()
        back = box.to_image(torch.from_numpy(network)).numpy()
        assert np.allclose(back, boxes, atol=1e-2 * max(w, h) / 100)


def test_boxes_follow_pixels() -> None:
    image = np.zeros((91, 37, 3), np.uint8)
    image[20:60, 10:30] = 255
    box = Letterbox((91, 37), (273, 273))  # exactly three times
    bright = np.argwhere(box.apply(image)[..., 0] > 127)
    drawn = [bright[:, 1].min(), bright[:, 0].min(), bright[:, 1].max() + 1, bright[:, 0].max() + 1]
    assert np.allclose(box.to_network(np.array([[10, 20, 30, 60]], np.float32))[0], drawn, atol=1)
