"""A run that was stopped and resumed ends in the very state of one that was not."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest
import torch
import yaml
from torch import nn

from engine import distributed
from engine.checkpoint import load_checkpoint, load_detector, save_checkpoint
from engine.train import loop, step
from engine.train.config import TrainConfig
from engine.train.loop import fit
from engine.train.optimizer import Schedule
from engine.train.setup import prepare_run
from models.builder import build_detector
from models.yaml.parser import load_spec
from utils.config import parse
from utils.errors import TerminatedError, UserError
from utils.hyp import Hyperparameters

TIMES = ("train_seconds", "val_seconds", "images_per_second", "data_wait_share")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# two batches per update: after an epoch of three a gradient waits
HYP = {"warmup_epochs": 0.0, "nbs": 8.0, "min_updates": 0.0, "mosaic": 0.5, "mixup": 0.3}


@pytest.fixture(scope="module")
def flags(tmp_path_factory, rectangles, tiny_model):
    """Flags of three epochs of three batches, in a folder of this module."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "hyp.yaml").write_text(yaml.safe_dump(HYP))
    return [
        *("--data", rectangles, "--cfg", tiny_model, "--imgsz", "64", "--batch", "4", "--epochs"),
        *("3", "--workers", "0", "--device", "cpu", "--project", folder, "--noplots"),
        *("--hyp", folder / "hyp.yaml"),
    ]


def settings(flags, *more):
    argv = [*map(str, flags), *map(str, more)]
    return parse(TrainConfig, argv, prog="train.py", description="")


@pytest.fixture(scope="module")
def straight(flags):
    """The folder of a run that was never stopped; its last.pt keeps the training state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "strip_checkpoint", lambda path: None)
        fit(settings(flags, "--name", "straight"))
    return flags[-1].parent / "straight"


@pytest.fixture(scope="module")
def stopped_once(flags):
    """The folder of a run that SIGTERM stopped in the second epoch."""

    def draw(run, batch):
        if run.state.epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "draw_batch", draw)
        with pytest.raises(TerminatedError):
            fit(settings(flags, "--name", "once"))
    return flags[-1].parent / "once"


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A copy of it."""
    return shutil.copytree(stopped_once, tmp_path / "runs" / "exp")


def prepared(config, given=()):
    with ExitStack() as locks:
        return prepare_run(config, distributed.start("cpu"), locks, given=given)


def same(first, second, where="state"):
    """Assert bitwise equality of nested values, the wall clock's columns aside."""
    if isinstance(first, torch.Tensor):
        torch.testing.assert_close(first, second, rtol=0, atol=0, msg=where)
    elif isinstance(first, (list, tuple)):
        same(dict(enumerate(first)), dict(enumerate(second)), where)
    elif isinstance(first, dict):
        keys = set(first) - set(TIMES)
        assert keys == set(second) - set(TIMES), where
        for key in keys:
            same(first[key], second[key], f"{where}.{key}")
    else:
        assert first == second or (first != first and second != second), where


def same_end(first, second):
    """The same weights, state and rows in two runs' last.pt."""
    states = [load_checkpoint(folder / "weights" / "last.pt") for folder in (first, second)]
    for saved in states:
        del saved["train_state"]["config"]  # the folders differ
    for key in ("train_state", "model", "epoch", "names", "spec"):
        same(states[0][key], states[1][key], key)


@pytest.mark.parametrize(("epoch", "index"), [(0, 0), (1, 1), (1, 2)])
def test_sigterm_mid_epoch_then_resume_is_exact(
    flags, straight, tmp_path, signal_at, keep_state, rows_of, epoch, index
):
    signal_at(epoch, index, signal.SIGTERM)
    with pytest.raises(TerminatedError):
        fit(settings(flags, "--project", tmp_path))
    saved = load_checkpoint(tmp_path / "exp" / "weights" / "last.pt")["train_state"]
    assert (saved["epoch"], saved["batches"]) == (epoch, index + 1)
    assert saved["pending"] == (index < 2)
    fit(TrainConfig(resume=str(tmp_path / "exp")))
    same_end(straight, tmp_path / "exp")
    assert [row["epoch"] for row in rows_of(tmp_path / "exp")] == ["0", "1", "2"]


