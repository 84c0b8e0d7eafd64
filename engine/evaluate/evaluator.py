"""One evaluation of a detector, in training and by itself: detections, COCO's metrics, speed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from data.index.columns import ImageRecord
from data.index.records import DataIndex
from data.loading.sample import Batch
from engine.checkpoint import require_finite
from engine.distributed import broadcast_object, is_active, is_main
from engine.evaluate.config import EvalConfig
from engine.evaluate.matching import BoxTable
from engine.evaluate.metrics import DetectionMetrics, Shard, by_id, metrics_of
from engine.evaluate.plots import BatchImages
from engine.evaluate.tta import decode_augmented
from engine.export.runtime import Network
from engine.measure.bench import Stopwatch
from models.detector import Detector
from models.losses.build import Loss
from utils.boxes import Detections
from utils.errors import FeatherDetError, UserError
from utils.nms import NmsConfig, nms, non_finite
from utils.terminal import warn_main


def evaluate(
    model: Network,
    batches: Iterable[Batch],
    index: DataIndex,
    *,
    config: EvalConfig,
    device: torch.device,
    loss: Loss | None = None,
    images: BatchImages | None = None,
    progress: bool = True,
) -> DetectionMetrics:
    """Detect on `batches` (together all images of `index`) and compare with its boxes.

    The input gets the type of the model's weights (float16 after `Detector.to_half`); the network
    obeys torch.autocast.  Under torch.distributed each rank passes its own share; all ranks return
    the same metrics, each image counted once, and only rank 0 detections and curves.  The model is
    in eval mode afterwards.
    `images` collects drawings of the first batches.
    Raises UserError for weights or outputs that are not finite and for unequal class counts.
    """
    check(model, index, config)
    _compare_names(model, index, config)
    quiet = not (progress and is_main())
    bar = tqdm(batches, desc="validating", dynamic_ncols=True, disable=quiet, leave=False)
    detect = partial(
        _detect, model, bar, by_id(index), config=config, device=device, loss=loss, drawn=images
    )
    if not is_active():
        return metrics_of([detect()], index)
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(_outcome(detect), outcomes if is_main() else None)
    answer: Any = next((item for item in outcomes if isinstance(item, Exception)), None)
    if is_main() and answer is None:
        answer = _outcome(partial(metrics_of, outcomes, index))
    light = answer
    if isinstance(answer, DetectionMetrics):
        light = replace(answer, detections=BoxTable.concatenate([]), curves=None, precision50=None)
    sent: Any = broadcast_object(light)
    if isinstance(sent, Exception):
        raise sent
    return answer if is_main() else sent


def _outcome(step: Callable[[], Any]) -> Any:
    """What `step` returns, or its error in a form that surely travels between processes.

    An error must reach the other ranks, or they would wait for this one until the timeout.
    """
    try:
        return step()
    except FeatherDetError as error:
        return error
    except Exception as error:
        return RuntimeError(f"{type(error).__name__}: {error}")


def check(model: Network, index: DataIndex, config: EvalConfig) -> None:
    """Raise UserError for weights that are not finite and for unequal class counts."""
    if isinstance(model, nn.Module):
        require_finite(model.state_dict(), "the model")
    if not config.single_cls and len(model.names) != len(index.names):
        mine, theirs = (
            f"{len(names)} classes ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for names in (model.names, index.names)
        )
        raise UserError(
            f"the model has {mine}, the data set has {theirs}: use the data set the model was"
            " trained on"
        )


def _compare_names(model: Network, index: DataIndex, config: EvalConfig) -> None:
    unnamed = tuple(str(number) for number in range(len(model.names)))
    if config.single_cls or model.names in {index.names, unnamed}:
        return
    pairs = zip(model.names, index.names, strict=True)
    mine, theirs = next(pair for pair in pairs if pair[0] != pair[1])
    reordered = sorted(model.names) == sorted(index.names)
    wrong = ", so the metrics are wrong: the same names are in another order" if reordered else ""
    warn_main(
        f"warning: class names of model and data set differ, first {mine!r} and {theirs!r}; "
        f"classes are compared by their numbers{wrong}"
    )


@torch.inference_mode()
def _detect(
    model: Network,
    batches: Iterable[Batch],
    records: Sequence[ImageRecord],
    *,
    config: EvalConfig,
    device: torch.device,
    loss: Loss | None,
    drawn: BatchImages | None,
) -> Shard:
    numbers = {record.image_id: number for number, record in enumerate(records)}
    suppression = NmsConfig(
        conf=config.conf,
        iou=config.iou,
        max_det=config.max_det,
        suppress=config.augment or not model.end_to_end,  # views overlap
    )
    weight_type = model.input_type
    watch = Stopwatch(device, stages=3)
    parts: list[BoxTable] = []
    images_seen = 0
    sums = torch.zeros(3, device=device)
    if isinstance(model, nn.Module):
        model.eval()
    for batch in batches:
        watch.mark()
        there = batch.to(device)
        images = there.images.to(weight_type).div_(255)
        watch.mark()
        if loss is None:
            decoded = model.detect(images, config.conf)
        else:
            detector = cast(Detector, model)  # only training asks for a loss
            raw = detector(images)
            decoded = detector.head.decode(raw, config.conf)
        if config.augment:
            decoded = decode_augmented(model, images, decoded, config.conf)
        watch.mark()
        rows = [numbers[image_id] for image_id in batch.image_ids]
        for bad in non_finite(*decoded):
            path = records[rows[bad]].path
            cure = "" if weight_type == torch.float32 else "; try without --half"
            raise UserError(f"{path}: the model's outputs are not finite{cure}")
        image, boxes, scores = decoded
        if config.single_cls:
            scores = scores.amax(1, keepdim=True)
        found = Detections.to_cpu(nms(image, boxes, scores, suppression, images=len(batch)))
        for item, geometry, number in zip(found, batch.letterboxes, rows, strict=True):
            corners = geometry.to_image(item.boxes).numpy()
            labels, values = item.labels.numpy(), item.scores.numpy()
            parts.append(BoxTable.detections(np.full(len(item), number), labels, corners, values))
        watch.mark()
        images_seen += len(batch)
        if loss is not None:
            sums += loss(raw, there.targets)[1] * len(batch)
        if drawn is not None:
            drawn.add(batch, found)
    names = () if loss is None else cast(Detector, model).head.losses
    return Shard(
        BoxTable.concatenate(parts),
        images_seen,
        dict(zip(names, sums.tolist(), strict=False)),
        watch.seconds(),
    )
