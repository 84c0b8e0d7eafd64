"""The anchor-free head's loss: BCE of soft targets, CIoU, sides, at the points of `assign`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from models.detector import Detector
from models.heads.free import FreeDetect, centre_size
from models.losses.assign import Pairs, Points, assign
from utils.boxes import Targets, complete_iou
from utils.errors import UserError
from utils.hyp import Hyperparameters

BOX, SIDE, DISTRIBUTION, CLASS = 7.5, 6.0, 1.5, 0.5  # gains
QUALITY = 2.0  # exponent of the quality focal loss
NEGATIVE = 0.75  # weight of the varifocal loss where a class is not there
MANY, FALL = 0.1, 0.7  # share of the one-to-many branch at the end, and how much it falls till then


class FreeLoss:
    """Raw maps and targets -> loss.

    box: 1 - CIoU; side: absolute error of the distances in strides, mean over four, with `reg_max`
    over 1 the distribution focal loss (arXiv:2006.04388, equation 6); both weighted by the class
    targets.  cls: the head's `class_loss` of every score against its target.  Each is a sum over
    the batch divided by the sum of the class targets, at least 1, and has its gain.  Of a head with
    two branches it is the mean of both, weighed by `shares`.
    """

    def __init__(
        self,
        model: Detector,
        hyp: Hyperparameters,
        *,
        image_size: int,
        label_smoothing: float = 0.0,
    ) -> None:
        head = model.head
        assert isinstance(head, FreeDetect)
        if label_smoothing:
            raise UserError("--label-smoothing: the class targets of FreeDetect are soft already")
        self.head, self.classes = head, head.classes
        self.gamma = QUALITY if head.class_loss == "qfl" else hyp.fl_gamma
        side = SIDE if head.reg_max == 1 else DISTRIBUTION
        device = next(head.parameters()).device
        self.gains = torch.tensor([BOX, side, CLASS], device=device)
        self.branches = 1 if head.one is None else 2
        self.shares = torch.ones(self.branches, device=device)
        self.start_epoch(0, 1)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """One-to-many counts 0.8 at first and 0.1 in the last epoch, one-to-one the rest."""
        if self.branches == 2:
            many = max(1 - epoch / max(epochs - 1, 1), 0) * FALL + MANY
            self.shares.copy_(torch.tensor([many, 1 - many]))  # in place: a compiled step reads it

    def __call__(
        self,
        raw: Sequence[Tensor],
        targets: Targets,
        *,
        grid: Points | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
        world_size: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """The loss to differentiate, times the batch, and its (box, side, cls) as detached means.

        Under DDP `reduce` sums a tensor over the ranks, as in AnchorLoss.
        """
        if grid is None:
            levels = raw[: len(self.head.stride)]
            sizes = tuple((int(y.shape[1]), int(y.shape[2])) for y in levels)
            grid = Points.of(sizes, self.head.stride, raw[0].device)
        with torch.autocast(raw[0].device.type, enabled=False):
            losses = self._losses(raw, targets, grid, reduce, world_size) * self.gains
        return losses.sum() * (raw[0].shape[0] * world_size), losses.detach()

    def grid(self, images: torch.Size) -> Points:
        """The points of images (B, 3, H, W), on the device of the head."""
        height, width = images[2:]
        sizes = tuple((height // s, width // s) for s in self.head.stride)
        return Points.of(sizes, self.head.stride, self.gains.device)

    def _losses(
        self,
        raw: Sequence[Tensor],
        targets: Targets,
        points: Points,
        reduce: Callable[[Tensor], Tensor] | None,
        world_size: int,
    ) -> Tensor:
        """(3,) parts without gains.  Two branches are a batch of twice as many images."""
        head, batch, levels = self.head, raw[0].shape[0], len(self.head.stride)
        y = torch.cat([level.flatten(1, 2) for level in raw[:levels]], 1).float()
        number, single = len(targets), 0
        if self.branches == 2:
            one = torch.cat([level.flatten(1, 2) for level in raw[levels:]], 1).float()
            y, targets, single = torch.cat((y, one)), targets.twice(batch), number
        outputs, logits = y.split((4 * head.reg_max, self.classes), -1)
        with torch.no_grad():
            low, high = (head.sides(outputs) * points.stride).split(2, -1)
            boxes = torch.cat((points.pixels - low, points.pixels + high), -1)
            pairs = Pairs(targets, points, logits, boxes, head.small_objects)
            item = assign(pairs, head.assigner, single=single)
            flat = item.cell * self.classes + targets.labels[:, None]
            truth = logits.new_zeros(logits.numel())
            truth = truth.scatter_reduce(0, flat.flatten(), item.score.flatten(), "amax")
            scores = item.score.unflatten(0, (self.branches, number))
            total = scores.sum((1, 2))
            if reduce is not None:
                total = reduce(total)
            total = total.clamp(min=1)
            if world_size > 1:
                total = total / world_size
            share = self.shares / total
            weight = (scores * share[:, None, None]).view_as(item.score)

        # what follows is in strides, for the M x K candidates
        place = points.strides[item.point]
        low, high = (targets.boxes[:, None] / points.stride[item.point]).split(2, -1)
        chosen, true_sides = (
            outputs.flatten(0, 1)[item.cell],
            torch.cat((place - low, high - place), -1),
        )
        sides = head.sides(chosen)
        overlap = complete_iou(*centre_size(sides), *centre_size(true_sides))
        if head.reg_max == 1:
            error = (sides - true_sides).abs()
        else:
            error = distribution_loss(chosen, true_sides, head.reg_max)
        classes = [
            self._class_loss(*both)
            for both in zip(logits.split(batch), truth.view_as(logits).split(batch), strict=True)
        ]
        of_boxes = (torch.stack((1 - overlap, error.mean(-1))) * weight).sum((1, 2))
        return torch.cat((of_boxes, (torch.stack(classes) @ share)[None]))

    def _class_loss(self, logits: Tensor, truth: Tensor) -> Tensor:
        """The sum of the BCE, each score's weighed by the head's `class_loss` or hyp.fl_gamma."""
        varifocal = self.head.class_loss == "vfl"
        if self.gamma <= 0 and not varifocal:
            return F.binary_cross_entropy_with_logits(logits, truth, reduction="sum")
        loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        if varifocal:  # arXiv:2008.13367, equation 2
            weight = torch.where(truth > 0, truth, NEGATIVE * logits.sigmoid().square())
        else:  # quality focal loss, arXiv:2006.04388, equation 5
            weight = (truth - logits.sigmoid()).abs().pow(self.gamma)
        return (loss * weight).sum()


def distribution_loss(outputs: Tensor, sides: Tensor, reg_max: int) -> Tensor:
    """Cross entropy against the two whole distances next to the true one.

    `outputs` (..., 4 * reg_max), true `sides` (..., 4) in strides -> (..., 4).  arXiv:2006.04388,
    equation 6; a true distance beyond the last one counts as nearly that.
    """
    sides = sides.clamp(0, reg_max - 1 - 0.01)
    left = sides.long()
    log = F.log_softmax(outputs.unflatten(-1, (4, reg_max)), -1)
    near, far = (log.gather(-1, (left + step)[..., None]).squeeze(-1) for step in (0, 1))
    part = sides - left
    return -(1 - part) * near - part * far
