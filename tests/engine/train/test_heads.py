"""A whole run with the anchor-free head: files, checkpoint, resume, validation."""

import json
import re

import numpy
import pytest
import torch

import compare
import train
import val
from engine.checkpoint import load_checkpoint, load_detector, transfer
from engine.predict.predictor import Predictor
from engine.train import loop
from models.builder import build_detector
from models.heads.free import FreeDetect
from models.yaml.parser import load_spec
from utils.errors import UserError


def curves(folder):
    header, *rows = (folder / "results.csv").read_text().splitlines()
    return header.split(","), [row.split(",")[:8] for row in rows]


def test_a_run_with_the_free_head(train_flags, rectangles, tiny_model, tmp_path, capsys):
    runs = tmp_path / "runs"
    flags = [*train_flags, "--head", "free"]
    train.main([*flags, "--epochs", "2", "--name", "whole"])
    assert "AutoAnchor" not in capsys.readouterr().out
    header, rows = curves(runs / "whole")
    assert header[1:4] == ["train/box_loss", "train/side_loss", "train/cls_loss"]
    assert header[8:11] == ["val/box_loss", "val/side_loss", "val/cls_loss"]
    assert all(float(cell) >= 0 for row in rows for cell in row)
    best = runs / "whole" / "weights" / "best.pt"
    model = load_detector(best, device="cpu")
    assert isinstance(model.head, FreeDetect)
    again = load_spec(str(runs / "whole" / "spec.yaml"))
    assert [layer.block for layer in again.layers] == [layer.block for layer in model.spec.layers]
    settings = ["--data", str(rectangles), "--img", "64", "--workers", "0", "--device", "cpu"]
    val.main(["--weights", str(best), *settings, "--noplots", "--project", str(runs)])
    assert "mAP50-95" in capsys.readouterr().out

    own = build_detector(load_spec(str(tiny_model), head="free"), classes=3)
    report = transfer(own, best)
    count = len(own.state_dict())
    assert report.startswith(f"{best}: {count} of the model's {count} tensors loaded")
    anchors = build_detector(load_spec(str(tiny_model)), classes=3)
    report = transfer(anchors, best)  # backbone and neck fit, the head does not
    assert "not in the file: model.6.anchors, model.6.m.0.weight" in report


def test_a_run_without_suppression(train_flags, rectangles, tmp_path, capsys):
    """Both columns of AP, each that of its branch; the parts of the second branch are loaded."""
    runs = tmp_path / "runs"
    train.main([*train_flags, "--head", "free-e2e", "--epochs", "2", "--name", "two"])
    (line,) = re.findall("end to end: .*", capsys.readouterr().out)
    best = runs / "two" / "weights" / "best.pt"
    settings = ["--data", str(rectangles), "--img", "64", "--workers", "0", "--device", "cpu"]
    found = []
    for name, more in (("one", []), ("many", ["--nms"])):
        words = ["--weights", str(best), *settings, "--noplots", "--project", str(runs), *more]
        val.main([*words, "--name", name])
        assert line in capsys.readouterr().out
        document = json.loads((runs / name / "metrics.json").read_text())
        found.append(({key: document[key] for key in ("map50", "map")}, document["other_branch"]))
    (one, many), (again, other) = found
    assert (one, many) == (other, again)
    quick = ["--latency-batches", "1", "--latency-seconds", "0.1", "--project", str(runs)]
    compare.main(["--weights", str(best), *settings, *quick, "--name", "table"])
    (record,) = (runs / "table" / "records").glob("*.json")
    assert json.loads(record.read_text())["metrics"]["other_branch"] == pytest.approx(many)
    whole = load_detector(best, device="cpu")
    with pytest.raises(ValueError, match="only the end-to-end branch is left"):
        load_detector(best, device="cpu", fuse=True).fuse(nms=True)
    images = torch.rand(1, 3, 64, 64)
    raw = whole(images)
    assert len(raw) == 2 * len(whole.stride)
    for nms, part in ((False, raw[3:]), (True, raw[:3])):
        single = load_detector(best, device="cpu").fuse(nms=nms)
        assert (single.end_to_end, single.has_branches) == (not nms, True)
        for mine, expected in zip(single(images), part, strict=True):
            torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)
    image = numpy.zeros((64, 64, 3), numpy.uint8)
    flags = {"image_size": 64, "device": "cpu", "conf": 0.0}
    assert len(Predictor(best, **flags)(image).detections) == 8 * 8 + 4 * 4 + 2 * 2
    assert len(Predictor(best, **flags, use_nms=True, iou=0.01)(image).detections) < 84


def test_a_resumed_run_is_the_same(train_flags, tmp_path, monkeypatch):
    flags = [*train_flags, "--head", "free-e2e", "--optimizer", "MuSGD", "--epochs", "2"]
    train.main([*flags, "--name", "whole"])
    close = loop._close_epoch

    def stop_after(run, row, *rest):
        close(run, row, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_close_epoch", stop_after)
    with pytest.raises(KeyboardInterrupt):
        train.main([*flags, "--name", "stopped"])
    monkeypatch.setattr(loop, "_close_epoch", close)
    train.main(["--resume", str(tmp_path / "runs" / "stopped"), "--device", "cpu", "--noplots"])
    one, two = (
        load_checkpoint(tmp_path / "runs" / name / "weights" / "last.pt")["model"]
        for name in ("whole", "stopped")
    )
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_settings_of_another_head_are_refused(train_flags):
    with pytest.raises(UserError, match="soft already"):
        train.main([*train_flags, "--head", "free", "--label-smoothing", "0.1"])
