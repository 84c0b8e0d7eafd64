"""Non-maximum suppression of decoded boxes, the same rows on every device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torchvision
from torch import Tensor

from utils.boxes import Detections
from utils.config import check_range

MAX_CANDIDATES = 30_000  # by score, before suppression; YOLOv5's limit
PORTION = 1_000  # candidates suppressed at once


@dataclass(frozen=True)
class NmsConfig:
    """`conf` and `iou` thresholds in [0, 1]; `classes` keeps only these labels (None: all)."""

    conf: float = 0.25
    iou: float = 0.45
    max_det: int = 300
    agnostic: bool = False
    multi_label: bool = True
    classes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_range("NmsConfig.conf", self.conf, 0, 1)
        check_range("NmsConfig.iou", self.iou, 0, 1)
        check_range("NmsConfig.max_det", self.max_det, 1, math.inf)


@torch.no_grad()
def nms(boxes: Tensor, scores: Tensor, config: NmsConfig) -> list[Detections]:
    """Suppress overlapping boxes class by class -> one `Detections` per image, network pixels.

    `boxes` (B, N, 4) xyxy network pixels and `scores` (B, N, classes) in [0, 1] are what a head
    decodes.  Every (box, class) pair over `conf` is a candidate (with `multi_label` off only the
    best class of a box); at most 30,000 by score enter, at most `max_det` leave, best first.
    Nothing depends on the clock, the device or the other images of the batch.
    """
    found = []
    for corners, values in zip(boxes, scores, strict=True):
        rows = torch.nonzero(values.amax(1) > config.conf).squeeze(1)
        box, score = corners[rows].float(), values[rows].float()
        if config.multi_label and score.shape[1] > 1:
            row, label = torch.nonzero(score > config.conf, as_tuple=True)
            box, score = box[row], score[row, label]
        else:
            score, label = score.max(1) if len(rows) else (score.sum(1), rows)
        if config.classes is not None:
            wanted = torch.isin(label, torch.tensor(config.classes, device=label.device))
            box, score, label = box[wanted], score[wanted], label[wanted]
        order = score.argsort(descending=True, stable=True)[:MAX_CANDIDATES]
        box, score, label = box[order], score[order], label[order]
        groups = torch.zeros_like(label) if config.agnostic else label
        kept = _suppress(box, score, groups, config)
        found.append(Detections(box[kept], score[kept], label[kept]))
    return found


def non_finite(boxes: Tensor, scores: Tensor) -> list[int]:
    """The images of a decoded batch with a box or score that is not finite."""
    sums = boxes.sum((1, 2)) + scores.sum((1, 2))
    return [row for row, finite in enumerate(sums.isfinite().tolist()) if not finite]


def _suppress(boxes: Tensor, score: Tensor, groups: Tensor, config: NmsConfig) -> Tensor:
    """Indices kept of candidates sorted by score, best first, at most `max_det`.

    Each group is moved to a region of its own, in float64: torchvision's batched_nms moves in
    float32, which blurs high classes by whole hundredths of a pixel, and only up to a number of
    boxes that is another one on each device.  A worse box never decides on a better one, so the
    candidates are taken in portions: those kept so far and the next ones, until `max_det` are kept.
    """
    apart, score = boxes.double(), score.double()
    if len(boxes):
        apart = apart + (groups * (apart.max() - apart.min() + 1))[:, None]
    iou = float(np.float32(config.iou))  # what the CUDA kernel compares with
    indices = torch.arange(len(score), device=score.device)
    kept = indices[:0]
    for portion in indices.split(PORTION):
        rows = torch.cat((kept, portion))
        kept = rows[torchvision.ops.nms(apart[rows], score[rows], iou)]
        if len(kept) >= config.max_det:
            break
    return kept[: config.max_det]
