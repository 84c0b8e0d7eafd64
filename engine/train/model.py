"""The model of a training run: built, with weights, anchors and batch, wrapped for its device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.index.records import DataIndex
from engine import distributed
from engine.checkpoint import load_detector, transfer
from engine.distributed import Distributed
from engine.train.autoanchor import box_sizes, fit_anchors
from engine.train.config import TrainConfig
from engine.train.optimizer import freeze
from models.builder import build_detector
from models.detector import Detector
from models.heads.anchor import Detect
from models.losses.build import Loss, build_loss
from models.profile.fit import fit, read_budget
from models.spec import ModelSpec
from models.weights.imagenet import plan_transfer
from models.weights.restricted import open_pickled
from models.weights.sources import TIMM, read_source
from models.yaml.parser import Draft, load_draft
from utils.boxes import Targets
from utils.errors import UserError
from utils.hyp import Hyperparameters
from utils.terminal import say, say_main, warn_main

DEFAULT_MODEL = "yolov5n"
AMP_TYPES = {"auto": torch.float16, "fp16": torch.float16, "bf16": torch.bfloat16}
MIN_ROOM = 64  # targets of a compiled step
# of --batch-size -1
DEFAULT_BATCH = 16  # on a CPU
MAX_BATCH = 1024
SHARE = 0.85  # of the free memory; the rest is for validation, fragments and crowded batches
BOXES_PER_IMAGE = 40  # of the trial batches
STATE_COPIES = 3  # momentum, a second moment and the moving average, which the trial lacks


def model_to_train(
    config: TrainConfig,
    hyp: Hyperparameters,
    world: Distributed,
    *,
    train: DataIndex,
    start: Detector | ModelSpec | Draft,
) -> tuple[Detector, TrainConfig]:
    """The detector on its device, and the settings with its image size and its batch.

    `start`: the detector of a run to resume, or what `model_file` returns for a new one.  Weights
    of `--weights` go in where name and shape fit, those of `--backbone-weights` into the backbone
    in order, with a printed report.
    """
    classes = len(train.names)
    resumed = isinstance(start, Detector)
    if isinstance(start, Detector):
        model = start
    else:
        spec = _fitted(start, config, classes=classes)
        if hyp.anchors and spec.anchors:  # as many of each level, for AutoAnchor to find
            spec = replace(spec, anchors=round(hyp.anchors))
        model = build_detector(spec, classes=classes, names=train.names)
        if config.weights:
            say_main(transfer(model, config.weights))
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
    head, wanted = model.head, not config.noautoanchor or isinstance(model.spec.anchors, int)
    if not resumed and wanted and isinstance(head, Detect):
        stride = torch.tensor(head.stride, dtype=torch.float32).view(-1, 1, 1)
        pixels = (head.anchors.cpu() * stride).reshape(-1, 2).double().numpy()
        found, text = fit_anchors(
            box_sizes(train.records, size),
            None if isinstance(model.spec.anchors, int) else pixels,
            len(pixels),
            threshold=hyp.anchor_t,
            seed=config.seed,
        )
        if found is not pixels:
            head.set_anchors(torch.from_numpy(found.reshape(head.anchors.shape)))
        say_main(text)
    freeze(model, config.freeze)
    if config.batch_size == -1:
        loss = build_loss(model, hyp, image_size=size)
        autocast = autocast_type(config, world.device)
        batch = largest_batch(model, loss, image_size=size, device=world.device, autocast=autocast)
        config = replace(config, batch_size=batch)
    return model, config


def model_file(config: TrainConfig) -> ModelSpec | Draft:
    """The model that the flags mean, read and checked before any data: a Draft with --fit.

    A file with --backbone, --neck, --head, or the checkpoint's; the weights are known to be there.
    Raises UserError as models.yaml.parser and models.profile.fit do.
    """
    weights = config.backbone_weights
    if weights and not weights.startswith(TIMM) and not Path(weights).is_file():
        raise UserError(f"--backbone-weights {weights}: no such file")
    if config.weights and not config.cfg:
        if config.backbone or config.neck or config.head or config.fit:
            raise UserError(
                "--backbone, --neck, --head and --fit change a model file: name it with --cfg"
                " (--weights alone brings a complete model)"
            )
        return load_detector(config.weights, device="cpu").spec
    if config.weights:
        with open_pickled(Path(config.weights)):
            pass  # a checkpoint; whether its tensors are whole is seen when they are loaded
    draft = load_draft(
        config.cfg or DEFAULT_MODEL,
        backbone=config.backbone or None,
        neck=config.neck or None,
        head=config.head or None,
    )
    if not config.fit:
        return draft.resolve()
    read_budget(config.fit, image_size=config.imgsz)
    return draft


def _fitted(model: ModelSpec | Draft, config: TrainConfig, *, classes: int) -> ModelSpec:
    """The model at the budget of --fit, if it is one to scale."""
    if isinstance(model, ModelSpec):
        return model
    budget = read_budget(config.fit, image_size=config.imgsz)
    fitted = fit(model, budget, classes=classes)
    say_main(fitted.text(budget))
    return fitted.spec


def autocast_type(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """The type that the forward pass runs in on CUDA; None for float32."""
    return AMP_TYPES.get(config.amp) if device.type == "cuda" else None


def to_network(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> float32 in [0, 1], channels last; floats are ready."""
    if images.is_floating_point():
        return images
    return images.to(dtype=torch.float32, memory_format=torch.channels_last).div_(255)