@pytest.mark.parametrize("cache", ["none", "device"])
def test_images_composed_on_the_device_train_the_same_and_resume_exactly(
    flags, straight, tmp_path, monkeypatch, signal_at, keep_state, rows_of, capsys, cache
):
    monkeypatch.setattr("data.loading.loader.POOL", 4)  # of 10 images
    more = ["--augment", "device", "--cache", cache]
    fit(settings(flags, *more, "--project", tmp_path / "whole"))
    line = f"cache: {cache} (0.0 .*; training images are composed on the device"
    assert re.search(line.replace("(", r"\("), capsys.readouterr().out)
    signal_at(1, 1, signal.SIGTERM)
    with pytest.raises(TerminatedError):
        fit(settings(flags, *more, "--project", tmp_path / "stopped"))
    fit(TrainConfig(resume=str(tmp_path / "stopped" / "exp")))
    same_end(tmp_path / "whole" / "exp", tmp_path / "stopped" / "exp")
    fit(settings(flags, "--project", tmp_path / "cpu"))
    rows = zip(rows_of(tmp_path / "whole" / "exp"), rows_of(tmp_path / "cpu" / "exp"), strict=True)
    for ours, theirs in rows:
        for name in ("train/box_loss", "train/obj_loss", "train/cls_loss"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=0.02)


def test_a_signal_during_validation_repeats_the_validation(
    flags, straight, tmp_path, monkeypatch, keep_state, rows_of
):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", lambda *_, **__: os.kill(os.getpid(), signal.SIGHUP))
        with pytest.raises(TerminatedError) as ended:
            fit(settings(flags, "--project", tmp_path))
    assert ended.value.exit_code == 128 + signal.SIGHUP
    saved = load_checkpoint(tmp_path / "exp" / "weights" / "last.pt")["train_state"]
    assert (saved["epoch"], saved["batches"], saved["rows"]) == (0, 3, [])
    fit(TrainConfig(resume=str(tmp_path / "exp" / "weights" / "last.pt")))
    same_end(straight, tmp_path / "exp")
    first, second, _ = rows_of(tmp_path / "exp")
    assert first["images_per_second"] == first["train_seconds"] == ""  # nothing was trained
    assert float(second["images_per_second"]) > 0
    assert float(first["val_seconds"]) > 0


def test_the_same_seed_twice_is_bitwise_equal(flags, straight, tmp_path, keep_state):
    fit(settings(flags, "--project", tmp_path, "--workers", 1))
    same_end(straight, tmp_path / "exp")


