"""A whole run with the anchor-free head: files, checkpoint, resume, validation."""

import pytest
import torch

import train
import val
from engine.checkpoint import load_checkpoint, load_detector, transfer
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


def test_a_resumed_run_is_the_same(train_flags, tmp_path, monkeypatch):
    flags = [*train_flags, "--head", "free", "--epochs", "2"]
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
