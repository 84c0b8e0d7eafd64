import pytest
import torch

from engine.train.optimizer import freeze, rows_to_freeze
from models.builder import build_detector
from models.yaml.parser import load_spec
from utils.errors import UserError


@pytest.fixture(scope="module")
def spec():
    return load_spec("yolov5n")


@pytest.mark.parametrize(
    ("items", "rows"),
    [
        (("3",), [0, 1, 2]),
        (("0",), []),
        (("4", "2"), [2, 4]),
        (("backbone",), list(range(10))),
        (("backbone", "24"), [*range(10), 24]),
        (("head",), [24]),
        ((), []),
    ],
)
def test_rows(spec, items, rows):
    assert rows_to_freeze(spec, items) == rows


@pytest.mark.parametrize(
    ("items", "message"), [(("26",), "only 25 rows"), (("bakbone",), "'backbone'")]
)
def test_rows_that_do_not_exist(spec, items, message):
    with pytest.raises(UserError, match=message):
        rows_to_freeze(spec, items)


def test_frozen_rows_keep_weights_and_statistics(spec):
    model = build_detector(spec, classes=2).train()
    freeze(model, [0, 1])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sum(item.sum() for item in model(torch.rand(1, 3, 64, 64))).backward()
    after = model.state_dict()
    statistics = [key for key in after if key.endswith("running_mean")]
    moved = {key.split(".")[1] for key in statistics if not torch.equal(before[key], after[key])}
    assert moved
    assert not moved & {"0", "1"}
    assert model.layers[0].conv.weight.grad is None
    assert model.layers[2].cv1.conv.weight.grad is not None


def test_nothing_left_to_train(spec):
    model = build_detector(spec, classes=2)
    with pytest.raises(UserError, match="nothing is left"):
        freeze(model, range(25))
