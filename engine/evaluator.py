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

from data.records import DataIndex, ImageRecord
from data.sample import Batch
from engine.augment import decode_augmented
from engine.distributed import broadcast_object, is_active, is_main
from engine.figures import Shard, by_id, metrics_of
from engine.pictures import BatchPictures
from engine.results import DetectionMetrics
from engine.stopwatch import Stopwatch
from models.detector import Detector
from models.losses.anchor import AnchorLoss
from utils.errors import UserError
from utils.metrics import Found
from utils.nms import NmsConfig, nms
from utils.structures import Decoded, Detections


@dataclass(frozen=True)
class EvalConfig:
    """Settings that move the figures; the defaults are those of published YOLOv5 results."""

    conf: float = 0.001
    iou: float = 0.6  # of NMS
    max_det: int = 300  # of an image; COCO counts the best 100 of each image and class
    augment: bool = False  # test-time augmentation, engine/augment.py
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
    _check(model, index, config, device)
    records = by_id(index)
    with _eval_mode(model), torch.inference_mode():
        shard = _detect(
            model,
            tqdm(
                batches,
                desc="validating",
                dynamic_ncols=True,
                disable=not (progress and is_main()),
                leave=False,
            ),
            records,
            config=config,
            device=device,
            loss=loss,
            pictures=BatchPictures(plots, index.names) if plots is not None and is_main() else None,
        )
    shards = _gather(shard)
    answer: DetectionMetrics | Exception | None = None
    if is_main():
        try:
            answer = metrics_of(shards, records, index, plots=plots)
        except Exception as error:  # every rank must raise it, not wait for ever
            answer = error
    answer = broadcast_object(answer)
    if not isinstance(answer, DetectionMetrics):
        raise answer or RuntimeError("rank 0 sent no metrics")
    return answer


def _check(model: Detector, index: DataIndex, config: EvalConfig, device: torch.device) -> None:
    if config.half and device.type != "cuda":
        raise UserError(f"half precision needs CUDA; on {device.type} evaluate without --half")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"non-finite weights: {name} holds NaN or infinity; nothing to evaluate"
            )
    if config.single_cls:
        if len(index.names) != 1:
            raise ValueError(f"single_cls needs an index of one class, got {len(index.names)}")
        return
    if len(model.names) != len(index.names):
        raise UserError(
            f"the model has {len(model.names)} classes ({_some(model.names)}), the data set has "
            f"{len(index.names)} ({_some(index.names)}): use the data set the model was trained on"
        )
    unnamed = tuple(str(number) for number in range(len(model.names)))
    if tuple(model.names) not in {tuple(index.names), unnamed} and is_main():
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
    parts: dict[int, Found] = {}
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


def _found(item: Detections, number: int) -> Found:
    here = item.cpu()
    image = np.full(len(here), number)
    return Found(image, here.labels.numpy(), here.boxes.numpy(), here.scores.numpy())


def _gather(shard: Shard) -> list[Shard]:
    """All shards on rank 0; elsewhere only the own one."""
    if not is_active():
        return [shard]
    shards: list[Shard | None] = [None] * dist.get_world_size()
    dist.gather_object(shard, shards if is_main() else None)
    return [item for item in shards if item is not None] if is_main() else [shard]
