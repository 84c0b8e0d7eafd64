"""Loader processes where /dev/shm is small, full or read-only, and few files may be open."""

from __future__ import annotations

import multiprocessing
import shlex
import subprocess
import sys

import pytest
import torch

import data.loading.loader as loader_module
from data.loading.loader import LoaderConfig, TrainLoader, val_batches
from utils.hyp import Hyperparameters

PROGRAM = """
from data.index.dataset import load_dataset_config, load_split
from data.loading.loader import LoaderConfig, TrainLoader, val_batches
from utils.hyp import Hyperparameters
index = load_split(load_dataset_config({data!r}), "train", progress=False)
config = LoaderConfig(image_size=320, batch_size=4, stride=32, workers={workers}, seed=0)
batches = [*TrainLoader(index, config, Hyperparameters()), *val_batches(index, config)]
print(sum(batch.images.sum(dtype=int).item() for batch in batches), flush=True)
"""


def outcome(root, data, before, *, workers=2):
    """(sum of all pixels, lines on stderr) of two loaders in a process started after `before`."""
    words = [sys.executable, "-c", PROGRAM.format(data=str(data), workers=workers)]
    done = subprocess.run(
        ["sh", "-c", f"{before} {shlex.join(words)}"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout), [line for line in done.stderr.splitlines() if "scan" not in line]


@pytest.fixture
def unshare():
    """`unshare` with a /dev/shm of its own, which needs root."""
    command = "unshare -m sh -c 'mount -t tmpfs tmpfs /dev/shm'"
    if subprocess.run(command, shell=True, capture_output=True, check=False).returncode:
        pytest.skip("no permission to mount a /dev/shm of its own here")

    def words(options):
        return f"exec unshare -m sh -c 'mount -t tmpfs -o {options} tmpfs /dev/shm && exec \"$@\"' -"

    return words


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("size=2m", "no room for a batch in /dev/shm"),  # a batch has 1.2 MB, 4 are in flight
        ("size=1m", "no room for a batch in /dev/shm"),
        ("size=1m,ro", "images are loaded in the main process"),
    ],
)
@pytest.mark.slow
def test_a_small_dev_shm_never_hangs(unshare, rectangles, root, options, line):
    expected, _ = outcome(root, rectangles, "", workers=0)
    total, lines = outcome(root, rectangles, unshare(options))
    assert total == expected
    assert [line in item for item in lines] == [True]
    assert "docker run --shm-size" in lines[0]
    assert "--workers" in lines[0]
