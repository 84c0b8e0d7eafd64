"""Suppression rules by hand and against a plain loop, on every device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

from utils.nms import NmsConfig, nms, non_finite

BOXES = [[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [50.0, 50.0, 60.0, 60.0]]
SCORES = [[0.9, 0.1], [0.8, 0.7], [0.05, 0.6]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # boxes 0 and 1 overlap by 9/11: class 0 keeps the better, class 1 of box 1 stays
        ({}, [(0.9, 0), (0.7, 1), (0.6, 1)]),
        ({"conf": 0.04}, [(0.9, 0), (0.7, 1), (0.6, 1), (0.05, 0)]),  # every class of a box
        ({"multi_label": False}, [(0.9, 0), (0.6, 1)]),
        ({"suppress": False}, [(0.9, 0), (0.8, 0), (0.6, 1)]),  # the best class of each box
        ({"suppress": False, "max_det": 2, "classes": (0,)}, [(0.9, 0), (0.8, 0)]),
        ({"agnostic": True}, [(0.9, 0), (0.6, 1)]),
        ({"classes": (1,)}, [(0.7, 1), (0.6, 1)]),
        ({"max_det": 1}, [(0.9, 0)]),
        ({"conf": 0.95}, []),
        ({"conf": 0.95, "multi_label": False}, []),
    ],
)
def test_rules_and_options(
    options: dict, expected: list[tuple[float, int]], device: torch.device
) -> None:
    """Of images that do not touch each other: two equal ones, whose boxes alternate, and none."""
    image = torch.tensor([0, 2] * 3, device=device)
    boxes = torch.tensor(BOXES, device=device).repeat_interleave(2, 0)
    scores = torch.tensor(SCORES, device=device).repeat_interleave(2, 0)
    config = NmsConfig(**{"conf": 0.25, "iou": 0.5, **options})
    found, none, same = nms(image, boxes, scores, config, images=3)
    assert all(map(torch.equal, vars(found).values(), vars(same).values()))
    rows = zip(found.scores.tolist(), found.labels.tolist(), strict=True)
    assert [(round(score, 3), label) for score, label in rows] == expected
    assert (len(none), none.boxes.shape) == (0, (0, 4))


def by_a_plain_loop(boxes: Tensor, scores: Tensor, config: NmsConfig) -> list[tuple[int, int]]:
    """(box, class) pairs kept, best first; IoU in float64, compared with float32 `iou`."""
    iou = torchvision.ops.box_iou(boxes.double(), boxes.double())
    pairs = (scores > config.conf).nonzero().tolist()
    kept: list[tuple[int, int]] = []
    for box, label in sorted(pairs, key=lambda pair: -scores[tuple(pair)]):
        rivals = [other for other, its in kept if its == label]
        if not (iou[box, rivals] > float(np.float32(config.iou))).any():
            kept.append((box, label))
    return kept[: config.max_det]


@pytest.mark.parametrize(
    ("seed", "portion", "max_det"),
    [(0, 1000, 2000), (1, 1000, 2000), (2, 1000, 50), (3, 40, 2000), (4, 40, 50), (5, 40, 5)],
)
def test_the_same_as_a_plain_loop(
    seed: int, portion: int, max_det: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense boxes of the last of 80 classes, some left of the image, around the IoU threshold."""
    monkeypatch.setattr("utils.nms.PORTION", portion)
    rng = torch.Generator().manual_seed(seed)
    centre, size = torch.rand(10, 2, generator=rng) * 600, torch.rand(10, 2, generator=rng) * 20 + 4
    dense = torch.cat((centre - size / 2, centre + size / 2), 1)
    boxes = dense[torch.randint(0, 10, (150,), generator=rng)]
    boxes = boxes + torch.rand(150, 4, generator=rng) * 4 - 5
    scores = torch.zeros(150, 80)
    scores[:, 74:] = torch.rand(150, 6, generator=rng)
    config = NmsConfig(conf=0.3, iou=0.6, max_det=max_det)
    image = torch.zeros(150, dtype=torch.int64, device=device)
    found = nms(image, boxes.to(device), scores.to(device), config, images=1)[0]
    expected = by_a_plain_loop(boxes, scores, config)
    assert found.labels.tolist() == [label for _, label in expected]
    assert torch.equal(found.boxes.cpu(), boxes[[box for box, _ in expected]])


def test_non_finite_outputs_are_found_by_image(device: torch.device) -> None:
    image = torch.arange(4, device=device).repeat(5)
    boxes, scores = torch.ones(20, 4, device=device), torch.ones(20, 2, device=device)
    boxes[5, 3], scores[11, 1], scores[3, 0] = torch.inf, torch.nan, torch.nan
    assert non_finite(image, boxes, scores) == [1, 3]


@pytest.mark.parametrize("values", [{"conf": 1.5}, {"iou": -0.1}, {"max_det": 0}])
def test_impossible_settings(values: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        NmsConfig(**values)
