"""Callbacks, and the writers built on them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.train.config import TrainConfig
from engine.train.files import METRICS
from engine.train.loop import fit
from engine.train.state import TrainRun
from engine.train.writers import CsvWriter, check_callbacks
from utils.config import parse
from utils.errors import UserError


@pytest.fixture
def settings(train_flags):
    return lambda *more: parse(TrainConfig, [*map(str, (*train_flags, *more))])


class Recorder:
    """Notes every event, and ends the run in that of epoch `stop`."""

    def __init__(self, stop=None):
        self.events, self.stop = [], stop

    def on_train_start(self, run):
        self.events.append(("start", run.state.epoch, (run.folder / "opt.yaml").is_file()))

    def on_batch_end(self, run):
        self.events.append(("batch", run.state.epoch, run.state.batches))

    def on_epoch_end(self, run, row):
        self.events.append(("epoch", run.state.epoch, row["epoch"]))
        assert row is run.state.rows[-1]
        if self.stop == row["epoch"]:
            raise RuntimeError("pruned")

    def on_checkpoint(self, run, path):
        assert path.is_file()
        self.events.append(("checkpoint", run.state.epoch, path.name))

    def on_train_end(self, run, metrics):
        self.events.append(("end", run.state.epoch, metrics))


class StopAfterFirstEpoch:
    def on_checkpoint(self, run, path):
        if path.name == "last.pt":
            raise RuntimeError("pruned")


def test_events_come_in_order_and_one_that_raises_ends_the_run(settings, tmp_path, rows_of):
    recorder = Recorder()
    result = fit(settings("--epochs", 2), callbacks=[recorder])

    def epoch(number):
        batches = [("batch", number, i) for i in (1, 2, 3)]
        return [*batches, ("epoch", number + 1, number)]

    saved = [event for event in recorder.events if event[0] == "checkpoint"]
    assert saved[:2] == [("checkpoint", 1, "best.pt"), ("checkpoint", 1, "last.pt")]
    assert saved[-1] == ("checkpoint", 2, "last.pt")
    assert [event for event in recorder.events if event[0] != "checkpoint"] == [
        ("start", 0, True),
        *epoch(0),
        *epoch(1),
        ("end", 2, result.metrics),
    ]
    assert recorder.events.index(saved[0]) == 5  # after its epoch
    failing = Recorder(stop=0)
    with pytest.raises(RuntimeError, match="pruned"):
        fit(settings("--epochs", 2, "--name", "failing"), callbacks=[failing])
    assert failing.events[-2:] == [("epoch", 1, 0), ("end", 1, None)]
    assert len(rows_of(tmp_path / "runs" / "failing")) == 1  # results.csv comes first


def test_a_callback_without_events_and_a_misspelt_event_are_errors():
    check_callbacks([Recorder(), CsvWriter()])
    with pytest.raises(UserError, match="callback object: it has none of on_train_start, on_batch"):
        check_callbacks([object()])
    wrong = SimpleNamespace(on_epoch_ends=print)
    with pytest.raises(UserError, match=r"unknown event 'on_epoch_ends'; did you mean 'on_epoch_"):
        check_callbacks([wrong])


def test_only_rank_0_tells_its_callbacks():
    for main in (True, False):
        recorder = Recorder()
        run = SimpleNamespace(
            world=SimpleNamespace(is_main=main),
            callbacks=[object(), recorder],
            state=SimpleNamespace(epoch=3, batches=5),
        )
        TrainRun.emit(run, "on_batch_end")
        assert recorder.events == [("batch", 3, 5)] * main


def test_a_logger_that_is_not_installed_is_named_before_any_data_are_read(settings, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        fit(settings("--loggers", "wandb", "--data", "nowhere.yaml"))
    assert str(caught.value) == "--loggers wandb: it is not installed; pip install wandb"


def logged(settings, logger):
    """What comes of a run with pictures that is stopped after its first epoch and resumed."""
    config = dataclasses.replace(settings("--epochs", 2, "--loggers", logger), noplots=False)
    with pytest.raises(RuntimeError, match="pruned"):
        fit(config, callbacks=[StopAfterFirstEpoch()])
    return fit(TrainConfig(resume=str(Path(config.project, "exp"))))


@pytest.mark.slow
def test_tensorboard_gets_metrics_settings_and_pictures(settings):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = logged(settings, "tensorboard")
    events = EventAccumulator(str(result.folder), {"images": 0, "scalars": 0}).Reload()
    for name in METRICS:
        values = [(item.step, item.value) for item in events.Scalars(name)]
        assert values == [(row["epoch"], pytest.approx(row[name])) for row in result.rows]
    names = {"labels", "train_batch0", "val_batch0_pred", "results", "confusion_matrix"}
    assert names <= set(events.Tags()["images"])
    assert events.Images("results")[0].width > 1000
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"warmup_epochs" in content
    assert str(result.folder.parent).encode() not in content


def test_mlflow_gets_metrics_settings_and_pictures(settings, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    result = logged(settings, "mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(["0"])  # the resumed run is the same one
    assert (run.info.run_name, run.info.status) == ("exp", "FINISHED")
    assert (run.data.params["epochs"], run.data.params["hsv_h"]) == ("2", "0.015")
    history = client.get_metric_history(run.info.run_id, "metrics/mAP_0.5-0.95")
    rows = [(row["epoch"], row[METRICS[3]]) for row in result.rows]
    assert sorted((item.step, item.value) for item in history) == rows
    pictures = {item.path for item in client.list_artifacts(run.info.run_id, "pictures")}
    assert {"pictures/results.png", "pictures/labels.jpg"} <= pictures
    assert mlflow.active_run() is None


def test_wandb_gets_metrics_settings_and_pictures(settings, monkeypatch):
    """Offline, where the files are its own binary format: that they are there, and what it got."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    given, ids, init = {}, [], wandb.init

    def noted(**options):
        assert options["config"]["epochs"] == 2
        run = init(**options)
        ids.append(run.id)
        log = run.log
        run.log = lambda values, step=None: (given.update({step: values}), log(values, step=step))
        return run

    monkeypatch.setattr(wandb, "init", noted)
    result = logged(settings, "wandb")
    assert ids == [ids[0]] * 2
    assert list(result.folder.glob("wandb/offline-run-*/run-*.wandb"))
    for row in result.rows:
        values = given[row["epoch"]]
        assert values[METRICS[0]] == row[METRICS[0]]
        assert not any(isinstance(value, float) and math.isnan(value) for value in values.values())
    assert "pictures/labels" in given[0]
    assert "pictures/results" in given[None]
