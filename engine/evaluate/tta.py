"""Test-time augmentation: the same images at several scales and mirrored, as one set of boxes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.export.runtime import Network
from utils.boxes import GREY

# (scale, mirrored left-right), YOLOv5's views besides the plain pass
VIEWS = ((0.83, True), (0.67, False))


def decode_augmented(
    model: Network, images: Tensor, plain: tuple[Tensor, Tensor, Tensor], conf: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Add what the other views decode to over `conf` to what the plain pass does (`Detect.decode`).

    `images` (B, 3, H, W) in [0, 1]; boxes come back in their pixels, to be merged by one NMS.
    """
    height, width = images.shape[2:]
    stride = model.max_stride
    decoded = [plain]
    for scale, mirrored in VIEWS:
        inner = (max(int(height * scale), 1), max(int(width * scale), 1))
        outer = [math.ceil(side * scale / stride) * stride for side in (height, width)]
        view = F.interpolate(
            images.flip(3) if mirrored else images, size=inner, mode="bilinear", align_corners=False
        )
        padding = (0, outer[1] - inner[1], 0, outer[0] - inner[0])
        image, boxes, scores = model.detect(F.pad(view, padding, value=GREY / 255), conf)
        x, y = width / inner[1], height / inner[0]
        boxes = boxes * boxes.new_tensor((x, y, x, y))
        if mirrored:
            left, top, right, bottom = boxes.unbind(-1)
            boxes = torch.stack((width - right, top, width - left, bottom), -1)
        decoded.append((image, boxes, scores))
    image, boxes, scores = (torch.cat(parts) for parts in zip(*decoded, strict=True))
    return image, boxes, scores
