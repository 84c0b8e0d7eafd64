"""An anchor-free, decoupled head: two towers per level, and what their maps mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks.conv import Conv
from models.registry import Head, Positive, Range, register

PRIOR_CLASS = 0.01  # the first scores (RetinaNet, arXiv:1708.02002, section 4.1)
PRIOR_SIDE = 1.0  # the first distances from a point to the sides of its box, in strides
LIGHT = 256  # channels: a model that has no wider level than YOLOv5-n's gets depthwise towers
MAX_CLASS_WIDTH = 100  # of the default: more classes need no wider tower


@register
class FreeDetect(Head):
    """Per level a tower for the box and one for the classes, a point in the middle of each cell.

    Maps of (B, C_i, H_i, W_i) -> raw maps (B, H_i, W_i, 4 * reg_max + classes), the last axis
    left top right bottom, class...  A side is its distance from the point in strides; with
    `reg_max` over 1 it is the mean of a distribution over 0 to reg_max - 1
    (arXiv:2006.04388, section 3.2).  There is no objectness: a class's score is the sigmoid.

    A tower is two 3x3 convolutions and a 1x1; `depthwise` makes each 3x3 a depthwise one and a 1x1
    (None: where no level is wider than YOLOv5-n's).  `width`: the channels of the class tower
    (None: the finest level's, but no fewer than the classes up to 100).  The box tower is as wide
    where depthwise, else a quarter.

    `end_to_end` adds a second branch of the same form, `one`, in which one point learns each box,
    so that its boxes need no suppression.  Training runs both, and the second one's gradient ends
    at the maps (arXiv:2405.14458, section 3.1); `raw maps` are then those of the first branch
    followed by those of the second.  Inference uses one of them, see `deployed`.

    Of the loss: `assigner` chooses the points that learn a box (models.losses.assign);
    `small_objects`: a box's side under 8 pixels counts as 16 where its points are looked for, so
    that the smallest boxes have some; `class_loss`: BCE, quality focal or varifocal loss.
    """

    losses = ("box", "side", "cls")
    channel_args = ("width",)
    ignores = ("anchors",)

    def __init__(  # noqa: PLR0913  options of a row
        self,
        c_in: Sequence[int],
        width: Positive | None = None,
        depthwise: bool | None = None,
        reg_max: Annotated[int, Range(1, 64)] = 1,
        small_objects: bool = False,
        end_to_end: bool = False,
        assigner: Literal["aligned", "simota", "dynamic"] = "aligned",
        class_loss: Literal["bce", "qfl", "vfl"] = "bce",
        *,
        classes: int,
    ) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"FreeDetect needs at least one class, got {classes}")
        if small_objects and assigner == "simota":
            raise ValueError(
                "small_objects changes nothing with assigner simota, which looks around the centre"
                " of a box whatever its size"
            )
        self.classes, self.reg_max = classes, reg_max
        self.small_objects, self.assigner, self.class_loss = small_objects, assigner, class_loss
        light = max(c_in) <= LIGHT if depthwise is None else depthwise
        width = width or max(c_in[0], min(classes, MAX_CLASS_WIDTH))
        box_width = max(width if light else width // 4, 16, 4 * reg_max)
        self.box_stem = nn.ModuleList(_stem(c, box_width, light) for c in c_in)
        self.class_stem = nn.ModuleList(_stem(c, width, light) for c in c_in)
        self.box = nn.ModuleList(nn.Conv2d(box_width, 4 * reg_max, 1) for _ in c_in)
        self.classify = nn.ModuleList(nn.Conv2d(width, classes, 1) for _ in c_in)
        self.end_to_end = end_to_end
        self.one: FreeDetect | None = None
        if end_to_end:
            self.one = FreeDetect(c_in, width, light, reg_max, classes=classes)
            self.one.end_to_end = True

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """One feature map per level -> one raw map per level and branch."""
        towers = (self.box_stem, self.box), (self.class_stem, self.classify)
        raw = [
            torch.cat(
                [self.predict(end[level], stem[level](feature)) for stem, end in towers], 1
            ).permute(0, 2, 3, 1)
            for level, feature in enumerate(maps)
        ]
        if self.one is not None:
            raw += self.one([feature.detach() for feature in maps])
        return raw

    def deployed(self, *, nms: bool) -> Head:
        """As in Head."""
        one, self.one = self.one, None
        if one is None:
            if nms and self.end_to_end:
                raise ValueError("of this head only the end-to-end branch is left")
            return self
        if nms:
            self.end_to_end = False
            return self
        return one

    @torch.no_grad()
    def set_stride(self, stride: Sequence[int], anchors: Sequence[Sequence[float]] | int) -> None:
        """Fix the levels' strides in pixels; the first boxes are 2 strides wide, scores 0.01."""
        super().set_stride(stride, anchors)
        prior = -math.log((1 - PRIOR_CLASS) / PRIOR_CLASS)
        for convolutions, value in ((self.box, PRIOR_SIDE), (self.classify, prior)):
            for convolution in convolutions:
                assert isinstance(convolution, nn.Conv2d)
                assert convolution.bias is not None
                convolution.bias.fill_(value)
        if self.one is not None:
            self.one.set_stride(stride, anchors)

    def sides(self, y: Tensor) -> Tensor:
        """The box's part of raw maps, (..., 4 * reg_max) -> distances (..., 4) in strides."""
        if self.reg_max == 1:
            return y
        steps = torch.arange(self.reg_max, device=y.device, dtype=y.dtype)
        return F.softmax(y.unflatten(-1, (4, self.reg_max)), -1) @ steps

    def decode(self, raw: Sequence[Tensor], conf: float) -> tuple[Tensor, Tensor, Tensor]:
        """As in Head: the points whose best class is over `conf`."""
        if self.one is not None:
            return self.one.decode(raw[len(self.stride) :], conf)
        images, boxes, scores = [], [], []
        for y, stride in zip(raw, self.stride, strict=True):
            sides = 4 * self.reg_max
            low = y[..., sides:].amax(-1).float().sigmoid() <= conf  # not so for NaN
            image, row, column = low.logical_not().nonzero(as_tuple=True)
            y = y[image, row, column].float()
            images.append(image)
            boxes.append(self._boxes(y, torch.stack((column, row), 1), stride))
            scores.append(y[:, sides:].sigmoid())
        return torch.cat(images), torch.cat(boxes), torch.cat(scores)

    def dense(self, raw: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As in Head."""
        if self.one is not None:
            return self.one.dense(raw[len(self.stride) :])
        boxes, scores = [], []
        for y, stride in zip(raw, self.stride, strict=True):
            y = y.float()
            column, row = (torch.arange(side, device=y.device) for side in (y.shape[2], y.shape[1]))
            cell = torch.stack(torch.meshgrid(column, row, indexing="xy"), -1)
            boxes.append(self._boxes(y, cell, stride).flatten(1, 2))
            scores.append(y[..., 4 * self.reg_max :].sigmoid().flatten(1, 2))
        return torch.cat(boxes, 1), torch.cat(scores, 1)

    def _boxes(self, y: Tensor, cell: Tensor, stride: int) -> Tensor:
        """Outputs (..., 4 * reg_max + classes) of cells (..., 2) -> (..., 4), xyxy pixels."""
        offset, size = centre_size(self.sides(y[..., : 4 * self.reg_max]))
        centre = cell + 0.5 + offset
        return torch.cat((centre - size / 2, centre + size / 2), -1) * stride


def centre_size(sides: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (..., 4) left top right bottom -> the centre from the point, size; (..., 2) each.

    A size is at least 0; a distance may be under it: the point is then outside its box.
    """
    low, high = sides.split(2, -1)
    return (high - low) / 2, (low + high).relu()


def _stem(c_in: int, width: int, depthwise: bool) -> nn.Sequential:
    """Two 3x3 convolutions, or two pairs of a depthwise 3x3 and a 1x1."""
    stages: list[nn.Module] = []
    for channels in (c_in, width):
        if depthwise:
            stages += [Conv(channels, channels, 3, groups=channels), Conv(channels, width)]
        else:
            stages.append(Conv(channels, width, 3))
    return nn.Sequential(*stages)
