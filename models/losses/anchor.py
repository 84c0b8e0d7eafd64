"""YOLOv5's loss: assignment by shape with neighbour cells, CIoU, objectness by CIoU, class BCE."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.detector import Detector
from utils.boxes import Targets, complete_iou, xyxy_to_cxcywh
from utils.hyp import Hyperparameters

BALANCE = {3: (4.0, 1.0, 0.4)}  # objectness weight by level, finest first
BALANCE_DEEP = (4.0, 1.0, 0.25, 0.06, 0.02)  # for four and five levels
NEIGHBOUR = 0.5  # a neighbouring cell counts when the centre lies in its half of the cell
# own cell, left, above, right, below: (column, row) steps
STEPS = ((0.0, 0.0), (-1.0, 0.0), (0.0, -1.0), (1.0, 0.0), (0.0, 1.0))


@dataclass(frozen=True)
class Losses:
    """0-dim tensors: `total` to differentiate (times the batch), the parts as detached means."""

    total: Tensor
    box: Tensor
    obj: Tensor
    cls: Tensor


@dataclass(frozen=True)
class Assignment:
    """The K candidates of a level, every target x anchor x five cells, and which of them count.

    Shapes do not depend on the values, so that a CUDA step never waits for the device.
    """

    valid: Tensor  # (K,) bool
    image: Tensor  # (K,) int64
    anchor: Tensor  # (K,) int64
    row: Tensor  # (K,) int64
    column: Tensor  # (K,) int64
    boxes: Tensor  # (K, 4) centre-size in cells, the centre relative to the cell
    anchors: Tensor  # (K, 2) in cells
    labels: Tensor  # (K,) int64


def assign(
    targets: Targets, anchors: Tensor, *, size: tuple[int, int], stride: int, ratio: float
) -> Assignment:
    """Assign targets to the anchors whose sides differ by less than `ratio`, in up to three cells.

    `anchors` (A, 2) in cells, `size` (height, width) of the map.  The cells: its own, and the two
    neighbours nearest to its centre where these exist.
    """
    height, width = size
    boxes = xyxy_to_cxcywh(targets.boxes) / stride  # (M, 4)
    count, per_level = len(targets), anchors.shape[0]
    sides = boxes[None, :, 2:] / anchors[:, None]  # (A, M, 2)
    fits = torch.maximum(sides, 1 / sides).amax(-1) < ratio  # (A, M)

    centre = boxes[:, :2]
    mirrored = torch.stack((width - centre[:, 0], height - centre[:, 1]), -1)
    left, above = ((centre % 1 < NEIGHBOUR) & (centre > 1)).unbind(-1)
    right, below = ((centre % 1 > 1 - NEIGHBOUR) & (mirrored > 1)).unbind(-1)
    near = torch.stack((torch.ones_like(left), left, above, right, below))  # (5, M)

    steps = _steps(centre.device)  # (5, 2)
    cells = centre.floor()[None] + steps[:, None]  # (5, M, 2)
    valid = near[:, None] & fits[None]  # (5, A, M)
    shape = (len(STEPS), per_level, count)
    column = cells[..., 0].clamp(0, width - 1)
    row = cells[..., 1].clamp(0, height - 1)
    offset = centre[None] - torch.stack((column, row), -1)  # (5, M, 2)
    relative = torch.cat((offset, boxes[None, :, 2:].expand(len(STEPS), -1, -1)), -1)
    return Assignment(
        valid=valid.reshape(-1),
        image=targets.image_index.expand(shape).reshape(-1),
        anchor=torch.arange(per_level, device=boxes.device)[:, None].expand(shape).reshape(-1),
        row=row.long()[:, None].expand(shape).reshape(-1),
        column=column.long()[:, None].expand(shape).reshape(-1),
        boxes=relative[:, None].expand(*shape, 4).reshape(-1, 4),
        anchors=anchors[None, :, None].expand(*shape, 2).reshape(-1, 2),
        labels=targets.labels.expand(shape).reshape(-1),
    )


@functools.cache
def _steps(device: torch.device) -> Tensor:
    """STEPS on the device, copied once: a copy in every step would wait for the device."""
    with torch.inference_mode(False):
        return torch.tensor(STEPS, device=device)


class AnchorLoss:
    """Raw maps and targets -> Losses.

    box: 1 - CIoU, mean over assignments; obj: BCE of every cell against the detached CIoU (the
    largest where several meet), mean per level; cls: BCE over assignments, with more than one
    class.  Each with its gain of `hyp`, scaled to levels, classes and image size as in YOLOv5.
    """

    def __init__(
        self,
        model: Detector,
        hyp: Hyperparameters,
        *,
        image_size: int,
        label_smoothing: float = 0.0,
    ) -> None:
        levels = len(model.stride)
        if levels > len(BALANCE_DEEP):
            raise ValueError(
                f"the loss knows weights for up to {len(BALANCE_DEEP)} levels, got {levels}"
            )
        self.head = model.head
        self.classes = model.head.classes
        self.ratio = hyp.anchor_t
        self.gamma = hyp.fl_gamma
        per_level = 3 / levels
        self.box_gain = hyp.box * per_level
        self.cls_gain = hyp.cls * self.classes / 80 * per_level
        self.obj_gain = hyp.obj * (image_size / 640) ** 2 * per_level
        self.cls_weight, self.obj_weight = hyp.cls_pw, hyp.obj_pw
        self.positive, self.negative = 1 - label_smoothing / 2, label_smoothing / 2
        order = sorted(range(levels), key=lambda level: model.stride[level])
        weights = BALANCE.get(levels, BALANCE_DEEP)
        self.balance = [weights[order.index(level)] for level in range(levels)]

    def __call__(
        self,
        raw: Sequence[Tensor],
        targets: Targets,
        *,
        reduce: Callable[[Tensor], Tensor] | None = None,
        world_size: int = 1,
    ) -> Losses:
        """The loss of a batch.

        Under DDP `reduce` sums a tensor over the ranks: dividing by the assignments of all ranks
        makes the averaged gradient that of one process with the whole batch, however the boxes are
        spread (every rank must hold equally many images).
        """
        assigned = [
            assign(
                targets,
                self.head.anchors[level],
                size=(y.shape[2], y.shape[3]),
                stride=self.head.stride[level],
                ratio=self.ratio,
            )
            for level, y in enumerate(raw)
        ]
        counts = torch.stack([item.valid.sum() for item in assigned]).float()
        if reduce is not None:
            counts = reduce(counts)
        shares = world_size / counts.clamp(min=1)
        box = raw[0].new_zeros((), dtype=torch.float32)
        obj, cls = box.clone(), box.clone()
        for level, (y, item) in enumerate(zip(raw, assigned, strict=True)):
            chosen = y[item.image, item.anchor, item.row, item.column].float()  # (K, 5 + classes)
            counted = item.valid.float()
            p = chosen[:, :4].sigmoid()
            size = (p[:, 2:] * 2).square() * item.anchors
            overlap = complete_iou(torch.cat((p[:, :2] * 2 - 0.5, size), -1), item.boxes)
            box = box + ((1 - overlap) * counted).sum() * shares[level]
            obj = obj + self._objectness(y, item, overlap.detach()) * self.balance[level]
            if self.classes > 1:
                loss = self._classes(chosen[:, 5:], item.labels)
                cls = cls + (loss * counted).sum() * shares[level]
        box, obj, cls = box * self.box_gain, obj * self.obj_gain, cls * self.cls_gain
        batch = raw[0].shape[0] * world_size
        return Losses((box + obj + cls) * batch, box.detach(), obj.detach(), cls.detach())

    def _objectness(self, y: Tensor, item: Assignment, overlap: Tensor) -> Tensor:
        """Mean BCE over the level's cells; where several targets meet, the best overlap counts."""
        batch, anchors, height, width, _ = y.shape
        value = torch.where(item.valid, overlap.clamp(min=0), 0.0)
        cell = ((item.image * anchors + item.anchor) * height + item.row) * width + item.column
        truth = value.new_zeros(batch * anchors * height * width)
        truth = truth.scatter_reduce(0, cell, value, "amax").view(batch, anchors, height, width)
        return self._bce(y[..., 4].float(), truth, self.obj_weight).mean()

    def _classes(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(K, classes) logits -> (K,) mean BCE over the classes."""
        truth = torch.full_like(logits, self.negative)
        truth.scatter_(1, labels[:, None], self.positive)
        return self._bce(logits, truth, self.cls_weight).mean(-1)

    def _bce(self, logits: Tensor, truth: Tensor, positive_weight: float) -> Tensor:
        weight = None if positive_weight == 1 else logits.new_tensor(positive_weight)
        loss = F.binary_cross_entropy_with_logits(
            logits, truth, pos_weight=weight, reduction="none"
        )
        if self.gamma > 0:  # quality focal form: |truth - p|^gamma, arXiv:2006.04388, equation 5
            loss = loss * (truth - logits.sigmoid()).abs().pow(self.gamma)
        return loss