def test_kill_minus_nine_then_resume_is_exact(flags, straight, tmp_path, keep_state, rows_of):
    """SIGKILL right after the first epoch's checkpoint, in a process of its own."""
    script = (
        "import sys, torch\nfrom engine.train import step\nimport train, os, signal\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "def draw(run, batch):\n"
        "    if run.state.epoch == run.state.batches == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "step.draw_batch = draw\ntrain.main(sys.argv[1:])\n"
    )
    argv = [*map(str, flags), "--project", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    killed = tmp_path / "exp"
    assert load_checkpoint(killed / "weights" / "last.pt")["epoch"] == 1
    (killed / "results.csv").write_text("cut off")  # the state knows the rows
    leftover = killed / "weights" / ".last.pt.01234567.tmp"
    leftover.write_bytes(b"half")
    fit(TrainConfig(resume=str(killed)))
    same_end(straight, killed)
    assert [row["epoch"] for row in rows_of(killed)] == ["0", "1", "2"]
    assert not leftover.exists()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_to_all_processes_of_a_run_leaves_a_checkpoint(flags, tmp_path, number, code):
    """As Ctrl-C, batch systems and terminals send it: to the loading processes as well."""
    more = ["--epochs", "500", "--project", str(tmp_path), "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "train.py", *map(str, flags), *more],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    results = tmp_path / "exp" / "results.csv"
    deadline = time.monotonic() + 120
    while not results.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert "continue with: --resume" in errors
    load_checkpoint(tmp_path / "exp" / "weights" / "last.pt")


def test_a_reader_that_goes_away_costs_no_epoch(flags, tmp_path, monkeypatch):
    """`train.py | head -1`: the first table that cannot be printed ends the run, which is saved."""
    real = loop.say

    def broken(text):
        real(text)
        if "mAP50" in text:
            raise BrokenPipeError

    monkeypatch.setattr(loop, "say", broken)
    with pytest.raises(BrokenPipeError):
        fit(settings(flags, "--project", tmp_path, "--nosave"))
    saved = load_checkpoint(tmp_path / "exp" / "weights" / "last.pt")
    assert (saved["epoch"], saved["train_state"]["batches"]) == (1, 0)
    assert len(saved["train_state"]["rows"]) == 1


def test_resume_takes_the_newest_run_and_its_settings(stopped):
    run = prepared(TrainConfig(resume="newest", project=str(stopped.parent)), ["resume", "project"])
    assert run.folder == stopped
    assert (run.config.epochs, run.config.imgsz, run.config.batch_size) == (3, 64, 4)
    assert run.hyp.nbs == 8
    assert (run.state.epoch, run.state.batches) == (1, 1)


def test_what_is_typed_on_resume_is_applied_or_refused():
    saved = TrainConfig(epochs=300, optimizer="AdamW", batch_size=32, lr_scale=("backbone=0.1",))
    typed = TrainConfig(resume="x", workers=1, device="cpu", epochs=400, patience=5, batch_size=32)
    given = ("resume", "workers", "device", "epochs", "patience", "batch_size")
    found = typed.resumed_as(saved, given)
    assert (found.workers, found.device, found.epochs, found.patience) == (1, "cpu", 400, 5)
    assert (found.optimizer, found.batch_size, found.lr_scale) == ("AdamW", 32, ("backbone=0.1",))
    # values that happen to be the defaults count as well, when they are typed
    default = TrainConfig(resume="x")
    assert default.resumed_as(saved, ("resume", "epochs")).epochs == 100
    assert default.resumed_as(saved, ("resume",)).epochs == 300
    with pytest.raises(
        UserError, match=r"--batch-size 16 \(it has 32\), --optimizer auto \(it has AdamW\)"
    ):
        default.resumed_as(saved, ("resume", "optimizer", "batch_size"))
    with pytest.raises(UserError, match=r"--lr-scale .*backbone=0\.2.*\(it has .*backbone=0\.1"):
        TrainConfig(lr_scale=("backbone=0.2",)).resumed_as(saved, ("lr_scale",))
    chosen = TrainConfig(hyp="small", optimizer="AdamW", auto=("hyp", "optimizer"))
    found = default.resumed_as(chosen, ("resume", "hyp", "optimizer"))  # auto, as before
    assert (found.hyp, found.optimizer, found.auto) == ("small", "AdamW", chosen.auto)


def rates_of(row):
    return [float(row[f"x/lr{group}"]) for group in range(3)]


def test_epochs_on_resume_prolong_the_run_and_its_schedule(stopped, rows_of):
    fit(TrainConfig(resume=str(stopped), epochs=4))
    rows = rows_of(stopped)
    assert [row["epoch"] for row in rows] == ["0", "1", "2", "3"]
    plan = Schedule(Hyperparameters(**HYP), epochs=4, steps_per_epoch=3, batch_size=4)
    for epoch, row in list(enumerate(rows))[1:]:
        assert rates_of(row) == pytest.approx(plan.at(epoch * 3).lr, rel=1e-4)
    with pytest.raises(UserError, match="this run is finished"):
        fit(TrainConfig(resume=str(stopped), epochs=9))


def test_a_run_is_not_shortened_below_what_is_done(stopped):
    saved = load_checkpoint(stopped / "weights" / "last.pt")
    save_checkpoint(stopped / "weights" / "last.pt", {**saved, "epoch": 2})
    with pytest.raises(UserError, match="--epochs 1: 2 epochs of the run are done already"):
        fit(TrainConfig(resume=str(stopped), epochs=1))


def test_resume_refuses_changed_data(stopped, rectangles, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(rectangles.parent, copy)
    text = (copy / "train.json").read_text()
    (copy / "train.json").write_text(text.replace('"category_id": 1', '"category_id": 2', 1))
    with pytest.raises(UserError, match="train data changed"):
        fit(TrainConfig(resume=str(stopped), data=str(copy / rectangles.name)))


def test_resume_refuses_other_numbers_of_images(stopped):
    """As when damage was found meanwhile; older checkpoints do not state them."""
    last = stopped / "weights" / "last.pt"
    saved = load_checkpoint(last)
    data = saved["train_state"]["data_info"]
    train, val = data["images"]
    data["images"] = [train + 1, val]
    save_checkpoint(last, saved)
    with pytest.raises(UserError, match=rf"images changed .*\[{train + 1}, {val}\] -> "):
        prepared(TrainConfig(resume=str(stopped)))
    del data["images"]
    save_checkpoint(last, saved)
    assert prepared(TrainConfig(resume=str(stopped))).folder == stopped


def test_a_second_process_on_a_run_is_refused_until_the_first_ends(flags, stopped):
    script = (
        "import pathlib, sys, time\nfrom utils.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n    print('locked', flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script, str(stopped)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        for config in (
            TrainConfig(resume=str(stopped)),
            settings(flags, "--project", stopped.parent, "--exist-ok"),
        ):
            with pytest.raises(UserError, match=f"{stopped}: another process is using this folder"):
                prepared(config)
        other.kill()
        other.wait()
    assert prepared(TrainConfig(resume=str(stopped))).folder == stopped


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data_info", None),
        ("epoch", "x"),
        ("epoch", 99),
        ("batches", -1),
        ("pending", 2.5),
        ("rows", [1]),
        ("rows", [{"epoch": "first"}]),
        ("gradients", [None]),
        ("gradients", [torch.zeros(1)] * 31),
        ("losses", torch.zeros(2)),
        ("best_fitness", "high"),
        ("model", {}),
        ("ema", {"updates": 1}),
        ("optimizer", {"state": {}, "param_groups": []}),
        ("momentum_buffer", torch.zeros(1)),
        ("config", {"epochs": "many"}),
        ("config", {"epoch": 3}),
    ],
)
def test_a_damaged_state_is_named_with_its_file(stopped, key, value):
    last = stopped / "weights" / "last.pt"
    saved = load_checkpoint(last)
    state = saved["train_state"]
    state["pending"] = 1
    (state["optimizer"]["state"][0] if key == "momentum_buffer" else state)[key] = value
    save_checkpoint(last, saved)
    with pytest.raises(UserError, match=r"last\.pt: its (training state is damaged|settings)"):
        prepared(TrainConfig(resume=str(stopped)))


def test_resume_without_any_run(tmp_path):
    with pytest.raises(UserError, match="no run"):
        fit(TrainConfig(resume="newest", project=str(tmp_path)))
    with pytest.raises(UserError, match="does not exist"):
        fit(TrainConfig(resume=str(tmp_path / "last.pt")))


def test_a_run_from_backbone_weights_resumes_exactly(
    flags, tiny_model, tmp_path, signal_at, keep_state, rows_of, capsys
):
    torch.manual_seed(7)
    source, file = build_detector(load_spec(str(tiny_model)), classes=2), tmp_path / "backbone.pth"
    torch.save(nn.Sequential(*list(source.layers)[:6], nn.Linear(64, 10)).state_dict(), file)
    more = ("--backbone-weights", file, "--lr-scale", "backbone=0.1", "head=2", "--epochs", 2)
    fit(settings(flags, *more, "--project", tmp_path, "--name", "whole"))
    report = capsys.readouterr().out
    assert "into the backbone: 100.0 % of" in report
    assert "2 tensors, 650 (6)" in report
    signal_at(1, 1, signal.SIGTERM)
    with pytest.raises(TerminatedError):
        fit(settings(flags, *more, "--project", tmp_path))
    file.unlink()  # a resumed run has no need of it
    run = tmp_path / "exp"
    fit(TrainConfig(resume=str(run)))
    same_end(tmp_path / "whole", run)
    saved = load_checkpoint(run / "weights" / "last.pt")
    groups = saved["train_state"]["optimizer"]["param_groups"]
    assert [group["lr_scale"] for group in groups] == [1.0] * 3 + [0.1] * 3 + [2.0] * 3
    plan = Schedule(Hyperparameters(**HYP), epochs=2, steps_per_epoch=3, batch_size=4)
    for epoch, row in enumerate(rows_of(run)):  # the rates with scale 1
        assert rates_of(row) == pytest.approx(plan.at(epoch * 3).lr, rel=1e-4)
    # the trained weights are near those of the file: its rate was small, the start was theirs
    start = source.layers[0].conv.weight
    loaded = load_detector(run / "weights" / "best.pt", device="cpu")
    assert loaded.spec.normalisation == IMAGENET
    assert (loaded.layers[0].conv.weight - start).abs().max() < 0.05 * start.abs().max()
    assert "normalisation" in (run / "spec.yaml").read_text()
