"""Two CPU ranks under torchrun (gloo): the same gradients, whole runs, signals, lost ranks."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engine.checkpoint import load_checkpoint

GRADIENTS = Path(__file__).with_name("ddp_gradients.py")


def torchrun(*argv, ranks=2, **keywords):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **keywords.pop("env", {})}
    return subprocess.Popen(
        [*command, "--nproc_per_node", str(ranks), *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        **keywords,
    )


def finish(process, seconds=180):
    try:
        out, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, errors


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    assert condition(), finish(process, 30)


def rank_pids(process):
    """The processes that torchrun started (its children that run train.py)."""
    found = []
    for line in subprocess.run(
        ["ps", "-o", "pid=,ppid=,args=", "-e"], capture_output=True, text=True, check=True
    ).stdout.splitlines():
        pid, parent, text = line.split(None, 2)
        if int(parent) == process.pid and "train.py" in text:
            found.append(int(pid))
    return sorted(found)


def rows_of(folder):
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_gradients_equal_those_of_one_rank(tiny_model, tmp_path):
    """Unequal numbers of boxes, a rank without any, none at all, several batches per update."""
    path = {"PYTHONPATH": str(Path.cwd())}
    code, _, errors = finish(torchrun(GRADIENTS, tiny_model, tmp_path / "two.pt", env=path))
    assert code == 0, errors
    command = [sys.executable, GRADIENTS, tiny_model, tmp_path / "one.pt"]
    subprocess.run(command, env={**os.environ, **path}, check=True)
    two, one = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("two", "one"))
    cases = ("equal", "unequal", "one without", "none", "accumulated")
    assert list(one) == [
        f"{head}: {case}" for head in ("anchor", "free", "free-e2e") for case in cases
    ]
    for case, gradients in one.items():
        for key, gradient in gradients.items():
            error = (two[case][key] - gradient).norm()
            assert error <= 1e-5 * gradient.norm(), f"{case}: {key}"
        assert sum(float(gradient.norm()) for gradient in gradients.values()) > 0


def test_two_ranks_train_validate_and_save_once(train_flags, tmp_path):
    """10 training and 5 validation images: neither number is one of whole batches per rank."""
    code, out, errors = finish(torchrun("train.py", *train_flags, "--epochs", "2"))
    assert code == 0, errors
    folder = tmp_path / "runs" / "exp"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["exp"]
    assert [row["epoch"] for row in rows_of(folder)] == ["0", "1"]
    assert out.count("settings:") == 1
    best = folder / "weights" / "best.pt"
    assert load_checkpoint(best)["environment"]["ranks"] == 2
    flags = ("--data", train_flags[1], "--img", "64", "--project", tmp_path / "val")
    command = [sys.executable, "val.py", "--weights", best, *flags]
    one = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    both = [text[text.rindex("mAP50-95") :].splitlines()[1].split() for text in (out, one)]
    assert both[0] == both[1]  # what one rank measures
    assert both[0][:2] == ["all", "5"]


@pytest.mark.slow
def test_sigterm_to_torchrun_leaves_one_whole_checkpoint(train_flags, tmp_path):
    process = torchrun("train.py", *train_flags, "--epochs", "300")
    folder = tmp_path / "runs" / "exp"
    wait_for((folder / "results.csv").exists, process)
    process.send_signal(signal.SIGTERM)
    code, _, errors = finish(process)
    assert code != 0
    assert errors.count("continue with: --resume") == 1
    saved = load_checkpoint(folder / "weights" / "last.pt")
    assert saved["train_state"] is not None
    assert not list((folder / "weights").glob("*tmp*"))
    again = torchrun("train.py", "--resume", folder, "--device", "cpu")
    wait_for(lambda: len(rows_of(folder)) > saved["train_state"]["epoch"], again)
    again.send_signal(signal.SIGTERM)
    finish(again)
    epochs = [int(row["epoch"]) for row in rows_of(folder)]
    assert epochs == list(range(len(epochs)))


@pytest.mark.slow
def test_a_killed_rank_ends_all_ranks(train_flags, tmp_path):
    process = torchrun("train.py", *train_flags, "--epochs", "500", "--ddp-timeout", "30")
    wait_for((tmp_path / "runs" / "exp" / "results.csv").exists, process)
    pids = rank_pids(process)
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    code, _, _ = finish(process, 90)
    assert code != 0
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    load_checkpoint(tmp_path / "runs" / "exp" / "weights" / "last.pt")


@pytest.mark.slow
def test_a_rank_that_stays_away_ends_the_run_within_the_timeout(train_flags, tmp_path):
    script = tmp_path / "late.py"
    script.write_text(
        "import os, sys, time\nimport train\nfrom engine.train import step\n"
        "def draw(run, batch):\n"
        "    if run.world.rank == 1:\n        time.sleep(300)\n"
        "step.draw_batch = draw\n"
        "from utils.errors import run_script\nrun_script(train.main)\n"
    )
    process = torchrun(
        *(script, *train_flags, "--epochs", "1", "--ddp-timeout", "5"),
        env={"PYTHONPATH": str(Path.cwd())},
    )
    started = time.monotonic()
    code, _, errors = finish(process)
    assert code != 0
    assert "another rank ended or did not answer within 5 s" in errors, errors
    assert time.monotonic() - started < 90
