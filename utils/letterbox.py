"""One geometry between an image and the network's canvas, forwards and back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

GREY = 114  # YOLOv5's padding value


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

    def __post_init__(self) -> None:
        if min(self.src) < 1 or min(self.dst) < 1:
            raise ValueError(f"Letterbox needs positive sizes, got {self.src} -> {self.dst}")

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

    def apply(self, image: np.ndarray, *, area: bool = False) -> np.ndarray:
        """(H, W, 3) uint8 -> (dst height, dst width, 3) uint8, contiguous.

        Bilinear; with `area`, shrinking averages areas (what validation uses).
        Raises ValueError when the image is not of size `src`.
        """
        if image.shape[:2] != self.src:
            raise ValueError(f"Letterbox is for {self.src}, image is {image.shape[:2]}")
        height, width = self.size
        if (height, width) != self.src:
            shrink = cv2.INTER_AREA if area and self.scale < 1 else cv2.INTER_LINEAR
            image = cv2.resize(image, (width, height), interpolation=shrink)
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
