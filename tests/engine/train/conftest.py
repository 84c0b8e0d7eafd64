"""Settings of quick runs, and signals at chosen steps of them."""

import csv
import os

import pytest

from engine.train import loop, step
from engine.train.config import TrainConfig
from utils.config import parse


@pytest.fixture
def settings(train_flags):
    """Flags -> TrainConfig, on top of those of a quick run."""

    def read(*more):
        return parse(TrainConfig, [*train_flags, *map(str, more)], prog="train.py", description="")

    return read


@pytest.fixture
def signal_at(monkeypatch):
    """(epoch, index, number): send the signal to this process while that batch is under way."""

    def arrange(epoch, index, number):
        def draw(run, batch):
            if (run.state.epoch, run.state.batches) == (epoch, index):
                monkeypatch.setattr(step, "draw_batch", lambda *_: None)  # once
                os.kill(os.getpid(), number)

        monkeypatch.setattr(step, "draw_batch", draw)

    return arrange


@pytest.fixture
def keep_state(monkeypatch):
    """last.pt of a finished run keeps its training state."""
    monkeypatch.setattr(loop, "strip_checkpoint", lambda path: None)


@pytest.fixture
def rows_of():
    """A run's folder -> the rows of its results.csv."""

    def read(folder):
        with (folder / "results.csv").open() as file:
            return list(csv.DictReader(file))

    return read
