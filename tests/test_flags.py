"""The flags that YOLO users know are there, with their defaults."""

from __future__ import annotations

import pytest

from engine.compare.config import CompareConfig
from engine.evaluate.config import ValConfig
from engine.predict.config import DetectConfig
from utils.config import parse

VAL = """--data --weights --batch-size --imgsz --rect --device --conf-thres --iou-thres --max-det
    --task --augment --half --save-txt --save-conf --save-json --verbose --project --name
    --exist-ok"""
DETECT = """--weights --source --data --imgsz --conf-thres --iou-thres --max-det --view-img
    --save-txt --save-conf --save-csv --save-crop --nosave --classes --agnostic-nms --augment
    --line-thickness --hide-labels --hide-conf --half --vid-stride"""
COMPARE = """--cfg --weights --backbone --neck --data --img --epochs --seeds --baseline --device
    --project --name --jobs --fit --dry-run --profile-only --records --exist-ok"""
CASES = [(ValConfig, VAL), (DetectConfig, DETECT), (CompareConfig, COMPARE)]


@pytest.mark.parametrize(("config", "flags"), CASES)
def test_help_names_every_flag(config: type, flags: str, capsys) -> None:
    with pytest.raises(SystemExit):
        parse(config, ["--help"], prog="x", description="")
    text = capsys.readouterr().out.replace(",", " ").split()
    assert [flag for flag in flags.split() if flag not in text] == []


def test_defaults() -> None:
    val = parse(ValConfig, ["--weights", "a.pt"], prog="x", description="")
    assert (val.conf_thres, val.iou_thres, val.max_det) == (0.001, 0.6, 300)
    assert (val.imgsz, val.data) == (None, "")  # the checkpoint's own
    detect = parse(
        DetectConfig, ["--weights", "a.pt", "--source", "b.jpg"], prog="x", description=""
    )
    assert (detect.conf_thres, detect.iou_thres, detect.max_det) == (0.25, 0.45, 1000)
    assert detect.image_size is None
