"""Callbacks of a training run, and the writers that are built on them.

A callback is any object with one or more of these methods.  Rank 0 calls them, in order of the
objects; what one raises ends the run.  `run` is the TrainRun, which they must not change.

on_train_start(run)         the run's folder has its settings, the model is built
on_batch_end(run)           run.state.batches batches of the epoch are done
on_epoch_end(run, row)      row of results.csv; before the epoch's checkpoints
on_checkpoint(run, path)    a file of weights/ is complete
on_train_end(run, metrics)  of the best weights; None if the run was stopped or has failed
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.checkpoint import without_folders
from engine.evaluate.metrics import DetectionMetrics
from engine.train.files import METRICS, csv_text
from engine.train.state import TrainRun
from utils.errors import UserError, cause_of, nearest
from utils.files import write_text
from utils.images import read_image
from utils.terminal import warn

EVENTS = ("on_train_start", "on_batch_end", "on_epoch_end", "on_checkpoint", "on_train_end")
Row = Mapping[str, float]


def check_callbacks(callbacks: Sequence[object]) -> None:
    """UserError for an object that no event reaches, and for a method of an unknown event."""
    for callback in callbacks:
        kind = type(callback).__name__
        methods = [name for name in dir(callback) if name.startswith("on_")]
        for name in methods:
            if name not in EVENTS:
                raise UserError(f"callback {kind}: unknown event {name!r}{nearest(name, EVENTS)}")
        if not methods:
            raise UserError(f"callback {kind}: it has none of {', '.join(EVENTS)}")


def check_loggers(loggers: Collection[str]) -> None:
    """UserError for one that is not installed."""
    for name in loggers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--loggers {name}: it is not installed; pip install {name}")


def writers(loggers: Collection[str]) -> list[object]:
    """results.csv's writer, and one for each name; without names TensorBoard's, if installed."""
    present = importlib.util.find_spec("tensorboard") is not None
    chosen = dict.fromkeys(loggers or ["tensorboard"] * present)
    return [CsvWriter(), *(WRITERS[name]() for name in chosen)]


class CsvWriter:
    """results.csv, whole after each epoch."""

    def on_epoch_end(self, run: TrainRun, row: Row) -> None:
        """All rows: a resumed run's are in its state."""
        write_text(run.folder / "results.csv", csv_text(run.state.rows))


class TensorBoardWriter:
    """Settings, metrics and pictures as events in the run's folder."""

    def on_train_start(self, run: TrainRun) -> None:
        """The older events of the epoch that a resumed run continues are removed."""
        from torch.utils.tensorboard import SummaryWriter  # heavy, and optional
        from torch.utils.tensorboard.summary import hparams

        self._shown: set[Path] = set()
        self._writer: Any = SummaryWriter(str(run.folder), purge_step=run.state.epoch)
        for summary in hparams(_settings(run), dict.fromkeys(METRICS, 0.0)):
            self._writer._get_file_writer().add_summary(summary)

    def on_epoch_end(self, run: TrainRun, row: Row) -> None:
        """The row as scalars."""
        for name, value in _measured(row).items():
            self._writer.add_scalar(name, value, int(row["epoch"]))
        self._add_pictures(run)

    def on_train_end(self, run: TrainRun, metrics: DetectionMetrics | None) -> None:
        """The plots of the end."""
        self._add_pictures(run)
        self._writer.close()

    def _add_pictures(self, run: TrainRun) -> None:
        for path in _new_pictures(run, self._shown):
            image = read_image(path)
            self._writer.add_image(path.stem, image, run.state.epoch, dataformats="HWC")
        self._writer.flush()


