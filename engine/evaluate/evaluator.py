"""One evaluation of a detector, in training and by itself: COCO's figures, curves, speed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from data.index.records import DataIndex, ImageRecord
from data.loading.sample import Batch
from engine.checkpoint import require_finite
from engine.distributed import broadcast_object, is_active, is_main
from engine.evaluate.box_table import BoxTable
from engine.evaluate.metrics import Shard, by_id, metrics_of
from engine.evaluate.pictures import BatchPictures
from engine.evaluate.results import DetectionMetrics
from engine.evaluate.stopwatch import Stopwatch
from engine.evaluate.tta import decode_augmented
from models.detector import Detector
from models.losses.anchor import AnchorLoss
from utils.errors import FeatherDetError, TerminatedError, UserError
from utils.nms import NmsConfig, nms
from utils.structures import Decoded, Detections


@dataclass(frozen=True)
class EvalConfig:
    """Settings that move the figures; the defaults are those of published YOLOv5 results."""

    conf: float = 0.001
    iou: float = 0.6  # of NMS
    max_det: int = 300  # of an image; COCO counts the best 100 of each image and class
    augment: bool = False  # test-time augmentation, engine/evaluate/tta.py
    half: bool = False  # autocast to `half_dtype`; CUDA only
    half_dtype: torch.dtype = torch.float16  # or bfloat16
    single_cls: bool = False  # boxes count, classes do not; the index must have one class

    @property
    def nms(self) -> NmsConfig:
        """The settings of suppression. ValueError for impossible ones."""
        return NmsConfig(conf=self.conf, iou=self.iou, max_det=self.max_det)


def evaluate(
    model: Detector,
    batches: Iterable[Batch],
    index: DataIndex,
    *,
    config: EvalConfig,
    device: torch.device,
    loss: AnchorLoss | None = None,
    plots: Path | None = None,
    progress: bool = True,
) -> DetectionMetrics:
    """Detect on `batches` (together all images of `index`) and compare with its boxes.

    Under torch.distributed each rank passes its own share; all ranks return the same metrics, each
    image counted once.  The model's train/eval state is as before afterwards.  `plots` is an
    existing folder for curves, confusion matrix and three batches' pictures.
    Raises UserError for non-finite weights, unequal class counts, and `half` without CUDA.
    """
    check(model, index, config=config, device=device)
    _compare_names(model, index, config)
    records = by_id(index)
    bar = tqdm(
        batches,
        desc="validating",
        dynamic_ncols=True,
        disable=not (progress and is_main()),
        leave=False,
    )
    drawn = BatchPictures(plots, index.names) if plots is not None and is_main() else None

    outcome: Shard | BaseException
    try:
        with _eval_mode(model), torch.inference_mode():
            outcome = _detect(
                model, bar, records, config=config, device=device, loss=loss, pictures=drawn
            )
    except (Exception, TerminatedError) as error:  # the other ranks must not wait for this one
        if not is_active():
            raise
        outcome = _portable(error)
    outcomes = _gather(outcome)
    answer: DetectionMetrics | BaseException | None = None
    if is_main():
        answer = _conclude(outcomes, records, index, plots)
    answer = broadcast_object(answer)
    if not isinstance(answer, DetectionMetrics):
        raise answer or RuntimeError("rank 0 sent no metrics")
    return answer


def _portable(error: BaseException) -> BaseException:
    """The error in a form that surely travels between processes."""
    known = isinstance(error, (FeatherDetError, TerminatedError))
    return error if known else RuntimeError(f"{type(error).__name__}: {error}")


def _gather(outcome: Shard | BaseException) -> list[Shard | BaseException]:
    """What all ranks have, on rank 0; elsewhere nothing."""
    if not is_active():
        return [outcome]
    outcomes: list[Shard | BaseException | None] = [None] * dist.get_world_size()
    dist.gather_object(outcome, outcomes if is_main() else None)
    return [item for item in outcomes if item is not None]


def _conclude(
    outcomes: Sequence[Shard | BaseException],
    records: Sequence[ImageRecord],
    index: DataIndex,
    plots: Path | None,
) -> DetectionMetrics | BaseException:
    shards = [item for item in outcomes if isinstance(item, Shard)]
    if len(shards) < len(outcomes):
        return next(item for item in outcomes if isinstance(item, BaseException))
    try:
        return metrics_of(shards, records, index, plots=plots)
    except Exception as error:
        if not is_active():
            raise
        return _portable(error)


def check(model: Detector, index: DataIndex, *, config: EvalConfig, device: torch.device) -> None:
    """Raise UserError for what `evaluate` would refuse."""
    if config.half and device.type != "cuda":
        raise UserError(f"half precision needs CUDA; on {device.type} evaluate without --half")
    require_finite(model.state_dict(), "the model")
    if config.single_cls:
        if len(index.names) != 1:
            raise ValueError(f"single_cls needs an index of one class, got {len(index.names)}")
        return
    if len(model.names) != len(index.names):
        raise UserError(
            f"the model has {len(model.names)} classes ({_some(model.names)}), the data set has "
            f"{len(index.names)} ({_some(index.names)}): use the data set the model was trained on"
        )


def _compare_names(model: Detector, index: DataIndex, config: EvalConfig) -> None:
    unnamed = tuple(str(number) for number in range(len(model.names)))
    if config.single_cls or model.names in {index.names, unnamed} or not is_main():
        return
    pairs = zip(model.names, index.names, strict=True)
    mine, theirs = next(pair for pair in pairs if pair[0] != pair[1])
    sys.stderr.write(
        f"warning: class names of model and data set differ, first {mine!r} and {theirs!r}; "
        "classes are compared by their numbers\n"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """model.eval() inside; afterwards every module's own state again (some may be frozen)."""
    states = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in states:
            module.training = training


