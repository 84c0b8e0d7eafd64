"""Rows to modules: exact parameter counts, strides, anchors, errors with the row."""

from __future__ import annotations

import math

import pytest
import torch

from models.builder import build_detector
from models.yaml.parser import load_spec, parse_spec
from utils.errors import UserError

ROWS = {
    "anchors": [[10, 13, 16, 30], [30, 61, 62, 45]],
    "backbone": [
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 2, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [8, 3, 2]],
    ],
    "head": [[[1, 2], 1, "Detect", ["nc", "anchors"]]],
}


def test_names_are_those_given_and_training_gives_raw_maps() -> None:
    model = build_detector(load_spec("yolov5n"), classes=2, names=["a", "b"])
    assert model.names == ("a", "b")
    shapes = [tuple(y.shape) for y in model(torch.rand(2, 3, 64, 96))]  # evaluation: test_contract
    assert shapes == [(2, 3, 8, 12, 7), (2, 3, 4, 6, 7), (2, 3, 2, 3, 7)]


def test_repeats_stack_blocks_that_have_no_inner_number() -> None:
    model = build_detector(parse_spec(ROWS, "t"), classes=1)
    assert model.stride == (8, 16)  # the second row strides twice
    assert "model.1.1.conv.weight" in model.state_dict()


def test_first_biases_are_the_priors() -> None:
    torch.manual_seed(0)
    model = build_detector(load_spec("yolov5n"), classes=80)
    for convolution, stride in zip(model.head.m, model.stride, strict=True):
        bias = convolution.bias.view(3, 85)
        objectness, score = math.log(8 / (640 / stride) ** 2), math.log(0.6 / (80 - 0.99999))
        assert bias[:, 4].mean().item() == pytest.approx(objectness, abs=0.2)
        assert bias[:, 5:].mean().item() == pytest.approx(score, abs=0.05)


def test_anchors_go_to_their_strides_whatever_their_order() -> None:
    rows = {**ROWS, "anchors": [[62, 45, 30, 61], [10, 13, 16, 30]]}
    model = build_detector(parse_spec(rows, "t"), classes=2)
    pixels = model.head.anchors * torch.tensor(model.stride).view(-1, 1, 1)
    assert pixels.tolist() == [[[10, 13], [16, 30]], [[62, 45], [30, 61]]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": [[[0, 1], 1, "Concat", [1]], [[1, 2], 1, "Detect", []]]},
         r"t:1: head\[0\]: row 3 Concat cannot take maps of 8x128x128, 8x32x32"),
        ({"backbone": [[-1, 1, "Conv", [7, 3, 2, 1, 2]], *ROWS["backbone"][1:]]}, r"row 0 Conv: c_in must be a multiple of 2, got 3"),
        ({"backbone": [[-1, 1, "Concat", [1]], *ROWS["backbone"][1:]]}, r"backbone\[0\]: Concat: needs at least two maps"),
        ({"backbone": [[-1, 1, "Conv", [8, 3, 3]], *ROWS["backbone"][1:]]}, r"must divide the image evenly"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_detector(parse_spec({**ROWS, **change}, "t"), classes=2)
