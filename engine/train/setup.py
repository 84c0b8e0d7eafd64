"""From settings to everything a training loop needs."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data.index.dataset import load_dataset_config, load_split
from data.index.records import DataIndex
from data.loading.loader import LoaderConfig, TrainLoader, ValLoader
from data.loading.sample import Batch
from engine import distributed
from engine.checkpoint import load_checkpoint
from engine.distributed import Distributed
from engine.train.config import TrainConfig, checkpoint_to_resume
from engine.train.ema import ModelEma
from engine.train.freeze import freeze, rows_to_freeze
from engine.train.lr_scale import rate_scales
from engine.train.model import (
    AMP_TYPES,
    autocast_type,
    batch_that_fits,
    build_model,
    network_size,
    set_anchors,
    wrapped,
)
from engine.train.optimizer import build_optimizer
from engine.train.schedule import Schedule
from engine.train.state import TrainState
from engine.train.step import StepPlan
from models.detector import Detector
from models.losses.anchor import AnchorLoss
from utils.errors import UserError
from utils.hyp import Hyperparameters, load_hyp
from utils.paths import new_run_dir
from utils.seeding import seed_everything


@dataclass(frozen=True)
class TrainRun:
    """A run that is ready to start; only `state` changes from here on."""

    config: TrainConfig
    hyp: Hyperparameters
    world: Distributed
    folder: Path
    train: DataIndex
    val: DataIndex
    loader: TrainLoader
    val_loader: Iterable[Batch]
    val_loss: AnchorLoss
    plan: StepPlan
    state: TrainState
    facts: dict[str, Any]  # what a resumed run must find unchanged


def prepare(config: TrainConfig, world: Distributed) -> TrainRun:
    """Read the data, build the model, and put a resumed run's state back. Raises UserError."""
    saved = None
    if config.resume is not None:
        saved, config = _resumed(config)
    check_world(config, world)
    hyp = load_hyp(config.hyp) if saved is None else Hyperparameters.from_dict(saved["hyp"])
    seed_everything(config.seed)
    train, val = _load_data(config, world)
    model = build_model(config, train, saved)
    config = replace(config, imgsz=network_size(config.imgsz, model.max_stride))
    model.to(world.device).to(memory_format=torch.channels_last).train()
    if saved is None and (not config.noautoanchor or isinstance(model.spec.anchors, int)):
        set_anchors(model, train, config, hyp)
    freeze(model, rows_to_freeze(model.spec, config.freeze))
    if config.batch_size == -1:
        config = replace(config, batch_size=batch_that_fits(config, model, hyp, world))
    loader, val_loader = _loaders(config, hyp, world, train=train, val=val, model=model)
    schedule = Schedule(
        hyp,
        epochs=config.epochs,
        steps_per_epoch=len(loader),
        batch_size=config.batch_size,
        cosine=config.cos_lr,
        adaptive=config.optimizer != "SGD",
    )
    state = _new_state(config, hyp, world, model=model, schedule=schedule)
    facts = {
        "train data": train.fingerprint,
        "validation data": val.fingerprint,
        "classes": list(train.names),
        "batches per epoch": len(loader),
    }
    if saved is not None:
        _restore(state, saved["train_state"], facts=facts, world=world)
    else:
        state.start_epoch(0)
    facts["world size"] = world.world_size
    if schedule.nominal_batch != hyp.nbs and world.is_main:
        sys.stderr.write(f"a short run: {schedule.shortened()}\n")
    folder = _run_folder(config, world)  # last, so that a mistake leaves none behind
    plan = _step_plan(config, hyp, world, model=model, schedule=schedule)
    val_loss = AnchorLoss(state.ema.model, hyp, image_size=config.imgsz)
    return TrainRun(
        config, hyp, world, folder, train, val, loader, val_loader, val_loss, plan, state, facts
    )


def check_world(config: TrainConfig, world: Distributed) -> None:
    """Refuse what this machine or this number of ranks cannot do (UserError)."""
    cuda = world.device.type == "cuda"
    if config.sync_bn and not cuda:
        raise UserError("--sync-bn: torch synchronises batch statistics on CUDA only; leave it out")
    if config.amp in AMP_TYPES and not cuda:
        raise UserError(f"--amp {config.amp}: mixed precision is for CUDA; use --amp off here")
    if config.batch_size == -1 and world.world_size > 1:
        raise UserError("--batch-size -1 measures one GPU; under torchrun give the total batch")
    if config.batch_size > 0 and config.batch_size % world.world_size:
        raise UserError(
            f"--batch-size {config.batch_size} is the total over {world.world_size} ranks and must"
            " be a multiple of their number"
        )
    if config.rect and config.multi_scale:
        raise UserError("--rect and --multi-scale exclude each other: both choose the batch's size")