def _detect(
    model: Detector,
    batches: Iterable[Batch],
    records: Sequence[ImageRecord],
    *,
    config: EvalConfig,
    device: torch.device,
    loss: AnchorLoss | None,
    pictures: BatchPictures | None,
) -> Shard:
    numbers = {record.image_id: number for number, record in enumerate(records)}
    watch = Stopwatch(device, stages=3)
    parts: dict[int, BoxTable] = {}
    images_seen = 0
    sums = torch.zeros(3, device=device)
    for batch in batches:
        watch.mark()
        there = batch.to(device)
        images = there.images.float() / 255
        watch.mark()
        with _precision(config):
            raw = model(images)
            decoded = model.head.decode(raw)
            if config.augment:
                decoded = decode_augmented(model, images, decoded)
        watch.mark()
        kept = _suppress(decoded, config)
        for item, geometry, image_id in zip(kept, batch.letterboxes, batch.image_ids, strict=True):
            number = numbers[image_id]
            parts[number] = _found(item.with_boxes(geometry.to_image(item.boxes)), number)
        watch.mark()
        images_seen += len(batch)
        if loss is not None:
            value = loss(raw, there.targets)
            sums += torch.stack((value.box, value.obj, value.cls)) * len(batch)
        if pictures is not None:
            pictures.add(batch, kept)
    losses = tuple(sums.tolist()) if loss is not None else ()
    return Shard(parts, images_seen, losses, watch.seconds())


def _precision(config: EvalConfig) -> AbstractContextManager[object]:
    return torch.autocast("cuda", config.half_dtype) if config.half else nullcontext()


def _suppress(decoded: Decoded, config: EvalConfig) -> list[Detections]:
    if not bool(torch.isfinite(decoded.boxes.sum())):
        cure = "; try without half precision" if config.half else ""
        raise UserError(f"the model's outputs are not finite{cure}")
    if config.single_cls:
        decoded = Decoded(decoded.boxes, decoded.scores.amax(2, keepdim=True))
    return nms(decoded, config.nms)


def _found(item: Detections, number: int) -> BoxTable:
    here = item.cpu()
    image = np.full(len(here), number)
    return BoxTable.detections(image, here.labels.numpy(), here.boxes.numpy(), here.scores.numpy())
