"""YOLOv5's anchor-based head: a 1x1 convolution per level, and what its maps mean."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.registry import Head, register

PRIOR_OBJECTS = 8.0  # objects expected in a 640 px image, for the first biases
PRIOR_CLASS = 0.6


@register
class Detect(Head):
    """A 1x1 convolution per level to anchors * (5 + classes).

    Maps of (B, C_i, H_i, W_i) -> raw maps (B, A, H_i, W_i, 5 + classes), the last axis
    t_x t_y t_w t_h t_obj t_class...
    `anchors` (levels, A, 2) are in units of each level's stride, as in YOLOv5's checkpoints.
    """

    losses = ("box", "obj", "cls")
    anchors: Tensor

    def __init__(self, c_in: Sequence[int], *, classes: int, anchors_per_level: int) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"Detect needs at least one class, got {classes}")
        self.classes = classes
        self.outputs = 5 + classes
        self.anchors_per_level = anchors_per_level
        self.m = nn.ModuleList(nn.Conv2d(c, anchors_per_level * self.outputs, 1) for c in c_in)
        self.register_buffer("anchors", torch.zeros(len(c_in), anchors_per_level, 2))

    @property
    def layout(self) -> tuple[int, ...]:
        """Classes and anchors: 3 * (5 + 15) and 4 * (5 + 10) outputs are both 60."""
        return self.classes, self.anchors_per_level

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """One feature map per level -> one raw map per level."""
        raw = []
        for convolution, feature in zip(self.m, maps, strict=True):
            y = self.predict(convolution, feature)
            batch, _, height, width = y.shape
            y = y.view(batch, self.anchors_per_level, self.outputs, height, width)
            raw.append(y.permute(0, 1, 3, 4, 2))
        return raw

    @torch.no_grad()
    def set_stride(self, stride: Sequence[int], anchors: Sequence[Sequence[float]] | int) -> None:
        """Fix the levels' strides in pixels, and from them anchors and the first biases."""
        super().set_stride(stride, anchors)
        if isinstance(anchors, int):  # initial values; AutoAnchor finds better ones
            sizes = [2.0 ** (1 + 2 * a / max(anchors, 1)) for a in range(anchors)]
            pixels = torch.tensor(
                [[[s * t, s * t] for t in sizes] for s in self.stride], device="cpu"
            )
        else:
            pixels = torch.tensor(anchors, device="cpu").view(len(self.stride), -1, 2)
        self.set_anchors(pixels)
        # biases start from the priors of RetinaNet (arXiv:1708.02002, section 3.3), YOLOv5's form
        for convolution, pixels_per_cell in zip(self.m, self.stride, strict=True):
            assert isinstance(convolution, nn.Conv2d)
            assert convolution.bias is not None
            bias = convolution.bias.view(self.anchors_per_level, -1)
            bias[:, 4] += math.log(PRIOR_OBJECTS / (640 / pixels_per_cell) ** 2)
            bias[:, 5:] += math.log(PRIOR_CLASS / (self.classes - 0.99999))

    def set_anchors(self, pixels: Tensor) -> None:
        """(levels, A, 2) widths and heights in pixels; levels get them by area."""
        pixels = pixels.detach().float().cpu()
        areas = pixels.prod(-1).mean(-1)
        by_stride = torch.tensor(self.stride, device="cpu").argsort().argsort()
        ordered = pixels[areas.argsort()][by_stride]
        stride = torch.tensor(self.stride, dtype=torch.float32, device="cpu").view(-1, 1, 1)
        self.anchors.copy_(ordered / stride)

    def decode(self, raw: Sequence[Tensor], conf: float) -> tuple[Tensor, Tensor, Tensor]:
        """As in Head: the cells whose objectness is over `conf`.

        score = objectness * class,
        centre = (2 sigmoid(t_xy) - 0.5 + cell) * stride, size = (2 sigmoid(t_wh))^2 * anchor.
        """
        images, boxes, scores = [], [], []
        for level, y in enumerate(raw):
            low = y[..., 4].float().sigmoid() <= conf  # not so for NaN, which must be noticed
            image, anchor, row, column = low.logical_not().nonzero(as_tuple=True)
            y = y[image, anchor, row, column].float().sigmoid()
            images.append(image)
            boxes.append(self._boxes(y, torch.stack((column, row), 1), level, anchor))
            scores.append(y[:, 5:] * y[:, 4:5])
        return torch.cat(images), torch.cat(boxes), torch.cat(scores)

    def dense(self, raw: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As in Head."""
        boxes, scores = [], []
        for level, y in enumerate(raw):
            y = y.float().sigmoid()
            column, row = (torch.arange(side, device=y.device) for side in (y.shape[3], y.shape[2]))
            cell = torch.stack(torch.meshgrid(column, row, indexing="xy"), -1)
            anchor = torch.arange(y.shape[1], device=y.device).view(-1, 1, 1)
            boxes.append(self._boxes(y, cell, level, anchor).flatten(1, 3))
            scores.append((y[..., 5:] * y[..., 4:5]).flatten(1, 3))
        return torch.cat(boxes, 1), torch.cat(scores, 1)

    def _boxes(self, y: Tensor, cell: Tensor, level: int, anchor: Tensor) -> Tensor:
        """Sigmoids (..., 5 + classes) of cells (..., 2) -> boxes (..., 4), xyxy network pixels."""
        stride = self.stride[level]
        centre = (y[..., 0:2] * 2 - 0.5 + cell) * stride
        half = (y[..., 2:4] * 2).square() * (self.anchors[level] * (stride / 2))[anchor]
        return torch.cat((centre - half, centre + half), -1)
