"""Boxes that travel between data, models and engine, and the letterbox: xyxy pixels, always.

Centre-size exists only inside heads and losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

GREY = 114  # of the padding, YOLOv5's value


@dataclass(frozen=True)
class Targets:
    """The ground-truth boxes of a batch."""

    image_index: Tensor  # (M,) int64, row of the batch
    labels: Tensor  # (M,) int64
    boxes: Tensor  # (M, 4) float32, xyxy network pixels

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def to(self, device: torch.device) -> Targets:
        """The same targets on `device`; asynchronous when the tensors are pinned."""
        return Targets(*(item.to(device, non_blocking=True) for item in vars(self).values()))

    def padded(self, count: int) -> Targets:
        """`count` targets: these, then boxes without area, which no anchor is assigned to."""
        more = count - len(self)
        return Targets(
            F.pad(self.image_index, (0, more)),
            F.pad(self.labels, (0, more)),
            F.pad(self.boxes, (0, 0, 0, more)),
        )

    def twice(self, images: int) -> Targets:
        """These of a batch of `images`, and the same again for as many images after them."""
        index = torch.cat((self.image_index, self.image_index + images))
        return Targets(index, self.labels.repeat(2), self.boxes.repeat(2, 1))

    def pin_memory(self) -> Targets:
        """The same targets in page-locked memory."""
        return Targets(*(item.pin_memory() for item in vars(self).values()))


@dataclass(frozen=True)
class Detections:
    """The detections of one image, best first."""

    boxes: Tensor  # (K, 4) float32, xyxy pixels
    scores: Tensor  # (K,) float32 in [0, 1]
    labels: Tensor  # (K,) int64

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    @staticmethod
    def to_cpu(images: Sequence[Detections]) -> list[Detections]:
        """The same detections in main memory, by one copy for all images."""
        columns = [(item.boxes, item.scores[:, None], item.labels[:, None]) for item in images]
        together = torch.cat([torch.cat([part.float() for part in row], 1) for row in columns])
        rows = together.cpu().split([len(item) for item in images])
        return [Detections(row[:, :4], row[:, 4], row[:, 5].long()) for row in rows]


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(N, 4) x1 y1 x2 y2 -> (N, 4) centre x, centre y, width, height."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low), -1)


def yolo_rows(
    boxes: np.ndarray,
    labels: Sequence[int],
    size: tuple[int, int],
    *,
    scores: np.ndarray | None,
    digits: str,
) -> str:
    """YOLO's lines `class cx cy w h`, normalised by `size` (height, width), and the score if given.

    boxes: (N, 4) xyxy pixels; scores: (N,).  `digits` is the format of a number.
    """
    corners = boxes.astype(np.float64) / (np.array([size[1], size[0]] * 2))
    centre, sides = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    values = np.concatenate((centre, sides), 1)
    if scores is not None:
        values = np.concatenate((values, scores[:, None]), 1)
    return "".join(
        f"{label} " + " ".join(f"{value:{digits}}" for value in row) + "\n"
        for label, row in zip(labels, values.tolist(), strict=True)
    )


def complete_iou(
    centre: Tensor, size: Tensor, true_centre: Tensor, true_size: Tensor, *, eps: float = 1e-7
) -> Tensor:
    """CIoU of paired boxes, (..., 2) each, all in the same units, broadcast -> (...).

    IoU - distance term - aspect term; the aspect term's weight is detached.
    arXiv:1911.08287, section 3.2 (equations 10-12).
    """
    offset = centre - true_centre
    # by side: the smaller and the larger of the two, and how far the boxes stick out at an end
    excess = (size - true_size).relu()
    small, large = size - excess, true_size + excess
    out = (offset.abs() - (large - small) / 2).relu()
    (width, height), (true_width, true_height) = size.unbind(-1), true_size.unbind(-1)
    common_width, common_height = (small - out).relu().unbind(-1)
    intersection = common_width * common_height
    union = width * height + (true_width * true_height + eps) - intersection
    iou = intersection / union
    apart, diagonal = torch.stack((offset, large + out)).square().sum(-1)
    angle = torch.atan2(true_width, true_height) - torch.atan(width / (height + eps))
    aspect = (4 / math.pi**2) * angle.square()
    with torch.no_grad():
        weight = aspect / (aspect - iou + (1 + eps))
    return iou - torch.addcmul(apart / (diagonal + eps), weight, aspect)


@dataclass(frozen=True)
class Letterbox:
    """Scale an image to fit `dst`, or to a long side, and centre it on grey.

    `src` and `dst` are (height, width) in pixels.  The scaled image has whole pixels and lies at a
    whole offset; boxes use exactly these, so that they fit the drawn pixels without the half-pixel
    shift of a common ratio, and `to_image` is the inverse of `to_network`.
    """

    src: tuple[int, int]
    dst: tuple[int, int]
    long_side: int | None = None  # of the scaled image; None: as long as `dst` allows

    @staticmethod
    def rect(src: tuple[int, int], size: int, stride: int) -> Letterbox:
        """Each side = ceil(ratio * size / stride + 0.5) * stride, ratio = side / long side."""
        long_side = max(src)
        height, width = (math.ceil(s / long_side * size / stride + 0.5) * stride for s in src)
        return Letterbox(src, (height, width), size)

    @staticmethod
    def tight(src: tuple[int, int], size: int, stride: int) -> Letterbox:
        """The smallest canvas of multiples of `stride` for the image scaled to long side `size`."""
        ratio = size / max(src)
        height, width = (max(math.ceil(round(s * ratio) / stride), 1) * stride for s in src)
        return Letterbox(src, (height, width), size)

    @property
    def scale(self) -> float:
        """Network pixels per image pixel."""
        if self.long_side is not None:
            return self.long_side / max(self.src)
        return min(self.dst[0] / self.src[0], self.dst[1] / self.src[1])

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the scaled image in whole pixels, at least 1."""
        return max(round(self.src[0] * self.scale), 1), max(round(self.src[1] * self.scale), 1)

    @property
    def scale_xy(self) -> tuple[float, float]:
        """(x, y) network pixels per image pixel, after rounding to whole pixels."""
        height, width = self.size
        return width / self.src[1], height / self.src[0]

    @property
    def offset(self) -> tuple[int, int]:
        """(left, top) of the scaled image on the canvas, in whole pixels."""
        height, width = self.size
        return (self.dst[1] - width) // 2, (self.dst[0] - height) // 2

    def apply(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 of size `src` -> (dst height, dst width, 3) uint8, bilinear."""
        height, width = self.size
        if (height, width) != self.src:
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        if (height, width) == self.dst:
            return np.ascontiguousarray(image)
        left, top = self.offset
        canvas = np.full((*self.dst, image.shape[2]), GREY, dtype=np.uint8)
        canvas[top : top + height, left : left + width] = image
        return canvas

    def to_network(self, boxes: np.ndarray) -> np.ndarray:
        """(N, 4) float32 xyxy image pixels -> network pixels."""
        scale = np.array(self.scale_xy * 2, dtype=np.float32)
        return boxes.astype(np.float32) * scale + np.array(self.offset * 2, dtype=np.float32)

    def to_image(self, boxes: Tensor) -> Tensor:
        """(N, 4) xyxy network pixels -> image pixels, clipped to the image."""
        height, width = self.src
        xyxy = (boxes - boxes.new_tensor(self.offset * 2)) / boxes.new_tensor(self.scale_xy * 2)
        return torch.minimum(xyxy.clamp(min=0), boxes.new_tensor([width, height, width, height]))
