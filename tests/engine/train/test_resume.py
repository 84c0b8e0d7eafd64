"""A run that was stopped and resumed ends in the very state of one that was not."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest
import torch

from engine.checkpoint import load_checkpoint
from engine.train import loop
from engine.train.config import TrainConfig
from engine.train.loop import fit
from engine.train.setup import prepare_run
from utils.config import parse
from utils.errors import TerminatedError, UserError

TIMES = ("train_seconds", "val_seconds", "images_per_second", "data_wait_share")


@pytest.fixture
def hyp(tmp_path):
    """Two batches per update: an epoch of three ends with a gradient waiting."""
    file = tmp_path / "hyp.yaml"
    file.write_text("warmup_epochs: 1.0\nnbs: 8\nmosaic: 0.5\nmixup: 0.3\n")
    return file


@pytest.fixture
def keep_state(monkeypatch):
    monkeypatch.setattr(loop, "strip_checkpoint", lambda path: None)


def config(flags, hyp, *more):
    argv = [*flags, "--hyp", str(hyp), "--epochs", "3", *map(str, more)]
    return parse(TrainConfig, argv, prog="train.py", description="")


def interrupt_at(monkeypatch, epoch, index, number):
    """Send `number` to this process while batch `index` of `epoch` is under way."""

    def draw(run, step, batch):
        if (run.state.epoch, step) == (epoch, index):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(loop, "draw_batch", draw)


def same(first, second, where="state"):
    """Assert bitwise equality of nested values, the wall clock's columns aside."""
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype, where
        assert torch.equal(first, second), f"{where}: {(first - second).abs().max()}"
    elif isinstance(first, dict):
        keys = set(first) - set(TIMES)
        assert keys == set(second) - set(TIMES), where
        for key in keys:
            same(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, pair in enumerate(zip(first, second, strict=True)):
            same(*pair, f"{where}[{index}]")
    else:
        assert first == second or (first != first and second != second), (
            f"{where}: {first} {second}"
        )


def whole_state(folder):
    saved = load_checkpoint(folder / "weights" / "last.pt")
    del saved["train_state"]["config"]  # the folders differ
    return {key: saved[key] for key in ("train_state", "model", "epoch", "names", "spec")}


def epochs_of(folder):
    with (folder / "results.csv").open() as file:
        return [int(row["epoch"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize(("epoch", "index"), [(0, 0), (1, 1), (1, 2)])
def test_sigterm_mid_epoch_then_resume_is_exact(
    train_flags, hyp, tmp_path, monkeypatch, keep_state, epoch, index
):
    fit(config(train_flags, hyp, "--name", "straight"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, epoch, index, signal.SIGTERM)
        with pytest.raises(TerminatedError):
            fit(config(train_flags, hyp, "--name", "stopped"))
    stopped = tmp_path / "runs" / "stopped"
    at_stop = load_checkpoint(stopped / "weights" / "last.pt")["train_state"]
    assert (at_stop["epoch"], at_stop["batches"]) == (epoch, index + 1)
    fit(TrainConfig(resume=str(stopped)))
    same(whole_state(tmp_path / "runs" / "straight"), whole_state(stopped))
    assert epochs_of(stopped) == [0, 1, 2]


def test_the_stop_falls_between_accumulated_gradients(train_flags, hyp, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 0, 0, signal.SIGINT)
    flat = tmp_path / "flat.yaml"
    flat.write_text("warmup_epochs: 0\nnbs: 8\n")
    with pytest.raises(KeyboardInterrupt):
        fit(config(train_flags, flat, "--name", "stopped"))
    saved = load_checkpoint(tmp_path / "runs" / "stopped" / "weights" / "last.pt")["train_state"]
    assert saved["pending"] == 1
    assert any(gradient.abs().max() > 0 for gradient in saved["gradients"])


def test_a_signal_during_validation_repeats_the_validation(
    train_flags, hyp, tmp_path, monkeypatch, keep_state
):
    fit(config(train_flags, hyp, "--name", "straight"))
    with monkeypatch.context() as patch:

        def killed(*_args, **_keywords):
            os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(loop, "evaluate", killed)
        with pytest.raises(TerminatedError):
            fit(config(train_flags, hyp, "--name", "stopped"))
    stopped = tmp_path / "runs" / "stopped"
    saved = load_checkpoint(stopped / "weights" / "last.pt")["train_state"]
    assert (saved["epoch"], saved["batches"], saved["rows"]) == (0, 3, [])
    fit(TrainConfig(resume=str(stopped / "weights" / "last.pt")))
    same(whole_state(tmp_path / "runs" / "straight"), whole_state(stopped))


def test_the_same_seed_twice_is_bitwise_equal(train_flags, hyp, tmp_path, keep_state):
    fit(config(train_flags, hyp, "--name", "one"))
    fit(config(train_flags, hyp, "--name", "two", "--workers", 1))
    same(whole_state(tmp_path / "runs" / "one"), whole_state(tmp_path / "runs" / "two"))


def test_kill_minus_nine_then_resume_is_exact(train_flags, hyp, tmp_path, monkeypatch, keep_state):
    """SIGKILL right after the first epoch's checkpoint, in a process of its own."""
    fit(config(train_flags, hyp, "--name", "straight"))
    script = (
        "import sys, torch\nfrom engine.train import loop\nimport train, os, signal\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "def draw(run, step, batch):\n"
        "    if run.state.epoch == 1 and step == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "loop.draw_batch = draw\ntrain.main(sys.argv[1:])\n"
    )
    argv = [*train_flags, "--hyp", str(hyp), "--epochs", "3", "--name", "killed"]
    done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    killed = tmp_path / "runs" / "killed"
    saved = load_checkpoint(killed / "weights" / "last.pt")
    assert saved["epoch"] == 1
    (killed / "results.csv").write_text("torn")  # the state knows the rows
    fit(TrainConfig(resume=str(killed)))
    same(whole_state(tmp_path / "runs" / "straight"), whole_state(killed))
    assert epochs_of(killed) == [0, 1, 2]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_all_processes_of_a_run_leaves_a_checkpoint(
    train_flags, hyp, tmp_path, number, code
):
    """As Ctrl-C and batch systems send it: to the script and its loading processes alike."""
    flags = ["--hyp", str(hyp), "--epochs", "500", "--name", "stopped", "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "train.py", *train_flags, *flags],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    results = tmp_path / "runs" / "stopped" / "results.csv"
    deadline = time.monotonic() + 120
    while not results.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    sent = time.monotonic()
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - sent < 10
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert "continue with: --resume" in errors
    load_checkpoint(tmp_path / "runs" / "stopped" / "weights" / "last.pt")


@pytest.fixture
def stopped_run(train_flags, hyp, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, 0, signal.SIGTERM)
        with pytest.raises(TerminatedError):
            fit(config(train_flags, hyp))
    return tmp_path / "runs" / "exp"


def test_resume_takes_the_newest_run_and_its_settings(stopped_run, tmp_path):
    resumed = TrainConfig(resume="newest", project=str(tmp_path / "runs"))
    run = prepare_run(resumed, loop.distributed.start("cpu"), ExitStack())
    assert run.folder == stopped_run
    assert (run.config.epochs, run.config.imgsz, run.config.batch_size) == (3, 64, 4)
    assert run.hyp.nbs == 8
    assert (run.state.epoch, run.state.batches) == (1, 1)


def test_resume_refuses_other_settings_but_takes_other_places(stopped_run):
    with pytest.raises(UserError, match=r"--optimizer Adam \(it has SGD\)"):
        fit(TrainConfig(resume=str(stopped_run), optimizer="Adam"))


def test_resume_refuses_changed_data(stopped_run, rectangles, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(rectangles.parent, copy)
    text = (copy / "train.json").read_text()
    (copy / "train.json").write_text(text.replace('"category_id": 1', '"category_id": 2', 1))
    with pytest.raises(UserError, match="train data changed"):
        fit(TrainConfig(resume=str(stopped_run), data=str(copy / rectangles.name)))


def test_resume_of_a_finished_run(train_flags, hyp, tmp_path):
    fit(config(train_flags, hyp))
    with pytest.raises(UserError, match="finished"):
        fit(TrainConfig(resume=str(tmp_path / "runs" / "exp")))


def test_resume_without_any_run(tmp_path):
    with pytest.raises(UserError, match="no run"):
        fit(TrainConfig(resume="newest", project=str(tmp_path)))
    with pytest.raises(UserError, match="does not exist"):
        fit(TrainConfig(resume=str(tmp_path / "last.pt")))
