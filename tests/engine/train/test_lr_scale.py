"""Rates of their own by name, ImageNet weights in a run, and both after a resume."""

import csv
import os
import signal

import pytest
import torch
from torch import nn

from engine.checkpoint import load_checkpoint, load_detector
from engine.train import loop
from engine.train.config import TrainConfig
from engine.train.loop import fit
from engine.train.optimizer import (
    apply_rates,
    build_optimizer,
    freeze,
    rate_scales,
    rows_to_freeze,
    trainable,
    update_weights,
)
from engine.train.schedule import Rates, Schedule
from models.builder import build_detector
from models.yaml.parser import load_spec
from utils.config import parse
from utils.errors import TerminatedError, UserError
from utils.hyp import Hyperparameters

HYP = Hyperparameters()
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture
def model(tiny_model):
    torch.manual_seed(0)
    detector = build_detector(load_spec(str(tiny_model)), classes=2)
    return detector.to(memory_format=torch.channels_last)


def by_row(model, scales):
    return {
        row: {scales.get(parameter, 1.0) for parameter in layer.parameters()}
        for row, layer in enumerate(model.layers)
    }


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ((), {}),
        (("backbone=0.1",), dict.fromkeys(range(6), 0.1)),
        (("backbone=0.1", "head=2"), {**dict.fromkeys(range(6), 0.1), 6: 2.0}),
        (("backbone=0.1", "5=0.5"), {**dict.fromkeys(range(5), 0.1), 5: 0.5}),
        (("5=0.5", "backbone=0.1"), dict.fromkeys(range(6), 0.1)),
        (("3=1e-2",), {3: 0.01}),  # one number is that row, not the first three
    ],
)
def test_rows_by_name(model, items, expected):
    assert by_row(model, rate_scales(model, items)) == {
        row: {expected.get(row, 1.0)} for row in range(7)
    }


def test_names_of_rows_and_the_neck():
    detector = build_detector(load_spec("yolov5n"), classes=2)
    found = by_row(detector, rate_scales(detector, ["neck=0.5", "P5=0.25"]))
    assert found[9] == {0.25}
    assert found[10] == {0.5}
    assert found[0] == found[24] == {1.0}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("backbone", "expected NAME=FACTOR"),
        ("=0.1", "expected NAME=FACTOR"),
        ("backbone=x", "expected NAME=FACTOR"),
        ("backbone=-1", "expected NAME=FACTOR"),
        ("backbone=nan", "expected NAME=FACTOR"),
        ("backbone=inf", "expected NAME=FACTOR"),
        ("backbone=0", "use --freeze backbone"),
        ("bakbone=0.1", r"--lr-scale bakbone: neither a row .*did you mean 'backbone'"),
    ],
)
def test_mistakes(model, item, message):
    with pytest.raises(UserError, match=message):
        rate_scales(model, [item])


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_the_scale_multiplies_the_rate_of_every_kind_of_parameter(model, name):
    """Warm-up included; what is not named keeps the schedule's rates."""
    scales = rate_scales(model, ["backbone=0.1"])
    optimizer = build_optimizer(model, name, HYP, weight_decay=0.25, scales=scales)
    assert len(optimizer.param_groups) == 6
    assert set(map(id, trainable(optimizer))) == set(map(id, model.parameters()))
    schedule = Schedule(HYP, epochs=10, steps_per_epoch=50, batch_size=16)
    for step in (0, 40, 149, 150, 499):
        rates = schedule.at(step)
        apply_rates(optimizer, rates)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                kind = 1 if parameter.ndim > 1 else None
                own = [
                    0 if key.endswith("bias") else 2
                    for key, value in model.named_parameters()
                    if value is parameter and kind is None
                ]
                expected = rates.lr[1 if kind else own[0]] * scales.get(parameter, 1.0)
                assert group["lr"] == expected
                assert group["weight_decay"] == (0.25 if kind else 0.0)


def test_a_scaled_step_is_the_fraction_of_an_unscaled_one(model):
    steps = []
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for items in ((), ("backbone=0.5",)):
        with torch.no_grad():
            for parameter, start in zip(model.parameters(), before, strict=True):
                parameter.copy_(start)
        optimizer = build_optimizer(
            model, "SGD", HYP, weight_decay=0.0, scales=rate_scales(model, items)
        )
        for index, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, 1.0 + index)
        apply_rates(optimizer, Rates((0.4, 0.2, 0.1), 0.9, 1))
        update_weights(optimizer, NO_SCALER, max_norm=0)
        steps.append([p.detach() - b for p, b in zip(model.parameters(), before, strict=True)])
    names = [name for name, _ in model.named_parameters()]
    for name, whole, scaled in zip(names, *steps, strict=True):
        factor = 1.0 if name.startswith("model.6.") else 0.5
        torch.testing.assert_close(scaled, whole * factor, rtol=1e-4, atol=1e-6, msg=name)
        assert whole.abs().min() > 0


def test_without_scales_the_groups_are_the_three_of_old_checkpoints(model):
    optimizer = build_optimizer(model, "SGD", HYP, weight_decay=0.1)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["lr_scale"]  # as checkpoints from before had it
    optimizer.load_state_dict(saved)
    apply_rates(optimizer, Rates((0.4, 0.2, 0.1), 0.9, 1))
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 0.2, 0.1]


