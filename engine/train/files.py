"""What a training run writes: settings, checkpoints, results.csv, plots."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from data.loading.plots import plot_labels
from engine.checkpoint import model_payload, save_checkpoint, without_folders
from engine.train.state import NonFiniteError, TrainRun
from models.heads.anchor import Detect
from models.profile.counting import profile_spec
from models.profile.report import row_table, summary
from utils.config import changed
from utils.files import write_yaml, writing
from utils.terminal import say, warn

METRICS = ("metrics/precision", "metrics/recall", "metrics/mAP_0.5", "metrics/mAP_0.5:0.95")
# of results.csv after the ecosystem's columns, which are in its order
OWN = ("images_per_second", "train_seconds", "val_seconds", "data_wait_share")
SMOOTHING = 0.03  # of the epochs: the standard deviation of the weights in results.png
DOTTED_EPOCHS = 60  # more points would be a band


def announce(run: TrainRun) -> None:
    """Rank 0: the settings, the model's table and the plot of the labels, before the first step."""
    if not run.world.is_main:
        return
    config, model = run.config, run.state.model
    settings = ", ".join(f"{key}={value}" for key, value in changed(config).items())
    say(f"settings: {settings or 'all default'}")
    write_yaml(run.folder / "opt.yaml", config.to_dict())
    if config.resume is None:
        counted = profile_spec(model.spec, image_size=config.imgsz, classes=len(model.names))
        say(row_table(counted))
        say(summary(counted, model.spec.source))
        write_yaml(run.folder / "hyp.yaml", dataclasses.asdict(run.hyp))
        head, spec = model.head, model.spec
        if isinstance(head, Detect):  # AutoAnchor may have changed them
            pixels = head.anchors.cpu() * torch.tensor(head.stride).view(-1, 1, 1)
            spec = replace(spec, anchors=tuple(map(tuple, pixels.flatten(1).tolist())))
        write_yaml(run.folder / "spec.yaml", spec.to_yaml_dict())
        if not config.noplots:
            plot_labels(run.train, run.folder / "labels.jpg")
    where = "the device" if run.device_images is not None else "the CPU"
    say(f"{run.loader.cache_line}; training images are composed on {where}")
    if run.schedule.nominal_batch != run.hyp.nbs:
        warn(f"a short run: {run.schedule.shortened()}")
    found = run.environment
    threads = f"{found['threads']} thread{'s' * (found['threads'] != 1)}"
    ranks = f" x {found['ranks']}" if run.world.world_size > 1 else ""
    say(f"training on {found['device']}{ranks}, {threads}, into {run.folder}")


def save(run: TrainRun, name: str, *, resumable: bool) -> Path:
    """Write a checkpoint of the averaged weights; `resumable` adds the whole training state.

    Only that state holds paths of this machine, which a resumed run needs.  Raises NonFiniteError
    instead of writing a weight that is not a number.
    """
    state, config = run.state, run.config.to_dict()
    if not state.all_finite():
        raise NonFiniteError(
            f"epoch {state.epoch + 1}, after batch {state.batches}: the weights are not finite;"
            " not saved"
        )
    path = run.folder / "weights" / name
    training = {**state.to_dict(), "data_info": run.data_info, "config": config}
    save_checkpoint(
        path,
        {
            **model_payload(state.ema.model),
            "train_state": training if resumable else None,
            "config": without_folders({**config, "resume": None}),
            "hyp": dataclasses.asdict(run.hyp),
            "metrics": dict(state.rows[-1]) if state.rows else {},
            "environment": run.environment,
            "epoch": state.epoch,
        },
    )
    run.emit("on_checkpoint", path)
    return path


def csv_text(rows: Iterable[Mapping[str, float]]) -> str:
    """The rows as CSV, one for each epoch; a value that was not measured stays empty."""
    rows = list(rows)
    train = _train_losses(rows)
    val = (name.replace("train/", "val/") for name in train)
    columns = ("epoch", *train, *METRICS, *val, "x/lr0", "x/lr1", "x/lr2", *OWN)
    lines = [",".join(columns)]
    for row in rows:
        values = [row.get(name, math.nan) for name in columns]
        lines.append(",".join("" if math.isnan(value) else f"{value:.6g}" for value in values))
    return "\n".join(lines) + "\n"


def _train_losses(rows: Iterable[Mapping[str, float]]) -> list[str]:
    """The columns of the parts of the loss: the head's own."""
    return [name for name in next(iter(rows), {}) if name.startswith("train/")]


def plot_results(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Losses and metrics over epochs, counted from 1, each as measured and smoothed."""
    figure = Figure(figsize=(15, 6.5), layout="constrained")
    axes = figure.subplots(2, 5).ravel()
    epochs, train = np.array([row["epoch"] + 1 for row in rows]), _train_losses(rows)
    val = (name.replace("train/", "val/") for name in train)
    drawn = (*train, *METRICS[:2], *val, *METRICS[2:])
    for axis, name in zip(axes, drawn, strict=True):
        values = np.array([row.get(name, math.nan) for row in rows])
        known = np.isfinite(values)
        x, y = epochs[known], values[known]
        size = 4 if len(x) <= DOTTED_EPOCHS else 0
        axis.plot(x, y, marker="o", markersize=size, linewidth=1, color="#8fb3dc", label="measured")
        axis.plot(x, smoothed(x, y), color="#1f3fbf", linewidth=2, label="smoothed")
        axis.set_title(name, fontsize=11)
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axis.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    for axis in axes[5:]:
        axis.set_xlabel("epoch")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    with writing(path):
        figure.savefig(path, dpi=120)


def smoothed(epochs: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(N,) values at (N,) epochs -> their means with Gaussian weights, so that the trend shows.

    The width grows with the number of epochs: a few keep their values.
    """
    sigma = max(SMOOTHING * len(epochs), 0.1)
    weights = np.exp(-0.5 * ((epochs[:, None] - epochs) / sigma) ** 2)
    return weights @ values / weights.sum(1)
