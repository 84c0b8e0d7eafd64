"""The anchor-free head's loss: task-aligned assignment, BCE of soft targets, CIoU, sides."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.detector import Detector
from models.heads.free import FreeDetect, centre_size
from utils.boxes import Targets, complete_iou
from utils.errors import UserError
from utils.hyp import Hyperparameters

CANDIDATES = 10  # points that a box takes at most
ALPHA, BETA = 0.5, 6.0  # powers of the score and of the IoU
BOX, SIDE, DISTRIBUTION, CLASS = 7.5, 6.0, 1.5, 0.5  # gains
SMALL, ENLARGED = 8.0, 16.0  # pixels: a side under the first counts as the second
TINY = torch.finfo(torch.float32).tiny  # so that an IoU of 0.001 to the sixth power counts


@dataclass(frozen=True)
class Points:
    """The points of all levels, level by level, row by row."""

    pixels: Tensor  # (N, 2) float
    strides: Tensor  # (N, 2) float: the same in strides of their level
    stride: Tensor  # (N, 1) float, pixels

    @staticmethod
    @functools.lru_cache(maxsize=32)
    def of(
        sizes: tuple[tuple[int, int], ...], stride: tuple[int, ...], device: torch.device
    ) -> Points:
        """Kept on the device by shape: a copy in every step would wait for the device.

        `sizes`: (H, W) of each level.
        """
        with torch.inference_mode(False), torch.device(device):
            grids = [
                torch.cartesian_prod(torch.arange(h) + 0.5, torch.arange(w) + 0.5).flip(1)
                for h, w in sizes
            ]
            step = [torch.full((len(x), 1), float(s)) for x, s in zip(grids, stride, strict=True)]
            cells, pixels = torch.cat(grids), torch.cat(step)
            return Points(cells * pixels, cells, pixels)


@dataclass(frozen=True)
class Assignment:
    """The points that each of M targets takes: K candidates, of which those with a score count.

    Shapes do not depend on the values, so that a CUDA step never waits for the device.
    """

    point: Tensor  # (M, K) int64, of the N of an image
    cell: Tensor  # (M, K) int64, of the B * N of the batch
    score: Tensor  # (M, K) float in [0, 1]: the class target; 0: not taken


@torch.no_grad()
def assign(
    targets: Targets, points: Points, scores: Tensor, boxes: Tensor, *, small_objects: bool
) -> Assignment:
    """Task-aligned assignment (TOOD, arXiv:2108.07755, section 3.2), in float32.

    `scores` (B, N, classes) in [0, 1] and `boxes` (B, N, 4), xyxy pixels, are predictions.  Each
    target takes the `CANDIDATES` best points inside it by t = score^ALPHA * IoU^BETA; one that
    several want goes to the largest IoU, then to the first target.  The class target of a point is
    t / max t * max IoU, the maxima over the target's points.  A target without area, which pads a
    batch, takes none.
    """
    image, truth = targets.image_index, targets.boxes[:, None]  # (M, 1, 4)
    low, high = truth.split(2, -1)
    found_low, found_high = boxes[image].split(2, -1)  # (M, N, 2)
    common = (torch.minimum(high, found_high) - torch.maximum(low, found_low)).clamp_(min=0)
    size = high - low
    area, shared = size.prod(-1), common.prod(-1)
    overlap = shared / ((found_high - found_low).prod(-1) + area - shared).clamp_(min=TINY)

    if small_objects:
        grow = torch.where((size < SMALL) & (area > 0)[..., None], (ENLARGED - size) / 2, 0)
        low, high = low - grow, high + grow
    outside = torch.minimum(points.pixels - low, high - points.pixels).amin(-1) <= 0  # (M, N)
    aligned = scores.transpose(1, 2)[image, targets.labels].pow(ALPHA) * overlap.pow(BETA)
    aligned.masked_fill_(outside, -1)
    best, point = aligned.topk(min(CANDIDATES, aligned.shape[1]), 1)  # (M, K)
    overlap = overlap.gather(1, point)

    # floats over 0 are ordered like the integers of their bits; the first target breaks a tie
    number = torch.arange(len(targets), 0, -1, device=point.device)[:, None]
    claim = overlap.view(torch.int32).long() * 2**32 + number
    claim.masked_fill_(best < 0, -2)
    cell = image[:, None] * boxes.shape[1] + point
    held = claim.new_full((boxes.shape[0] * boxes.shape[1],), -1)
    held = held.scatter_reduce(0, cell.flatten(), claim.flatten(), "amax")
    taken = held[cell] == claim

    best, overlap = best * taken, overlap * taken
    scale = overlap.amax(1, keepdim=True) / best.amax(1, keepdim=True).clamp_(min=TINY)
    return Assignment(point, cell, best * scale)


class FreeLoss:
    """Raw maps and targets -> loss.

    box: 1 - CIoU; side: absolute error of the distances in strides, mean over four, with `reg_max`
    over 1 the distribution focal loss (arXiv:2006.04388, equation 6); both weighted by the class
    targets.  cls: BCE of every score against its target.  Each is a sum over the batch divided by
    the sum of the class targets, at least 1, and has its gain.
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
        self.head, self.classes, self.gamma = head, head.classes, hyp.fl_gamma
        side = SIDE if head.reg_max == 1 else DISTRIBUTION
        self.gains = torch.tensor([BOX, side, CLASS], device=next(head.parameters()).device)

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
            sizes = tuple((int(y.shape[1]), int(y.shape[2])) for y in raw)
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
        head, batch = self.head, raw[0].shape[0]
        y = torch.cat([level.flatten(1, 2) for level in raw], 1).float()
        box_outputs, logits = y.flatten(0, 1).split((4 * head.reg_max, self.classes), -1)
        with torch.no_grad():
            sides = head.sides(box_outputs).view(batch, -1, 4) * points.stride
            low, high = sides.split(2, -1)
            item = assign(
                targets,
                points,
                logits.sigmoid().view(batch, -1, self.classes),
                torch.cat((points.pixels - low, points.pixels + high), -1),
                small_objects=head.small_objects,
            )
            flat = item.cell * self.classes + targets.labels[:, None]
            truth = logits.new_zeros(logits.numel())
            truth = truth.scatter_reduce(0, flat.flatten(), item.score.flatten(), "amax")
            total = item.score.sum()
            if reduce is not None:
                total = reduce(total)
            total = total.clamp(min=1)
            if world_size > 1:
                total = total / world_size
            weight = item.score / total

        # what follows is in strides, for the M x K candidates
        place = points.strides[item.point]
        low, high = (targets.boxes[:, None] / points.stride[item.point]).split(2, -1)
        outputs, true_sides = box_outputs[item.cell], torch.cat((place - low, high - place), -1)
        sides = head.sides(outputs)
        overlap = complete_iou(*centre_size(sides), *centre_size(true_sides))
        if head.reg_max == 1:
            error = (sides - true_sides).abs()
        else:
            error = distribution_loss(outputs, true_sides, head.reg_max)
        return torch.stack(
            [
                ((1 - overlap) * weight).sum(),
                (error.mean(-1) * weight).sum(),
                self._class_loss(logits, truth.view_as(logits)) / total,
            ]
        )

    def _class_loss(self, logits: Tensor, truth: Tensor) -> Tensor:
        """The sum of the BCE, with |truth - p|^gamma where gamma is over 0."""
        if self.gamma <= 0:
            return F.binary_cross_entropy_with_logits(logits, truth, reduction="sum")
        loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        # quality focal loss, arXiv:2006.04388, equation 5
        return (loss * (truth - logits.sigmoid()).abs().pow(self.gamma)).sum()


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
