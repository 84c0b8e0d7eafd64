"""Suppression rules by hand."""

from __future__ import annotations

import pytest
import torch

from utils.nms import NmsConfig, nms
from utils.structures import Decoded


def decoded(boxes: list[list[float]], scores: list[list[float]]) -> Decoded:
    return Decoded(torch.tensor([boxes]), torch.tensor([scores]))


BOXES = [[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [50.0, 50.0, 60.0, 60.0]]
SCORES = [[0.9, 0.1], [0.8, 0.7], [0.05, 0.6]]


def result(config: NmsConfig) -> list[tuple[float, int]]:
    found = nms(decoded(BOXES, SCORES), config)[0]
    return [
        (round(s, 3), k) for s, k in zip(found.scores.tolist(), found.labels.tolist(), strict=True)
    ]


def test_classes_do_not_suppress_each_other() -> None:
    # boxes 0 and 1 overlap by 9/11: class 0 keeps the better, class 1 of box 1 stays
    assert result(NmsConfig(conf=0.25, iou=0.5)) == [(0.9, 0), (0.7, 1), (0.6, 1)]


def test_low_threshold_gives_every_class_of_a_box() -> None:
    found = nms(
        decoded(BOXES, [[0.9, 0.1], [0.02, 0.03], [0.05, 0.6]]), NmsConfig(conf=0.04, iou=0.5)
    )
    assert found[0].scores.tolist() == pytest.approx([0.9, 0.6, 0.1, 0.05])
    assert found[0].labels.tolist() == [0, 1, 1, 0]


def test_single_label_agnostic_classes_and_limit() -> None:
    assert result(NmsConfig(conf=0.25, iou=0.5, multi_label=False)) == [(0.9, 0), (0.6, 1)]
    assert result(NmsConfig(conf=0.25, iou=0.5, agnostic=True)) == [(0.9, 0), (0.6, 1)]
    assert result(NmsConfig(conf=0.25, iou=0.5, classes=(1,))) == [(0.7, 1), (0.6, 1)]
    assert result(NmsConfig(conf=0.25, iou=0.5, max_det=1)) == [(0.9, 0)]


def test_nothing_over_the_threshold() -> None:
    for multi in (True, False):
        found = nms(decoded(BOXES, SCORES), NmsConfig(conf=0.95, multi_label=multi))[0]
        assert (len(found), found.boxes.shape) == (0, (0, 4))


def test_images_do_not_touch_each_other() -> None:
    both = Decoded(torch.tensor([BOXES, BOXES]), torch.tensor([SCORES, [[0.0, 0.0]] * 3]))
    first, second = nms(both, NmsConfig())
    assert len(first) == 3
    assert len(second) == 0


@pytest.mark.parametrize("max_det", [5, 300, 5000])
def test_taking_candidates_by_and_by_changes_nothing(
    max_det: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = torch.Generator().manual_seed(0)
    corner = torch.rand(1, 3000, 2, generator=rng) * 200
    boxes = torch.cat((corner, corner + 5 + torch.rand(1, 3000, 2, generator=rng) * 60), 2)
    crowd = Decoded(boxes, torch.rand(1, 3000, 3, generator=rng))
    config = NmsConfig(conf=0.1, iou=0.5, max_det=max_det)
    by_and_by = nms(crowd, config)[0]
    monkeypatch.setattr("utils.nms.FIRST_CANDIDATES", 10**9)
    at_once = nms(crowd, config)[0]
    assert torch.equal(by_and_by.boxes, at_once.boxes)
    assert torch.equal(by_and_by.labels, at_once.labels)
    assert len(at_once) == min(max_det, len(at_once))


@pytest.mark.parametrize("values", [{"conf": 1.5}, {"iou": -0.1}, {"max_det": 0}])
def test_impossible_settings(values: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        NmsConfig(**values)