def _resumed(config: TrainConfig) -> tuple[dict[str, Any], TrainConfig]:
    path = checkpoint_to_resume(config)
    saved = load_checkpoint(path)
    if saved.get("train_state") is None:
        raise UserError(
            f"{path}: this run is finished, or the file carries no state of training;"
            f" for a new run from its weights use --weights {path}"
        )
    try:
        before = TrainConfig.from_dict(saved["config"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: its settings do not fit this version: {error}") from error
    return saved, replace(config.resumed_as(before), resume=str(path))


def _run_folder(config: TrainConfig, world: Distributed) -> Path:
    """The run's folder, made by rank 0 and told to all."""
    folder = None
    if config.resume is not None:
        folder = Path(config.resume).resolve().parent.parent
    elif world.is_main:
        folder = new_run_dir(config.project, config.name, exist_ok=config.exist_ok)
        (folder / "weights").mkdir(exist_ok=True)
    told = distributed.broadcast_object(folder)
    assert told is not None
    return told


def _load_data(config: TrainConfig, world: Distributed) -> tuple[DataIndex, DataIndex]:
    """Both splits; rank 0 reads first and leaves the cache to the others."""
    if not world.is_main:
        distributed.barrier()
    dataset = load_dataset_config(config.data)
    train, val = (
        load_split(dataset, split, progress=world.is_main, single_cls=config.single_cls)
        for split in ("train", "val")
    )
    if world.is_main:
        distributed.barrier()
    if train.names != val.names:
        raise UserError(
            f"{config.data}: train and val disagree about the classes:"
            f" {', '.join(train.names)} and {', '.join(val.names)}"
        )
    if not train.boxes:
        raise UserError(f"{config.data}: no image of train has a box; nothing can be learnt")
    return train, val


def _loaders(
    config: TrainConfig,
    hyp: Hyperparameters,
    world: Distributed,
    *,
    train: DataIndex,
    val: DataIndex,
    model: Detector,
) -> tuple[TrainLoader, Iterable[Batch]]:
    common = LoaderConfig(
        image_size=config.imgsz,
        batch_size=config.batch_size // world.world_size,
        stride=model.max_stride,
        workers=config.workers,
        seed=config.seed,
        rank=world.rank,
        world_size=world.world_size,
        rect=config.rect,
        cache=config.cache,
        pin_memory=world.device.type == "cuda",
    )
    return TrainLoader(train, common, hyp), ValLoader(val, common)


def _new_state(
    config: TrainConfig,
    hyp: Hyperparameters,
    world: Distributed,
    *,
    model: Detector,
    schedule: Schedule,
) -> TrainState:
    optimizer = build_optimizer(
        model,
        config.optimizer,
        hyp,
        weight_decay=schedule.weight_decay,
        scales=rate_scales(model, config.lr_scale),
    )
    scaled = autocast_type(config, world) is torch.float16
    scaler = torch.amp.GradScaler(world.device.type, enabled=scaled)
    return TrainState(model, ModelEma(model), optimizer, scaler, world.device)


def _restore(
    state: TrainState, saved: dict[str, Any], *, facts: dict[str, Any], world: Distributed
) -> None:
    """Put the saved state back after checking that data and ranks are what they were."""
    before = saved["facts"]
    for name, value in facts.items():
        if before.get(name) != value:
            raise UserError(
                f"--resume: {name} changed since the run was saved ({before.get(name)} -> {value});"
                " put it back, or start a new run with --weights"
            )
    if before["world size"] != world.world_size and world.is_main:
        sys.stderr.write(
            f"the run was saved by {before['world size']} ranks and goes on with"
            f" {world.world_size}: close to, but not bit for bit, what it would have been\n"
        )
    state.load_dict(saved)


def _step_plan(
    config: TrainConfig,
    hyp: Hyperparameters,
    world: Distributed,
    *,
    model: Detector,
    schedule: Schedule,
) -> StepPlan:
    return StepPlan(
        forward=wrapped(model, config, world),
        loss=AnchorLoss(
            model, hyp, image_size=config.imgsz, label_smoothing=config.label_smoothing
        ),
        schedule=schedule,
        device=world.device,
        autocast=autocast_type(config, world),
        grad_clip=config.grad_clip,
        multi_scale=model.max_stride if config.multi_scale else 0,
        seed=config.seed,
        rank=world.rank,
        world_size=world.world_size,
    )
