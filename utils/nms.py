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
# Pixels between the classes, more than any box has: each class is suppressed in a region of its
# own, in float64, where coordinates stay exact to 1e-7 pixels.  torchvision's batched_nms shifts in
# float32, which blurs high classes by hundredths of a pixel.
CLASS_SHIFT = 2**20


@dataclass(frozen=True)
class NmsConfig:
    """`conf` and `iou` thresholds in [0, 1]; `classes` keeps only these labels (None: all).

    Without `suppress`, for boxes of an end-to-end head, a box has its best class alone, and only
    `conf`, `max_det` and `classes` matter.
    """

    conf: float = 0.25
    iou: float = 0.45
    max_det: int = 300
    agnostic: bool = False
    multi_label: bool = True
    classes: tuple[int, ...] | None = None
    suppress: bool = True

    def __post_init__(self) -> None:
        check_range("NmsConfig.conf", self.conf, 0, 1)
        check_range("NmsConfig.iou", self.iou, 0, 1)
        check_range("NmsConfig.max_det", self.max_det, 1, math.inf)


@torch.no_grad()
def nms(
    image: Tensor, boxes: Tensor, scores: Tensor, config: NmsConfig, *, images: int
) -> list[Detections]:
    """Suppress overlapping boxes class by class -> `Detections` of each of `images` images.

    `image` (M,), `boxes` (M, 4) xyxy network pixels and `scores` (M, classes) in [0, 1] are what a
    head decodes, in float32.  Every (box, class) pair over `conf` is a candidate (with
    `multi_label` off only the best class of a box); of an image at most 30,000 by score enter, at
    most `max_det` leave, best first.  Nothing depends on the clock, the device or the other images
    of the batch.
    """
    if config.multi_label and config.suppress:
        row, label = (scores > config.conf).nonzero(as_tuple=True)
        score = scores[row, label]
    else:
        score, label = scores.max(1)
        row = (score > config.conf).nonzero().squeeze(1)
        score, label = score[row], label[row]
    if config.classes is not None:
        wanted = torch.isin(label, torch.tensor(config.classes, device=label.device))
        row, score, label = row[wanted], score[wanted], label[wanted]
    # by image, then best first: floats in [0, 1] are ordered like the integers of the same bits
    order = (image[row] * 2**32 - score.view(torch.int32)).argsort(stable=True)
    row, score, label = row[order], score[order], label[order]
    box, counts = boxes[row], image[row].bincount(minlength=images).tolist()
    if box.device.type == "mps":  # has no float64
        box, score, label = box.cpu(), score.cpu(), label.cpu()
    apart = box.double() if config.agnostic else box.double() + (label * CLASS_SHIFT)[:, None]
    found = []
    for item in zip(*(x.split(counts) for x in (box, score, label, apart)), strict=True):
        if not config.suppress:
            found.append(Detections(*(column[: config.max_det] for column in item[:3])))
            continue
        kept = _suppress(item[3][:MAX_CANDIDATES], item[1].double(), config)
        found.append(Detections(*(column[kept] for column in item[:3])))
    return found


def non_finite(image: Tensor, boxes: Tensor, scores: Tensor) -> list[int]:
    """The images of a decoded batch with a box or score that is not finite."""
    finite = (boxes.sum(1) + scores.sum(1)).isfinite()
    return image[~finite].unique().tolist()


def _suppress(boxes: Tensor, score: Tensor, config: NmsConfig) -> Tensor:
    """Indices kept of candidates sorted by score, best first, at most `max_det`.

    A worse box never decides on a better one, so the candidates are taken in portions: those kept
    so far and the next ones, until `max_det` are kept.
    """
    iou = float(np.float32(config.iou))  # what the CUDA kernel compares with
    indices = torch.arange(len(boxes), device=score.device)
    kept = indices[:0]
    for portion in indices.split(PORTION):
        rows = torch.cat((kept, portion))
        kept = rows[torchvision.ops.nms(boxes[rows], score[rows], iou)]
        if len(kept) >= config.max_det:
            break
    return kept[: config.max_det]
