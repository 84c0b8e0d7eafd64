"""Whole runs from settings to files."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import yaml

from engine.checkpoint import load_checkpoint, load_detector
from engine.distributed import Distributed
from engine.train import loop, step
from engine.train.config import TrainConfig
from engine.train.loop import fit, reproducible
from engine.train.setup import check_world
from engine.train.state import NonFiniteError
from models.builder import build_detector
from models.yaml.parser import load_spec
from utils.errors import FeatherDetError, UserError

LOSSES = ("train/box_loss", "train/obj_loss", "train/cls_loss")


def test_a_run_leaves_all_its_files(settings, tmp_path, capsys, rows_of):
    config = settings("--epochs", 2, "--save-period", 1, "--profile", "--cos-lr")
    result = fit(dataclasses.replace(config, noplots=False))
    metrics = result.metrics
    folder = tmp_path / "runs" / "exp"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names >= {
        *("weights/last.pt", "weights/best.pt", "weights/epoch0.pt", "weights/epoch1.pt"),
        *("opt.yaml", "hyp.yaml", "spec.yaml", "results.csv", "results.png", "labels.jpg"),
        *("train_batch0.jpg", "train_batch1.jpg", "train_batch2.jpg"),
        *("PR_curve.png", "F1_curve.png", "P_curve.png", "R_curve.png", "confusion_matrix.png"),
        *("val_batch0_labels.jpg", "val_batch0_pred.jpg"),
    }
    rows = rows_of(folder)
    assert [row["epoch"] for row in rows] == ["0", "1"]
    best = max(
        float(r["metrics/mAP_0.5"]) * 0.1 + float(r["metrics/mAP_0.5:0.95"]) * 0.9 for r in rows
    )
    assert metrics.fitness == pytest.approx(best, abs=1e-6)
    opt = yaml.safe_load((folder / "opt.yaml").read_text())
    assert (opt["imgsz"], opt["hyp"], opt["optimizer"]) == (64, "small", "AdamW")
    assert opt["auto"] == ["hyp", "optimizer"]
    assert yaml.safe_load((folder / "hyp.yaml").read_text())["lr0"] == 0.003
    assert load_spec(str(folder / "spec.yaml")).layers[0].block == "Conv"
    for name in ("last.pt", "best.pt", "epoch0.pt"):
        saved = load_checkpoint(folder / "weights" / name)
        assert saved["train_state"] is None
        assert saved["names"] == ["red", "green", "blue"]
        saved["model"] = list(saved["model"])
        assert str(tmp_path.parent) not in str(saved)  # no path of this machine
        assert saved["config"]["data"] == "rectangles.yaml"
    model = load_detector(str(folder / "weights" / "best.pt"), device="cpu")
    assert model.names == ("red", "green", "blue")
    printed = capsys.readouterr().out
    for word in (
        "--hyp small --optimizer AdamW",
        "settings:",
        "Class",
        "time: data",
        "AutoAnchor",
        str(folder),
    ):
        assert word in printed


def test_without_validation_only_the_last_epoch_is_measured(settings, tmp_path, rows_of):
    fit(settings("--epochs", 2, "--noval", "--nosave"))
    rows = rows_of(tmp_path / "runs" / "exp")
    assert rows[0]["metrics/mAP_0.5"] == ""
    assert rows[1]["metrics/mAP_0.5"] != ""
    assert (tmp_path / "runs" / "exp" / "weights" / "best.pt").is_file()


def test_patience_ends_a_run_that_gets_no_better(settings, tmp_path, monkeypatch, rows_of):
    real = loop._row

    def worse(run, metrics):
        return {**real(run, metrics), "fitness": -run.state.epoch / 100}

    monkeypatch.setattr(loop, "_row", worse)
    fit(settings("--epochs", 9, "--patience", 2))
    assert len(rows_of(tmp_path / "runs" / "exp")) == 3


def test_nan_weights_end_the_run_and_are_never_saved(settings, tmp_path, monkeypatch):
    def poison(run, batch):
        if (run.state.epoch, run.state.batches) == (1, 2):
            with torch.no_grad():
                next(run.state.model.parameters()).fill_(torch.nan)

    monkeypatch.setattr(step, "draw_batch", poison)
    with pytest.raises(NonFiniteError, match="epoch 2, batch 3"):
        fit(settings("--epochs", 3))
    for name in ("last.pt", "best.pt"):
        saved = load_checkpoint(tmp_path / "runs" / "exp" / "weights" / name)
        assert all(bool(value.isfinite().all()) for value in saved["model"].values())


def test_weights_start_a_run_and_frozen_rows_stay(settings, tmp_path):
    fit(settings("--epochs", 1, "--name", "first"))
    best = tmp_path / "runs" / "first" / "weights" / "best.pt"
    # without --cfg the model comes from the checkpoint
    more = ("--cfg", "", "--weights", best, "--freeze", "backbone")
    fit(settings("--epochs", 1, "--name", "second", *more))
    old, new = (
        load_checkpoint(tmp_path / "runs" / name / "weights" / "best.pt")["model"]
        for name in ("first", "second")
    )
    backbone = [key for key in old if key.startswith(tuple(f"model.{row}." for row in range(6)))]
    assert backbone
    assert all(torch.equal(old[key], new[key]) for key in backbone)
    assert any(not torch.equal(old[key], new[key]) for key in old)


@pytest.fixture(scope="module")
def plain_losses():
    """The losses of a run without options, once they are known."""
    return {}


@pytest.mark.parametrize(
    "more",
    [
        ("--multi-scale",),
        ("--rect",),
        ("--optimizer", "AdamW", "--single-cls"),
        ("--close-mosaic", "1", "--label-smoothing", "0.1", "--grad-clip", "0"),
    ],
)
def test_options_train_and_change_the_result(settings, tmp_path, rows_of, plain_losses, more):
    if not plain_losses:
        fit(settings("--epochs", 1, "--name", "plain"))
        plain_losses.update(rows_of(tmp_path / "runs" / "plain")[0])
    fit(settings("--epochs", 1, "--name", "other", *more))
    other = rows_of(tmp_path / "runs" / "other")[0]
    assert [plain_losses[name] for name in LOSSES] != [other[name] for name in LOSSES]
    saved = load_checkpoint(tmp_path / "runs" / "other" / "weights" / "best.pt")
    assert len(saved["names"]) == (1 if "--single-cls" in more else 3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--sync-bn",), "CUDA only"),
        (("--amp", "fp16"), "--amp off"),
        (("--rect", "--multi-scale"), "exclude"),
        (("--freeze", "nowhere"), "neither a row"),
        (("--epochs", "0"), "at least 1"),
        (("--batch", "0"), "positive or -1"),
        (("--hyp", "nosuch"), "no such file"),
        (("--backbone-weights", "a.pth", "--weights", "b.pt"), "exclude each other"),
        (("--allow-partial",), "--allow-partial needs --backbone-weights"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_no_folder(settings, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        fit(settings(*more))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("batch", "message"), [(5, "multiple of their number"), (-1, "one GPU")])
def test_a_batch_that_ranks_cannot_share_is_refused(batch, message):
    with pytest.raises(UserError, match=message):
        check_world(TrainConfig(batch_size=batch), Distributed(torch.device("cpu"), world_size=2))


def test_a_model_without_anchors_gets_those_of_the_data(settings, tiny_model, tmp_path, capsys):
    bare = tmp_path / "bare.yaml"
    text = tiny_model.read_text().splitlines()
    bare.write_text("\n".join("anchors: 2" if line[:7] == "anchors" else line for line in text))
    fit(settings("--cfg", bare, "--epochs", 1, "--noautoanchor"))
    assert "1.0000 with new anchors" in capsys.readouterr().out
    folder = tmp_path / "runs" / "exp"
    head = load_detector(str(folder / "weights" / "best.pt"), device="cpu").head
    sides = head.anchors * torch.tensor(head.stride).view(-1, 1, 1)
    assert sides.shape == (3, 2, 2)
    assert 8 < float(sides.min()) < float(sides.max()) < 50  # boxes are 12 to 40 px
    # spec.yaml is the model as trained
    again = build_detector(load_spec(str(folder / "spec.yaml")), classes=3)
    torch.testing.assert_close(again.head.anchors, head.anchors)


def test_odd_sizes_are_rounded_up_and_reported(settings, tmp_path, capsys):
    fit(settings("--imgsz", 70, "--batch-size", -1, "--epochs", 1))
    captured = capsys.readouterr()
    assert "--imgsz 70 is not a multiple of the stride 32: 96 is used" in captured.err
    assert "on a CPU the batch is 16" in captured.out
    opt = yaml.safe_load((tmp_path / "runs" / "exp" / "opt.yaml").read_text())
    assert (opt["imgsz"], opt["batch_size"]) == (96, 16)


@pytest.mark.parametrize(
    ("more", "expected"), [((), True), (("--multi-scale",), False), (("--rect",), False)]
)
def test_cudnn_measures_kernels_only_where_sizes_repeat(settings, monkeypatch, more, expected):
    """Not before the run is prepared either: the trial batches of --batch-size -1 differ."""
    seen = []

    def noted(config, *_, **__):
        seen.append(torch.backends.cudnn.benchmark)
        return SimpleNamespace(config=config, folder=None, state=SimpleNamespace(rows=[]))

    world = Distributed(torch.device("cuda"))
    monkeypatch.setattr(loop.distributed, "start", lambda *_, **__: world)
    monkeypatch.setattr(loop, "prepare_run", noted)
    monkeypatch.setattr(loop, "announce", lambda run: None)
    monkeypatch.setattr(loop, "_train", noted)
    fit(settings(*more))
    assert seen == [False, expected]
    assert not torch.backends.cudnn.benchmark


def test_a_lost_rank_is_one_line(settings, monkeypatch):
    def lost(*_):
        raise torch.distributed.DistBackendError("NCCL error: remote process exited\nmore")

    monkeypatch.setattr(loop, "_train", lost)
    monkeypatch.setattr(loop.distributed, "is_lost_rank", lambda error: True)
    with pytest.raises(
        FeatherDetError, match=r"rank 0: another rank .* \(NCCL error: .* exited\)$"
    ):
        fit(settings("--epochs", 1))


def test_kernels_are_deterministic_on_a_cpu_while_training():
    with reproducible(torch.device("cpu"), benchmark=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled()
