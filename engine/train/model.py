"""The model of a training run: built, filled, anchored, and wrapped for its device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
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
from utils.terminal import say, warn

DEFAULT_MODEL = "yolov5n"
DEFAULT_BATCH = 16
AMP_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def build_model(config: TrainConfig, train: DataIndex) -> Detector:
    """The detector of a new run: of `--cfg`, or of the checkpoint `--weights`.

    Weights of `--weights` go in where name and shape fit, those of `--backbone-weights` into the
    backbone in order; a report lists which.
    """
    classes = len(train.names)
    spec = model_spec(config, classes=classes)
    model = build_detector(spec, classes=classes, names=train.names)
    if config.weights:
        report = transfer(model, config.weights).text()
        if distributed.is_main():
            say(report)
    if config.backbone_weights:
        fill_backbone(model, config.backbone_weights, allow_partial=config.allow_partial)
    return model


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
    if distributed.is_main():
        say(fitted.text(budget))
    return fitted.spec


def fill_backbone(model: Detector, name: str, *, allow_partial: bool) -> None:
    """ImageNet weights into the backbone, and their normalisation, after a printed report.

    UserError for weights that cannot be read or do not fit, see models.weights.imagenet.
    """
    if not distributed.is_main():
        distributed.barrier()  # rank 0 downloads, the others find the file in the cache
    source = read_source(name)
    if distributed.is_main():
        distributed.barrier()
    plan = plan_transfer(model, source)
    if distributed.is_main():
        say(plan.text())
    plan.apply(model, allow_partial=allow_partial)


def network_size(size: int, stride: int) -> int:
    """`size` rounded up to a multiple of `stride`, at least two of them; a change is reported."""
    rounded = max(-(-size // stride), 2) * stride
    if rounded != size and distributed.is_main():
        warn(f"--imgsz {size} is not a multiple of the stride {stride}: {rounded} is used")
    return rounded


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
    report = fit_anchors(sizes, present, len(pixels), threshold=hyp.anchor_t, seed=config.seed)
    if report.changed:
        anchors = np.ascontiguousarray(report.anchors.reshape(head.anchors.shape))
        head.set_anchors(torch.from_numpy(anchors))
    if distributed.is_main():
        say(report.text())


def batch_that_fits(
    config: TrainConfig, model: Detector, hyp: Hyperparameters, world: Distributed
) -> int:
    """The batch of `--batch-size -1`: measured on a GPU, a fixed number on a CPU."""
    if world.device.type != "cuda":
        say(f"--batch-size -1 measures GPU memory; on a CPU the batch is {DEFAULT_BATCH}")
        return DEFAULT_BATCH
    loss = AnchorLoss(model, hyp, image_size=config.imgsz)
    return largest_batch(
        model,
        loss,
        image_size=config.imgsz,
        device=world.device,
        autocast=autocast_type(config, world),
    )


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