def test_frozen_rows_may_be_scaled(model):
    freeze(model, rows_to_freeze(model.spec, ["backbone"]))
    scales = rate_scales(model, ["backbone=0.1", "head=0.5"])
    optimizer = build_optimizer(model, "SGD", HYP, weight_decay=0.0, scales=scales)
    apply_rates(optimizer, Rates((0.4, 0.2, 0.1), 0.9, 1))
    assert {group["lr"] for group in optimizer.param_groups if group["params"]} == {0.2, 0.1}


def flags(train_flags, hyp, *more):
    argv = [*train_flags, "--hyp", str(hyp), "--epochs", "2", *map(str, more)]
    return parse(TrainConfig, argv, prog="train.py", description="")


@pytest.fixture
def hyp(tmp_path):
    file = tmp_path / "hyp.yaml"
    file.write_text("warmup_epochs: 1.0\nnbs: 8\nmosaic: 0.5\n")
    return file


@pytest.fixture
def backbone(tiny_model, tmp_path):
    """A file with the weights of the six rows of the tiny model's backbone and a classifier."""
    torch.manual_seed(7)
    detector = build_detector(load_spec(str(tiny_model)), classes=2)
    net = nn.Sequential(*list(detector.layers)[:6], nn.Linear(64, 10))
    torch.save(net.state_dict(), tmp_path / "backbone.pth")
    return tmp_path / "backbone.pth", detector.state_dict()


def stop_in_epoch_one(monkeypatch):
    def draw(run, step, batch):
        if (run.state.epoch, step) == (1, 1):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "draw_batch", draw)


def tensors(value, where=""):
    if isinstance(value, torch.Tensor):
        yield where, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors(item, f"{where}[{index}]")


def test_a_run_from_backbone_weights_resumes_exactly(
    train_flags, hyp, backbone, tmp_path, monkeypatch, capsys
):
    file, expected = backbone
    more = ("--backbone-weights", file, "--lr-scale", "backbone=0.1", "head=2")
    states = {}
    monkeypatch.setattr(loop, "strip_checkpoint", lambda path: None)
    fit(flags(train_flags, hyp, *more, "--name", "straight"))
    report = capsys.readouterr().out
    assert "into the backbone: 100.0 % of" in report
    assert "2 tensors, 650 (6)" in report
    with monkeypatch.context() as patch:
        stop_in_epoch_one(patch)
        with pytest.raises(TerminatedError):
            fit(flags(train_flags, hyp, *more, "--name", "stopped"))
    stopped = tmp_path / "runs" / "stopped"
    file.unlink()  # a resumed run has no need of it
    fit(TrainConfig(resume=str(stopped)))
    for name in ("straight", "stopped"):
        states[name] = load_checkpoint(tmp_path / "runs" / name / "weights" / "last.pt")
        assert states[name]["spec"]["normalisation"] == [list(item) for item in IMAGENET]
    pairs = list(zip(tensors(states["straight"]), tensors(states["stopped"]), strict=True))
    assert len(pairs) > 100
    for (where, one), (other_where, other) in pairs:
        assert where == other_where
        assert torch.equal(one, other), where
    groups = states["stopped"]["train_state"]["optimizer"]["param_groups"]
    assert [group["lr_scale"] for group in groups] == [1.0] * 3 + [0.1] * 3 + [2.0] * 3
    with (stopped / "results.csv").open() as rows:
        rates = [[float(row[f"x/lr{i}"]) for i in range(3)] for row in csv.DictReader(rows)]
    with_scale_1 = Schedule(
        Hyperparameters(warmup_epochs=1.0, nbs=8), epochs=2, steps_per_epoch=3, batch_size=4
    )
    for epoch, found in enumerate(rates):
        assert found == pytest.approx(with_scale_1.at(epoch * 3 + 2).lr, rel=1e-4)
    # the trained weights are near those of the file: its rate was small, the start was theirs
    start = expected["model.0.conv.weight"]
    loaded = load_detector(stopped / "weights" / "best.pt", device="cpu")
    assert loaded.spec.normalisation == IMAGENET
    assert (loaded.layers[0].conv.weight - start).abs().max() < 0.05 * start.abs().max()
    assert "normalisation" in (stopped / "spec.yaml").read_text()


def test_resume_refuses_another_scale(train_flags, hyp, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in_epoch_one(patch)
        with pytest.raises(TerminatedError):
            fit(flags(train_flags, hyp, "--lr-scale", "backbone=0.1"))
    with pytest.raises(UserError, match="--lr-scale"):
        fit(TrainConfig(resume=str(tmp_path / "runs" / "exp"), lr_scale=("backbone=0.2",)))


def test_weights_of_another_network_end_the_run(train_flags, hyp, tmp_path):
    torch.save(nn.Sequential(nn.Conv2d(3, 5, 3)).state_dict(), tmp_path / "other.pth")
    wrong = ("--backbone-weights", tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"0\.0 % of the backbone's parameters"):
        fit(flags(train_flags, hyp, *wrong))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--backbone-weights", "a.pth", "--weights", "b.pt"], "exclude each other"),
        (["--allow-partial"], "--backbone-weights, which are not given"),
    ],
)
def test_flags_that_mean_nothing_together(argv, message):
    with pytest.raises(UserError, match=message):
        parse(TrainConfig, argv, prog="train.py", description="")
