"""What a training run writes: settings, checkpoints, images of its data."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import torch

from data.loading.plots import plot_batch, plot_labels
from data.loading.sample import Batch
from engine.checkpoint import model_payload, save_checkpoint, without_folders
from engine.train.setup import TrainRun
from engine.train.step import NonFiniteError
from models.profile.counting import profile
from models.profile.tables import row_table, summary
from utils.config import changed
from utils.files import write_yaml
from utils.terminal import say

DRAWN_BATCHES = 3  # train_batch0.jpg to train_batch2.jpg


def announce(run: TrainRun) -> None:
    """Rank 0: the settings, the model's table and the plot of the labels, before the first step."""
    if not run.world.is_main:
        return
    config, model = run.config, run.state.model
    settings = ", ".join(f"{key}={value}" for key, value in changed(config).items())
    say(f"settings: {settings or 'all default'}")
    write_yaml(run.folder / "opt.yaml", config.to_dict())
    if not run.resumed:
        counted = profile(model, config.imgsz)
        say(row_table(counted))
        say("; ".join((summary(counted, model.spec.source), *model.spec.notes)))
        write_yaml(run.folder / "hyp.yaml", dataclasses.asdict(run.hyp))
        head = model.head
        pixels = head.anchors.cpu() * torch.tensor(head.stride).view(-1, 1, 1)
        anchors = tuple(map(tuple, pixels.flatten(1).tolist()))  # AutoAnchor may have changed them
        write_yaml(run.folder / "spec.yaml", replace(model.spec, anchors=anchors).to_yaml_dict())
        if not config.noplots:
            plot_labels(run.train, run.folder / "labels.jpg")
    found = run.environment
    ranks = f" x {found['ranks']}" if run.world.world_size > 1 else ""
    say(f"training on {found['device']}{ranks}, {found['threads']} threads, into {run.folder}")


def draw_batch(run: TrainRun, index: int, batch: Batch) -> None:
    """Rank 0: train_batch0.jpg to train_batch2.jpg from the run's first batches."""
    wanted = run.state.epoch == 0 and index < DRAWN_BATCHES
    if wanted and run.world.is_main and not run.config.noplots:
        plot_batch(batch, run.train.names, run.folder / f"train_batch{index}.jpg")


def save(run: TrainRun, name: str, *, resumable: bool) -> Path:
    """Write a checkpoint of the averaged weights; `resumable` adds the whole training state.

    Only that state holds paths of this machine, which a resumed run needs.  Raises NonFiniteError
    instead of writing a weight that is not a number.
    """
    state, config = run.state, run.config.to_dict()
    if not state.all_finite():
        raise NonFiniteError(
            f"epoch {state.epoch}, batch {state.batches}: the weights are not finite; not saved"
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
    return path
