"""YOLOv5's loss: assignment by shape with neighbour cells, CIoU, objectness by CIoU, class BCE."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.detector import Detector
from models.heads.anchor import Detect
from utils.boxes import Targets, complete_iou, xyxy_to_cxcywh
from utils.hyp import Hyperparameters

BALANCE = {3: (4.0, 1.0, 0.4)}  # objectness weight by level, finest first
BALANCE_DEEP = (4.0, 1.0, 0.25, 0.06, 0.02)  # for four and five levels
NEIGHBOUR = 0.5  # a neighbouring cell counts when the centre lies in its half of the cell
# own cell, left, above, right, below: (column, row) steps
STEPS = ((0.0, 0.0), (-1.0, 0.0), (0.0, -1.0), (1.0, 0.0), (0.0, 1.0))


@dataclass(frozen=True)
class Grid:
    """Constants of the raw maps of L levels, A anchors each; levels have H x W cells."""

    cells: Tensor  # (L, 1, 2) float, W and H
    stride: Tensor  # (L, 1, 1) float, pixels
    steps: Tensor  # (5, 1, 2) float: STEPS
    anchor: Tensor  # (A, 1) int64: 0 to A - 1
    per_image: Tensor  # (L, 1, 1, 1) int64: A * H * W
    per_cell: Tensor  # (L, 1, 1, 1, 2) int64: A, A * W
    first: Tensor  # (L, 1, A, 1) int64: number of the level's first cell for each anchor
    weights: Tensor  # (L,) float: the level's balance / its B * H * W * A cells

    @staticmethod
    @functools.lru_cache(maxsize=32)
    def of(
        shapes: tuple[tuple[int, ...], ...],
        stride: tuple[int, ...],
        balance: tuple[float, ...],
        device: torch.device,
    ) -> Grid:
        """Kept on the device by shape: a copy in every step would wait for the device.

        `shapes`: (B, A, H, W) of each level.
        """
        sizes = [math.prod(shape) for shape in shapes]
        anchors = shapes[0][1]
        first = [[sum(sizes[:level]) + a for a in range(anchors)] for level in range(len(sizes))]
        with torch.inference_mode(False), torch.device(device):
            return Grid(
                cells=torch.tensor([[float(w), float(h)] for *_, h, w in shapes])[:, None],
                stride=torch.tensor(stride, dtype=torch.float32).view(-1, 1, 1),
                steps=torch.tensor(STEPS)[:, None],
                anchor=torch.arange(anchors)[:, None],
                per_image=torch.tensor([[[[math.prod(shape[1:])]]] for shape in shapes]),
                per_cell=torch.tensor([[[[[anchors, anchors * w]]]] for *_, w in shapes]),
                first=torch.tensor(first)[:, None, :, None],
                weights=torch.tensor(
                    [weight / size for weight, size in zip(balance, sizes, strict=True)]
                ),
            )


@dataclass(frozen=True)
class Assignment:
    """All candidates, L levels x 5 cells x A anchors x M targets, and which of them count.

    Shapes do not depend on the values, so that a CUDA step never waits for the device.
    """

    valid: Tensor  # (L, 5, A, M) bool
    cells: Tensor  # (L, 5, 1, M, 2) int64, column and row
    centre: Tensor  # (L, 5, 1, M, 2) of the box, in cells from the cell's corner
    size: Tensor  # (L, 1, 1, M, 2) of the box, in cells


def assign(targets: Targets, anchors: Tensor, grid: Grid, *, ratio: float) -> Assignment:
    """Assign targets to the anchors whose sides differ by less than `ratio`, in up to three cells.

    `anchors` (L, A, 2) in cells.  The cells: its own, and the two neighbours nearest to its centre
    where these exist.  A target without area, which pads a batch, is assigned to none.
    """
    boxes = xyxy_to_cxcywh(targets.boxes) / grid.stride  # (L, M, 4)
    centre, size = boxes[..., :2], boxes[..., 2:]
    sides = size[:, None] / anchors[:, :, None]  # (L, A, M, 2)
    fits = torch.maximum(sides, 1 / sides).amax(-1) < ratio  # (L, A, M)

    part = centre % 1
    near = torch.cat((part, 1 - part), -1) < NEIGHBOUR
    inside = torch.cat((centre, grid.cells - centre), -1) > 1
    # (L, M, 5): own cell, left, above, right, below; torch.compile's C++ of F.pad is wrong here
    chosen = torch.cat((torch.ones_like(near[..., :1]), near & inside), -1)
    cells = (centre.floor()[:, None] + grid.steps).clamp(min=0)  # (L, 5, M, 2)
    cells = torch.minimum(cells, (grid.cells - 1)[:, None])
    return Assignment(
        valid=chosen.transpose(1, 2)[:, :, None] & fits[:, None],
        cells=cells.long()[:, :, None],
        centre=(centre[:, None] - cells)[:, :, None],
        size=size[:, None, None],
    )


class AnchorLoss:
    """Raw maps and targets -> loss.

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
        assert isinstance(model.head, Detect)
        self.head = model.head
        self.classes = model.head.classes
        self.ratio = hyp.anchor_t
        self.gamma = hyp.fl_gamma
        gains = hyp.box, hyp.obj * (image_size / 640) ** 2, hyp.cls / 80  # cls sums over classes
        self.cls_weight, self.obj_weight = hyp.cls_pw, hyp.obj_pw
        order = sorted(range(levels), key=lambda level: model.stride[level])
        weights = BALANCE.get(levels, BALANCE_DEEP)
        self.balance = tuple(weights[order.index(level)] for level in range(levels))
        device = self.head.anchors.device
        self.gains = torch.tensor([gain * 3 / levels for gain in gains], device=device)
        truth = torch.full((self.classes, self.classes), label_smoothing / 2)
        self.class_truth = truth.fill_diagonal_(1 - label_smoothing / 2).to(device)

    def __call__(
        self,
        raw: Sequence[Tensor],
        targets: Targets,
        *,
        grid: Grid | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
        world_size: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """The loss to differentiate, times the batch, and its (box, obj, cls) as detached means.

        All levels at once, in few operators: a small network on a fast GPU waits for launches.
        Under DDP `reduce` sums a tensor over the ranks: dividing by the assignments of all ranks
        makes the averaged gradient that of one process with the whole batch, however the boxes are
        spread (every rank must hold equally many images).
        """
        if grid is None:
            shapes = tuple(tuple(y.shape[:4]) for y in raw)
            grid = Grid.of(shapes, self.head.stride, self.balance, raw[0].device)
        item = assign(targets, self.head.anchors, grid, ratio=self.ratio)
        columns, rows = item.cells.unbind(-1)  # (L, 5, 1, M)
        image = targets.image_index
        chosen = torch.stack(
            [y[image, grid.anchor, rows[i], columns[i]] for i, y in enumerate(raw)]
        ).float()  # (L, 5, A, M, 5 + classes)
        box_logits, _, class_logits = chosen.split((4, 1, self.classes), -1)
        position, shape = (box_logits.sigmoid() * 2).split(2, -1)
        size = shape.square() * self.head.anchors[:, None, :, None]
        overlap = complete_iou(position - 0.5, size, item.centre, item.size)

        counted = item.valid.float()
        counts = counted.sum((1, 2, 3), keepdim=True)
        if reduce is not None:
            counts = reduce(counts)
        counts = counts.clamp(min=1)
        if world_size > 1:
            counts = counts / world_size
        weight = counted / counts  # the assignments of a level weigh 1 together
        cell = image * grid.per_image + (item.cells * grid.per_cell).sum(-1) + grid.first
        parts = [
            ((1 - overlap) * weight).sum(),
            self._objectness(raw, overlap.detach() * counted, cell, grid),
        ]
        if self.classes > 1:
            truth = self.class_truth[targets.labels].expand_as(class_logits)
            parts.append(self._bce(class_logits, truth, self.cls_weight, weight[..., None]))
        else:
            parts.append(torch.zeros_like(parts[0]))
        losses = torch.stack(parts) * self.gains
        return losses.sum() * (raw[0].shape[0] * world_size), losses.detach()

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Nothing depends on the epoch."""

    def grid(self, images: torch.Size) -> Grid:
        """The constants of the raw maps of images (B, 3, H, W), on the device of the head."""
        anchors, stride = self.head.anchors, self.head.stride
        (batch, _, height, width), number = images, anchors.shape[1]
        shapes = tuple((batch, number, height // s, width // s) for s in stride)
        return Grid.of(shapes, stride, self.balance, anchors.device)

    def _objectness(
        self, raw: Sequence[Tensor], overlap: Tensor, cell: Tensor, grid: Grid
    ) -> Tensor:
        """Mean BCE over each level's cells; where several targets meet, the best overlap counts."""
        # anchors last: so a map in channels-last memory is read in place
        maps = [y[..., 4].permute(0, 2, 3, 1).reshape(-1) for y in raw]
        logits = torch.cat(maps).float()
        truth = torch.zeros_like(logits)
        truth = truth.scatter_reduce(0, cell.reshape(-1), overlap.reshape(-1), "amax")
        weight = torch.cat([w.expand_as(y) for w, y in zip(grid.weights, maps, strict=True)])
        return self._bce(logits, truth, self.obj_weight, weight)

    def _bce(self, logits: Tensor, truth: Tensor, positive: float, weight: Tensor) -> Tensor:
        """The weighted sum; `positive` weighs truth 1."""
        factor = None if positive == 1 else logits.new_tensor(positive)
        if self.gamma <= 0:
            return F.binary_cross_entropy_with_logits(
                logits, truth, weight, pos_weight=factor, reduction="sum"
            )
        loss = F.binary_cross_entropy_with_logits(
            logits, truth, weight, pos_weight=factor, reduction="none"
        )
        # quality focal form: |truth - p|^gamma, arXiv:2006.04388, equation 5
        return (loss * (truth - logits.sigmoid()).abs().pow(self.gamma)).sum()