class ForwardAndLoss(nn.Module):
    """Images (B, 3, H, W) and targets of a rank -> what its backward pass starts from.

    That is the loss to differentiate, and its (3,) parts (`Head.losses`), detached.  Compiled or
    not, it is the same function; compiled, targets are padded by boxes without area, so that their
    number, a power of two, rarely changes.
    """

    def __init__(
        self,
        model: Detector,
        loss: Loss,
        world: Distributed,
        *,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model, self.loss, self.world, self.autocast = model, loss, world, autocast
        self.graphs = False  # whether its results lie in the memory of CUDA graphs
        self._room = 0  # targets that a compiled step takes
        self._run = self._compute

    def compile_step(self, *, varying: bool, **options: Any) -> None:
        """Compile at the next call, for images of any size with `varying`.

        `options` are torch.compile's.  On several ranks the model alone is compiled: the loss waits
        for the other ranks.
        """
        world = self.world
        if world.world_size > 1:
            self.model.compile(dynamic=varying, **options)  # in place: names stay
            return
        self._room = MIN_ROOM
        self.graphs = world.device.type == "cuda" and not varying
        mode = "reduce-overhead" if self.graphs else None
        self._run = torch.compile(self._compute, dynamic=varying, mode=mode, **options)

    def forward(self, images: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """See the class."""
        grid = self.loss.grid(images.shape)  # here, since what is compiled cannot keep tensors
        if self._room:
            if len(targets) > self._room:
                self._room = 1 << (2 * len(targets)).bit_length()
            targets = targets.padded(self._room)
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return self._run(images, targets, grid)

    def _compute(self, images: Tensor, targets: Targets, grid: Any) -> tuple[Tensor, Tensor]:
        world, autocast = self.world, self.autocast
        with torch.autocast(world.device.type, autocast, enabled=autocast is not None):
            raw = self.model(to_network(images))
        reduce = distributed.all_reduce_sum if world.world_size > 1 else None
        return self.loss(raw, targets, grid=grid, reduce=reduce, world_size=world.world_size)


def wrapped(
    step: ForwardAndLoss, config: TrainConfig
) -> tuple[nn.Module, Callable[[], AbstractContextManager[None]]]:
    """`step` as training calls it: compiled, distributed over ranks, or as it is.

    Also the context in which a backward pass leaves its gradients on their rank.
    """
    if config.sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(step)  # in place: same tensors
    if config.compile:
        varying = config.multi_scale or config.rect
        step.compile_step(varying=varying)
        what = "forward and loss are" if step.world.world_size == 1 else "the model is"
        kind = " into CUDA graphs" if step.graphs else ", for any image size," if varying else ""
        full = "; the last batch of an epoch is filled up with images from its beginning"
        say_main(
            f"--compile: {what} compiled{kind} in the first step, which takes a minute or"
            f" more{'' if config.rect else full}"
        )
    if step.world.world_size == 1:
        return step, nullcontext
    devices = [step.world.device] if step.world.device.type == "cuda" else None
    module = DistributedDataParallel(step, device_ids=devices)
    return module, module.no_sync


def largest_batch(
    model: Detector,
    loss: Loss,
    *,
    image_size: int,
    device: torch.device,
    autocast: torch.dtype | None,
) -> int:
    """Images per step that use `SHARE` of the free memory of a GPU, at most 1024; 16 on a CPU.

    Doubles a trial batch until memory runs out or is used up, then interpolates memory over batch
    linearly.  The model's state is left as it was.  UserError when one image is too much.
    """
    if device.type != "cuda":
        say(f"--batch-size -1 measures GPU memory; on a CPU the batch is {DEFAULT_BATCH}")
        return DEFAULT_BATCH
    trial = copy.deepcopy(model).train()

    def step_memory(batch: int) -> int:
        """Peak bytes of one forward and backward pass."""
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_reserved(device)
        images = torch.zeros(batch, 3, image_size, image_size, device=device)
        images = images.contiguous(memory_format=torch.channels_last)
        index = torch.arange(batch, device=device).repeat_interleave(BOXES_PER_IMAGE)
        corners = torch.tensor([0.25, 0.25, 0.5, 0.5], device=device) * image_size
        targets = Targets(index, torch.zeros_like(index), corners.expand(len(index), 4))
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            raw = trial(images)
        loss(raw, targets)[0].backward()
        return torch.cuda.max_memory_reserved(device) - before

    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    budget = free * SHARE - STATE_COPIES * weights
    used: dict[int, int] = {}
    batch = 1
    while batch <= MAX_BATCH and max(used.values(), default=0) <= budget:
        try:
            used[batch] = step_memory(batch)
        except torch.OutOfMemoryError:
            break
        finally:
            trial.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        batch *= 2
    fitting = batch_on_line(used, budget)
    if fitting < 1:
        raise UserError(
            f"--batch-size -1: not even one image of {image_size} px fits into the"
            f" {free / 2**30:.1f} GiB free on {device}; try a smaller --imgsz"
        )
    say(f"--batch-size -1: {fitting} images use {SHARE:.0%} of {free / 2**30:.1f} GiB free")
    return fitting


def batch_on_line(used: dict[int, int], budget: float) -> int:
    """The batch whose memory meets `budget` on the line through the two largest trials.

    `used` is bytes by batch.  0 when not even the first trial fits; never more than twice the
    largest trial, nor more than `MAX_BATCH`.
    """
    batches = sorted(used)
    if not batches or used[batches[0]] > budget:
        return 0
    if len(batches) == 1:
        return batches[0]
    below, above = batches[-2:]
    slope = (used[above] - used[below]) / (above - below)
    if slope <= 0:
        return min(above, MAX_BATCH)
    fitting = int(below + (budget - used[below]) / slope)
    return max(min(fitting, 2 * above, MAX_BATCH), 1)
