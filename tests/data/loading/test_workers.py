"""Loader processes that die, and a /dev/shm that is small, full or read-only."""

from __future__ import annotations

import multiprocessing
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import data.loading.workers as workers_module
from data.index.dataset import load_dataset_config, load_split
from data.loading.loader import LoaderConfig, ValLoader
from data.loading.sample import Batch
from utils.errors import FeatherDetError, UserError
from utils.terminal import warn_once

START = """
import os, signal
from data.index.dataset import load_dataset_config, load_split
from data.loading.loader import LoaderConfig, TrainLoader, ValLoader
from utils.hyp import Hyperparameters
index = load_split(load_dataset_config({data!r}), "train")
config = LoaderConfig(image_size=320, batch_size=4, stride=32, workers={workers}, seed=0)
loader = TrainLoader(index, config, Hyperparameters())
"""
SUM = """
batches = [*loader.batches(0), *ValLoader(index, config)]
print(sum(batch.images.sum(dtype=int).item() for batch in batches), flush=True)
"""
KILL = """
next(loader.batches(0))
victim = loader._loader._iterator._workers[1].pid
os.kill(victim, signal.SIGKILL)
try:
    for epoch in range(3):
        list(loader.batches(epoch))
except Exception as error:
    print(victim, type(error).__name__, str(error).strip())
"""


def outcome(program, root, data, *before, workers=2):
    """(stdout, stderr) of a program about loaders in a process that `before` starts."""
    text = START.format(data=str(data), workers=workers) + program
    words = [*before, sys.executable, "-c", text]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.strip(), done.stderr


def test_a_killed_worker_is_named_and_the_program_ends(rectangles, root):
    """Workers ignore SIGTERM, with which multiprocessing ends what is left of them."""
    victim, kind, message = outcome(KILL, root, rectangles)[0].split(" ", 2)
    # torch's handler of SIGCHLD raises RuntimeError where it comes outside the iteration
    assert kind in {"FeatherDetError", "RuntimeError"}
    assert re.search(rf"worker .pid.*{victim}", message)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("size=1m", None),  # a batch has 1.2 MB
        ("size=1m,ro", "images are loaded in the main process"),
    ],
)
def test_a_small_dev_shm_never_hangs(rectangles, root, options, line):
    mount = f'mount -t tmpfs -o {options} tmpfs /dev/shm && exec "$@"'
    unshare = ("unshare", "-m", "sh", "-c", mount, "-")
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no permission to mount a /dev/shm of its own here")
    expected, _ = outcome(SUM, root, rectangles, workers=0)
    total, errors = outcome(SUM, root, rectangles, *unshare)
    assert total == expected, errors
    lines = [item for item in errors.splitlines() if "warning" in item]
    assert len(lines) == (line is not None)
    for item in lines:
        assert line in item
        assert "docker run --shm-size" in item
        assert "--workers" in item


@pytest.fixture
def batches_of(rectangles, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    index = load_split(load_dataset_config(str(rectangles)), "val")

    def make(workers, **changes):
        return ValLoader(index, LoaderConfig(64, 2, 32, workers=workers, seed=0, **changes))

    return make


@pytest.mark.parametrize("workers", [0, 1])
def test_memory_is_used_again_when_nobody_holds_the_batch(batches_of, workers):
    """Held batches stay as they are; those that find no place come through the pipe."""
    expected, loader = list(batches_of(0)), batches_of(workers)
    held = [batch for _ in range(4) for batch in loader]
    for batch, same in zip(held, 4 * expected, strict=True):
        assert torch.equal(batch.images, same.images)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch.targets.boxes, same.targets.boxes)
    del held, batch, same
    assert len({batch.images.data_ptr() for _ in range(4) for batch in loader}) <= 2 * workers + 2
    views = [batch.images[:1] for batch in loader]  # a view keeps the place
    for _ in range(4):
        list(loader)
    assert all(map(torch.equal, views, [batch.images[:1] for batch in expected]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_for_cuda_are_pinned(batches_of, workers):
    for expected, batch in zip(batches_of(0), batches_of(workers, pin_memory=True), strict=True):
        assert batch.images.is_pinned()
        assert batch.targets.boxes.is_pinned()
        assert torch.equal(batch.images, expected.images)


def test_without_semaphores_the_main_process_loads(batches_of, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(multiprocessing, "Lock", refuse)
    warn_once.cache_clear()
    loader = batches_of(2)
    assert [len(batch) for batch in loader] == [len(batch) for batch in loader] == [2, 2, 1]
    lines = capsys.readouterr().err.splitlines()
    assert ["no loader processes (Read-only file system)" in line for line in lines] == [True]


def test_a_batch_that_cannot_be_sent_ends_in_one_line(batches_of, monkeypatch, capfd):
    def fail(self):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Batch, "__reduce__", fail)
    start = time.monotonic()
    with pytest.raises((FeatherDetError, RuntimeError), match=r"worker \(pid"):
        list(batches_of(1))
    assert time.monotonic() - start < 20
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith("a batch cannot be sent: OSError: [Errno 24] Too many open files")


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        ("Too many open files. Communication with ...", UserError, "Too many open files: try ulim"),
        (
            "DataLoader worker (pid(s) 12, 34) exited unexpectedly\nadvice",
            FeatherDetError,
            "a loader process died: worker (pid(s) 12, 34) exited unexpectedly; ",
        ),
    ],
)
def test_what_torch_raises_about_workers_becomes_one_line(words, kind, message):
    with pytest.raises(kind) as caught, workers_module.dead_workers_named():
        raise RuntimeError(words)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_only_own_processes_are_killed_at_exit(batches_of):
    other = multiprocessing.Process(target=time.sleep, args=(60,), daemon=True)
    other.start()
    loader = batches_of(1)
    list(loader)
    (worker,) = loader._loader._iterator._workers
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        workers_module._kill_workers()
        worker.join(10)
        assert not worker.is_alive()
        assert other.is_alive()
    finally:
        other.kill()
        loader._loader._iterator._shutdown_workers()  # torch forgets the process
        signal.signal(signal.SIGCHLD, handler)
