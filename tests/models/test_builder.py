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


def test_forward_gives_one_raw_map_per_stride_in_training_and_evaluation() -> None:
    model = build_detector(load_spec("yolov5n"), classes=4, names=["a", "b", "c", "d"])
    assert model.stride == (8, 16, 32)
    assert model.names == ("a", "b", "c", "d")
    images = torch.rand(2, 3, 64, 96)
    for mode in (True, False):
        model.train(mode)
        raw = model(images)
        assert [tuple(y.shape) for y in raw] == [(2, 3, 8, 12, 9), (2, 3, 4, 6, 9), (2, 3, 2, 3, 9)]


def test_repeats_stack_blocks_that_have_no_inner_number() -> None:
    model = build_detector(parse_spec(ROWS, "t"), classes=1)
    assert model.stride == (8, 16)  # the second row strides twice
    assert sorted(model.state_dict())[1:4] == [
        "model.0.bn.num_batches_tracked", "model.0.bn.running_mean", "model.0.bn.running_var",
    ]  # fmt: skip
    assert "model.1.1.conv.weight" in model.state_dict()


def test_first_biases_are_the_priors() -> None:
    torch.manual_seed(0)
    model = build_detector(load_spec("yolov5n"), classes=80)
    for convolution, stride in zip(model.head.m, model.stride, strict=True):
        bias = convolution.bias.view(3, 85)
        assert torch.allclose(
            bias[:, 4].mean(), torch.tensor(math.log(8 / (640 / stride) ** 2)), atol=0.2
        )
        assert torch.allclose(
            bias[:, 5:].mean(), torch.tensor(math.log(0.6 / (80 - 0.99999))), atol=0.05
        )


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