class MlflowWriter:
    """Settings, metrics and pictures as a run of MLflow, or in the one that is active.

    Where it is kept is MLflow's own setting (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME).
    """

    def on_train_start(self, run: TrainRun) -> None:
        """A resumed run continues its MLflow run."""
        import mlflow

        self._mlflow, self._shown = mlflow, set[Path]()
        self._own = mlflow.active_run() is None
        with _needed("mlflow", "MLFLOW_TRACKING_URI"):
            if self._own:
                known = _known_id(run, "mlflow")
                started = mlflow.start_run(
                    run_id=known, run_name=None if known else run.folder.name
                )
                write_text(run.folder / "mlflow.id", started.info.run_id)
            if not (self._own and known):
                mlflow.log_params(_settings(run))

    def on_epoch_end(self, run: TrainRun, row: Row) -> None:
        """The row as metrics, whose names must not have a colon everywhere."""
        values = {name.replace(":", "-"): value for name, value in _measured(row).items()}
        with _optional("mlflow"):
            self._mlflow.log_metrics(values, step=int(row["epoch"]))

    def on_train_end(self, run: TrainRun, metrics: DetectionMetrics | None) -> None:
        """The pictures, and how the run ended."""
        with _optional("mlflow"):
            for path in _new_pictures(run, self._shown):
                self._mlflow.log_artifact(str(path), "pictures")
            if self._own:
                self._mlflow.end_run("FAILED" if metrics is None else "FINISHED")


class WandbWriter:
    """Settings, metrics and pictures as a run of Weights & Biases.

    Project, account and mode are its own settings (WANDB_PROJECT, WANDB_MODE=offline).
    """

    def on_train_start(self, run: TrainRun) -> None:
        """A resumed run continues its W&B run."""
        import wandb

        self._wandb, self._shown = wandb, set[Path]()
        with _needed("wandb", "WANDB_MODE=offline"):
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "featherdet"),
                name=run.folder.name,
                id=_known_id(run, "wandb"),
                resume="allow",
                dir=str(run.folder),
                config=_settings(run),
            )
            write_text(run.folder / "wandb.id", self._run.id)

    def on_epoch_end(self, run: TrainRun, row: Row) -> None:
        """The row, and new pictures."""
        with _optional("wandb"):
            pictures = self._pictures(run)
            self._run.log({**_measured(row), **pictures}, step=int(row["epoch"]))

    def on_train_end(self, run: TrainRun, metrics: DetectionMetrics | None) -> None:
        """The plots of the end, and how the run ended."""
        with _optional("wandb"):
            self._run.log(self._pictures(run))
            self._run.finish(exit_code=int(metrics is None))

    def _pictures(self, run: TrainRun) -> dict[str, Any]:
        return {
            f"pictures/{path.stem}": self._wandb.Image(str(path))
            for path in _new_pictures(run, self._shown)
        }


WRITERS = {"tensorboard": TensorBoardWriter, "mlflow": MlflowWriter, "wandb": WandbWriter}


def _settings(run: TrainRun) -> dict[str, Any]:
    """Settings and hyper-parameters as plain values, without folders of this machine."""
    values = {**without_folders(run.config.to_dict()), **dataclasses.asdict(run.hyp)}
    return {
        name: value if isinstance(value, bool | int | float) else str(value)
        for name, value in values.items()
    }


def _measured(row: Row) -> dict[str, float]:
    return {name: v for name, v in row.items() if name != "epoch" and not math.isnan(v)}


def _new_pictures(run: TrainRun, shown: set[Path]) -> list[Path]:
    """The pictures in the run's folder that are not yet `shown`, which then has them."""
    found = {path for path in run.folder.iterdir() if path.suffix in {".jpg", ".png"}} - shown
    shown |= found
    return sorted(found)


def _known_id(run: TrainRun, name: str) -> str | None:
    """The id under which a resumed run is known elsewhere."""
    file = run.folder / f"{name}.id"
    return file.read_text("utf-8") if run.config.resume and file.is_file() else None


@contextlib.contextmanager
def _needed(name: str, setting: str) -> Iterator[None]:
    """An error at the start is the user's to mend."""
    try:
        yield
    except Exception as error:
        raise UserError(f"--loggers {name}: {cause_of(error)} (see {setting})") from error


@contextlib.contextmanager
def _optional(name: str) -> Iterator[None]:
    """A server that fails later does not end the run."""
    try:
        yield
    except Exception as error:
        warn(f"warning: --loggers {name}: {cause_of(error)}; training goes on")
