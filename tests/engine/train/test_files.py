import math

import numpy as np
import pytest
from PIL import Image

from engine.train.files import csv_text, plot_results, smoothed

COLUMNS = (
    "epoch,train/box_loss,train/obj_loss,train/cls_loss,metrics/precision,metrics/recall,"
    "metrics/mAP_0.5,metrics/mAP_0.5:0.95,val/box_loss,val/obj_loss,val/cls_loss,x/lr0,x/lr1,x/lr2"
)


def row(epoch):
    return {name: epoch + i / 10 for i, name in enumerate(COLUMNS.split(","))} | {"epoch": epoch}


def test_csv_has_the_columns_of_the_ecosystem_and_one_row_per_epoch():
    lines = csv_text([row(0), {"epoch": 1, "train/box_loss": 1 / 3}]).splitlines()
    assert lines[0].startswith(COLUMNS)
    assert lines[1].startswith("0,0.1,0.2,0.3,")
    assert lines[2].startswith("1,0.333333,,")
    assert len({line.count(",") for line in lines}) == 1
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("value", "cell"), [(math.nan, ""), (math.inf, "inf"), (-math.inf, "-inf"), (1e12, "1e+12")]
)
def test_no_value_stops_the_log(value, cell):
    line = csv_text([{"epoch": 0, "train/box_loss": value}]).splitlines()[1]
    assert line.rstrip(",") == f"0,{cell}".rstrip(",")


def test_a_smoothed_line_keeps_a_constant_and_evens_out_noise():
    epochs = np.arange(1.0, 101.0)
    np.testing.assert_allclose(smoothed(epochs, np.full(100, 0.3)), 0.3)
    noise = np.random.default_rng(0).normal(size=100)
    assert smoothed(epochs, noise).std() < 0.5 * noise.std()
    few = np.array([0.1, 0.5, 0.2])  # too few to be smoothed
    np.testing.assert_allclose(smoothed(epochs[:3], few), few, atol=1e-6)


def test_curves_are_drawn(tmp_path):
    plot_results([row(0), row(1)], tmp_path / "results.png")
    with Image.open(tmp_path / "results.png") as image:
        assert image.size[0] > 1000
