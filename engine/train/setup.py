"""From settings to everything a training loop needs."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.index.dataset import load_dataset_config, load_split
from data.index.records import DataIndex
from engine import distributed
from engine.checkpoint import detector_of, load_checkpoint
from engine.distributed import Distributed
from engine.train.config import TrainConfig, checkpoint_to_resume
from engine.train.ema import ModelEma
from engine.train.loading import composes_on_device, make_loaders
from engine.train.model import (
    ForwardAndLoss,
    autocast_type,
    model_file,
    model_to_train,
    wrapped,
)
from engine.train.optimizer import ADAPTIVE, Schedule, build_optimizer, rate_scales
from engine.train.state import StepClock, TrainRun, TrainState
from engine.train.writers import check_loggers, writers
from models.detector import Detector
from models.losses.build import build_loss
from models.spec import ModelSpec
from models.yaml.parser import Draft
from utils.environment import run_environment
from utils.errors import UserError, cause_of
from utils.files import TEMPORARY, check_run_dir, locked, new_run_dir
from utils.hyp import AUTO, Hyperparameters, choose_recipe, load_hyp
from utils.terminal import warn_main


def prepare_run(
    config: TrainConfig,
    world: Distributed,
    locks: ExitStack,
    *,
    given: Collection[str] = (),
    callbacks: Sequence[object] = (),
) -> TrainRun:
    """Read the data, build the model, and restore the state of a run to resume.

    `locks` gets the lock of the run's folder; `given` and `callbacks` are as in
    `engine.train.loop.fit`.  Raises UserError.
    """
    folder, saved = None, None
    if config.resume is None:
        hyp = load_hyp(config.hyp)  # a mistake ends it here
    else:
        path = checkpoint_to_resume(config.resume, config.project)
        folder = path.parent.parent
        if world.is_main:
            _lock(folder, locks)
        saved, config, hyp = _resumed(path, config, given)
    check_world(config, world)
    on_device = composes_on_device(config, hyp, world.device)
    if saved is None:  # mistakes of the command line, before any data are read or drawn
        check_run_dir(config.project, config.name)
        start: Detector | ModelSpec | Draft = model_file(config)
    else:
        start = detector_of(saved, path)
    random.seed(config.seed)
    np.random.seed(config.seed)  # noqa: NPY002  third-party code may draw from the global state
    torch.manual_seed(config.seed)
    with distributed.main_first():  # rank 0 leaves the cache to the others
        train, val = _splits(config)
    if AUTO in {config.hyp, config.optimizer}:
        config, hyp = _with_recipe(config, len(train))
    measured_batch = config.batch_size == -1
    model, config = model_to_train(config, hyp, world, train=train, start=start)
    loader, val_loader, device_images = make_loaders(
        config,
        hyp,
        world,
        train=train,
        val=val,
        stride=model.max_stride,
        on_device=on_device,
        measured_batch=measured_batch,
    )
    schedule = Schedule(
        hyp,
        epochs=config.epochs,
        steps_per_epoch=len(loader),
        batch_size=config.batch_size,
        cosine=config.cos_lr,
        adaptive=config.optimizer in ADAPTIVE,
    )
    optimizer = build_optimizer(
        model,
        config.optimizer,
        hyp,
        weight_decay=schedule.weight_decay,
        scales=rate_scales(model, config.lr_scale),
    )
    autocast = autocast_type(config, world.device)
    state = TrainState(
        model,
        ModelEma(model),
        optimizer,
        torch.amp.GradScaler(world.device.type, enabled=autocast is torch.float16),
        world.device,
    )
    data_info = {
        "train data": train.fingerprint,
        "validation data": val.fingerprint,
        "images": [len(train), len(val)],  # some may be found damaged after the first scan
        "classes": list(train.names),
        "batches per epoch": len(loader),
        "world size": world.world_size,
    }
    if saved is not None:
        _restore(state, saved["train_state"], data_info, schedule, path)
    if folder is None and world.is_main:  # last, so that a mistake leaves none behind
        folder = new_run_dir(config.project, config.name, exist_ok=config.exist_ok)
        _lock(folder, locks)
        (folder / "weights").mkdir(exist_ok=True)
    loss = build_loss(model, hyp, image_size=config.imgsz, label_smoothing=config.label_smoothing)
    step, no_sync = wrapped(ForwardAndLoss(model, loss, world, autocast=autocast), config)
    return TrainRun(
        config=config,
        hyp=hyp,
        world=world,
        folder=distributed.broadcast_object(folder) or Path(),
        train=train,
        val=val,
        loader=loader,
        val_loader=val_loader,
        device_images=device_images,
        forward_and_loss=step,
        loss=loss,
        no_sync=no_sync,
        schedule=schedule,
        autocast=autocast,
        state=state,
        clock=StepClock(world.device, config.profile),
        data_info=data_info,
        environment={
            **run_environment(world.device),
            "ranks": world.world_size,
            "threads": torch.get_num_threads(),
        },
        callbacks=(*writers(config.loggers), *callbacks),
    )


def _splits(config: TrainConfig) -> tuple[DataIndex, DataIndex]:
    """The training and the validation images; UserError where they do not go together."""
    dataset = load_dataset_config(config.data)
    train, val = (
        load_split(dataset, split, single_cls=config.single_cls) for split in ("train", "val")
    )
    if train.names != val.names:
        raise UserError(
            f"{config.data}: train and val disagree about the classes:"
            f" {', '.join(train.names)} and {', '.join(val.names)}"
        )
    if not train.boxes:
        raise UserError(f"{config.data}: no training image has a box; nothing can be learned")
    return train, val


def _with_recipe(config: TrainConfig, images: int) -> tuple[TrainConfig, Hyperparameters]:
    """The settings with what AUTO stands for, and the hyper-parameters."""
    hyp, optimizer = choose_recipe(
        config.hyp,
        config.optimizer,
        images=images,
        epochs=config.epochs,
        batch_size=config.batch_size,
        pretrained=bool(config.weights),
    )
    auto = tuple(name for name in ("hyp", "optimizer") if getattr(config, name) == AUTO)
    return replace(config, hyp=hyp, optimizer=optimizer, auto=auto), load_hyp(hyp)


def _lock(folder: Path, locks: ExitStack) -> None:
    """Keep other training runs out of `folder`, and remove what killed ones left half written."""
    locks.enter_context(locked(folder))
    for leftover in folder.rglob(TEMPORARY):
        leftover.unlink(missing_ok=True)


def check_world(config: TrainConfig, world: Distributed) -> None:
    """Refuse what this machine or this number of ranks cannot do (UserError)."""
    check_loggers(config.loggers)
    cuda = world.device.type == "cuda"
    if config.sync_bn and not cuda:
        raise UserError("--sync-bn: torch synchronises batch statistics on CUDA only; leave it out")
    if config.amp in {"fp16", "bf16"} and not cuda:
        raise UserError(f"--amp {config.amp}: mixed precision is for CUDA; use --amp off here")
    if config.batch_size == -1 and world.world_size > 1:
        raise UserError("--batch-size -1 measures one GPU; under torchrun give the total batch")
    if config.batch_size > 0 and config.batch_size % world.world_size:
        raise UserError(
            f"--batch-size {config.batch_size} is the total over {world.world_size} ranks and must"
            " be a multiple of their number"
        )


def _resumed(
    path: Path, config: TrainConfig, given: Collection[str]
) -> tuple[dict[str, Any], TrainConfig, Hyperparameters]:
    """The checkpoint at `path`, and the settings to continue with."""
    saved = load_checkpoint(path)
    state = saved.get("train_state")
    if state is None:
        raise UserError(
            f"{path}: this run is finished, or the file has no training state; for a new run from"
            f" its weights use --weights {path}"
        )
    try:
        before = TrainConfig.from_dict(state.get("config") or saved["config"])
        hyp = Hyperparameters.from_dict(saved["hyp"])
        done = int(saved["epoch"])
    except Exception as error:
        raise UserError(
            f"{path}: its settings do not fit this version: {cause_of(error)}"
        ) from error
    config = config.resumed_as(before, given)
    if config.epochs < done:
        raise UserError(f"--epochs {config.epochs}: {done} epochs of the run are done already")
    return saved, replace(config, resume=str(path)), hyp


def _restore(
    state: TrainState,
    saved: dict[str, Any],
    data_info: dict[str, Any],
    schedule: Schedule,
    path: Path,
) -> None:
    """Restore the state `saved` in `path` after checking that the data are what they were."""
    try:
        before = saved["data_info"] if "data_info" in saved else saved["facts"]  # its first name
        ranks = int(before["world size"])
        changed = [
            f"{name} changed since the run was saved ({before[name]} -> {value})"
            for name, value in data_info.items()
            # older checkpoints have no number of images
            if name != "world size" and before.get(name, value) != value
        ]
        if not changed:
            state.load_dict(saved, epochs=schedule.epochs, steps=schedule.steps_per_epoch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a damaged file makes of the values in it
        raise UserError(
            f"{path}: its training state is damaged ({cause_of(error)}); for a new run from its"
            f" weights use --weights {path}"
        ) from error
    if changed:
        raise UserError(
            f"--resume: {'; '.join(changed)}; restore it, or start a new run with --weights"
        )
    if ranks != data_info["world size"]:
        warn_main(
            f"the run was saved by {ranks} ranks and continues with {data_info['world size']}:"
            " results will be close to those of an uninterrupted run, but not bit-identical"
        )
