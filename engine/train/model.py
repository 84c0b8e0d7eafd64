"""The model of a training run: built, with its weights and anchors, and wrapped for its device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.index.records import DataIndex
from engine import distributed
from engine.checkpoint import load_detector, transfer
from engine.distributed import Distributed
from engine.train.autoanchor import box_sizes, fit_anchors
from engine.train.batch_size import largest_batch
from engine.train.config import TrainConfig
from engine.train.optimizer import freeze, rows_to_freeze
from models.builder import build_detector
from models.detector import Detector
from models.losses.anchor import AnchorLoss
from models.profile.fit import fit, read_budget
from models.spec import ModelSpec
from models.weights.imagenet import plan_transfer
from models.weights.sources import read_source
from models.yaml.parser import load_draft
from utils.errors import UserError
from utils.hyp import Hyperparameters
from utils.ranks import say_main, warn_main

DEFAULT_MODEL = "yolov5n"
AMP_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def model_to_train(
    config: TrainConfig,
    hyp: Hyperparameters,
    world: Distributed,
    *,
    train: DataIndex,
    saved: Detector | None,
) -> tuple[Detector, TrainConfig]:
    """The detector on its device, and the settings with its image size and its batch.

    `saved`: that of a run to resume.  A new one is that of `--cfg` or of the checkpoint
    `--weights`; weights of `--weights` go in where name and shape fit, those of
    `--backbone-weights` into the backbone in order, with a printed report.
    """
    classes = len(train.names)
    model = saved
    if model is None:
        spec = model_spec(config, classes=classes)
        model = build_detector(spec, classes=classes, names=train.names)
        if config.weights:
            say_main(transfer(model, config.weights).text())
        if config.backbone_weights:
            with distributed.main_first():  # which may download
                source = read_source(config.backbone_weights)
            plan = plan_transfer(model, source)
            say_main(plan.text())
            plan.apply(model, allow_partial=config.allow_partial)
    size = max(-(-config.imgsz // model.max_stride), 2) * model.max_stride
    if size != config.imgsz:
        warn_main(
            f"--imgsz {config.imgsz} is not a multiple of the stride {model.max_stride}: {size} is"
            " used"
        )
        config = replace(config, imgsz=size)
    model.to(world.device).to(memory_format=torch.channels_last).train()
    if saved is None and (not config.noautoanchor or isinstance(model.spec.anchors, int)):
        set_anchors(model, train, config, hyp)
    freeze(model, rows_to_freeze(model.spec, config.freeze))
    if config.batch_size == -1:
        loss = AnchorLoss(model, hyp, image_size=size)
        autocast = autocast_type(config, world)
        batch = largest_batch(model, loss, image_size=size, device=world.device, autocast=autocast)
        config = replace(config, batch_size=batch)
    return model, config


def model_spec(config: TrainConfig, *, classes: int) -> ModelSpec:
    """The model that the flags mean: a file with --backbone, --neck and --fit, or a checkpoint's.

    Raises UserError as models.yaml.parser and models.profile.fit do.
    """
    composed = config.backbone or config.neck or config.fit
    if config.weights and composed and not config.cfg:
        raise UserError(
            "--backbone, --neck and --fit change a model file: name it with --cfg (--weights alone"
            " brings a finished model)"
        )
    if config.weights and not config.cfg and not composed:
        return load_detector(config.weights, device=torch.device("cpu")).spec
    draft = load_draft(
        config.cfg or DEFAULT_MODEL, backbone=config.backbone or None, neck=config.neck or None
    )
    if not config.fit:
        return draft.resolve()
    budget = read_budget(config.fit, image_size=config.imgsz)
    fitted = fit(draft, budget, classes=classes)
    say_main(fitted.text(budget))
    return fitted.spec


def set_anchors(
    model: Detector, train: DataIndex, config: TrainConfig, hyp: Hyperparameters
) -> None:
    """AutoAnchor on the training boxes at network size; see engine.train.autoanchor."""
    sizes = box_sizes(
        [record.boxes[~record.crowd] for record in train.records],
        [(record.height, record.width) for record in train.records],
        config.imgsz,
    )
    head = model.head
    stride = torch.tensor(head.stride, dtype=torch.float32).view(-1, 1, 1)
    pixels = (head.anchors.cpu() * stride).reshape(-1, 2).double().numpy()
    present = None if isinstance(model.spec.anchors, int) else pixels
    found, text = fit_anchors(sizes, present, len(pixels), threshold=hyp.anchor_t, seed=config.seed)
    if found is not present:
        head.set_anchors(torch.from_numpy(found.reshape(head.anchors.shape)))
    say_main(text)


def autocast_type(config: TrainConfig, world: Distributed) -> torch.dtype | None:
    """The type that the forward pass runs in on CUDA; None for float32."""
    if world.device.type != "cuda" or config.amp == "off":
        return None
    return AMP_TYPES[config.amp if config.amp in AMP_TYPES else "fp16"]


def wrapped(
    model: Detector, config: TrainConfig, world: Distributed
) -> tuple[Callable[[Tensor], list[Tensor]], Callable[[], AbstractContextManager[None]]]:
    """The model as it is called in a step: distributed over ranks, compiled, or as it is.

    Also the context in which a backward pass leaves its gradients on their rank.
    """
    module: nn.Module = model
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext
    if config.sync_bn:
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # in place: same tensors
    if world.world_size > 1:
        devices = [world.device] if world.device.type == "cuda" else None
        module = DistributedDataParallel(module, device_ids=devices)
        no_sync = module.no_sync
    return torch.compile(module) if config.compile else module, no_sync
