"""Which points of the anchor-free head learn which box: assigners by name, one rule for conflicts.

Everything is float32 of fixed shape, so that a CUDA step never waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.boxes import Targets

ALPHA, BETA = 0.5, 6.0  # powers of the score and of the IoU
ALIGNED, SINGLE = 10, 7  # points that a box takes at most; before one of them is chosen
SIMOTA, DYNAMIC = 10, 13  # the best IoUs, whose sum is the number of points
RADIUS = 1.5  # strides from the centre within which SimOTA looks
OVERLAP = 3.0  # weight of -log IoU in a cost
PRIOR = 3.0  # strides from the centre at which RTMDet's prior costs 1
SMALL, ENLARGED = 8.0, 16.0  # pixels: a side under the first counts as the second
EPS = 1e-7  # of an IoU in a logarithm
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
    """The points that each of M targets takes: K candidates, of which those with a score count."""

    point: Tensor  # (M, K) int64, of the N of an image
    cell: Tensor  # (M, K) int64, of the B * N of the batch
    score: Tensor  # (M, K) float in [0, 1]: the class target; 0: not taken


class Pairs:
    """M targets and the N points of their images: what assigners choose by.

    `logits` (B, N, classes) and `boxes` (B, N, 4), xyxy pixels, are predictions; `small_objects`
    enlarges sides in `outside`.  `overlap` is the (M, N) IoU of prediction and target, `corners`
    the low and the high corner of the targets, (M, 1, 2) each.
    """

    def __init__(
        self, targets: Targets, points: Points, logits: Tensor, boxes: Tensor, small_objects: bool
    ) -> None:
        self.targets, self.points, self.logits = targets, points, logits
        self.small_objects = small_objects
        low, high = self.corners = targets.boxes[:, None].split(2, -1)
        found_low, found_high = boxes[targets.image_index].split(2, -1)  # (M, N, 2)
        common = (torch.minimum(high, found_high) - torch.maximum(low, found_low)).clamp_(min=0)
        area, shared = (high - low).prod(-1), common.prod(-1)
        union = (found_high - found_low).prod(-1) + area - shared
        self.overlap = shared / union.clamp_(min=TINY)

    @property
    def logit(self) -> Tensor:
        """(M, N) that of the target's class."""
        return self.logits.transpose(1, 2)[self.targets.image_index, self.targets.labels]

    @property
    def outside(self) -> Tensor:
        """(M, N) whether the point is outside the target; of one without area all are."""
        low, high = self.corners
        if self.small_objects:
            size = high - low
            grow = torch.where((size < SMALL) & (size.amin(-1, True) > 0), (ENLARGED - size) / 2, 0)
            low, high = low - grow, high + grow
        return torch.minimum(self.points.pixels - low, high - self.points.pixels).amin(-1) <= 0

    @property
    def offset(self) -> Tensor:
        """(M, N, 2) from the target's centre to the point, in strides."""
        low, high = self.corners
        return (self.points.pixels - (low + high) / 2) / self.points.stride

    def number(self, candidates: Tensor, most: int) -> Tensor:
        """(M, 1) the sum of the `most` best IoUs of candidates, rounded down, at least 1."""
        best = (self.overlap * candidates).topk(min(most, candidates.shape[1]), 1).values
        return best.sum(1, keepdim=True).floor().clamp(min=1)


@dataclass(frozen=True)
class Ranking:
    """The order in which a target takes points."""

    quality: Tensor  # (M, N), higher is better; of a candidate at least 0
    most: int  # points that a target takes
    number: Tensor | None = None  # (M, 1) float: how many this one takes
    # a point's class target is quality / max quality * max IoU of the target's points; else its IoU
    scaled: bool = False


def aligned(pairs: Pairs) -> Ranking:
    """Task alignment: score^ALPHA * IoU^BETA.  TOOD, arXiv:2108.07755, section 3.2."""
    quality = pairs.logit.sigmoid().pow(ALPHA) * pairs.overlap.pow(BETA)
    return Ranking(quality.masked_fill_(pairs.outside, -1), ALIGNED, scaled=True)


def simota(pairs: Pairs) -> Ranking:
    """BCE of all classes + 3 (-log IoU), near the centre.  YOLOX, arXiv:2107.08430, section 2.1."""
    low, high = pairs.corners
    candidates = pairs.offset.abs().amax(-1) < RADIUS
    candidates &= (high - low).amin(-1) > 0
    # BCE of a class that is there, -log p, is that of one that is not, -log(1 - p), less its logit
    others = F.softplus(pairs.logits).sum(-1)[pairs.targets.image_index]
    cost = others - pairs.logit - OVERLAP * (pairs.overlap + EPS).log()
    return _by_cost(pairs, cost, candidates, SIMOTA)


def dynamic(pairs: Pairs) -> Ranking:
    """Soft labels: sum of |IoU - p|^2 BCE(p, IoU) + 3 (-log IoU) + 10^(strides from centre - 3).

    RTMDet, arXiv:2212.07784, section 3.3.  Its own code also takes points inside other boxes.
    """
    overlap, logit, image = pairs.overlap, pairs.logit, pairs.targets.image_index
    others = (F.softplus(pairs.logits) * pairs.logits.sigmoid().square()).sum(-1)[image]
    entropy, score = F.softplus(logit), logit.sigmoid()
    classes = others - entropy * score.square()
    classes += (entropy - overlap * logit) * (overlap - score).square()
    prior = 10 ** (pairs.offset.norm(dim=-1) - PRIOR)
    cost = classes - OVERLAP * (overlap + EPS).log() + prior
    return _by_cost(pairs, cost, ~pairs.outside, DYNAMIC)


def _by_cost(pairs: Pairs, cost: Tensor, candidates: Tensor, most: int) -> Ranking:
    """The cheapest candidates first, as many as their best IoUs add up to."""
    quality = (1 / (1 + cost.clamp(min=0))).masked_fill_(~candidates, -1)
    return Ranking(quality, most, pairs.number(candidates, most))


ASSIGNERS: Mapping[str, Callable[[Pairs], Ranking]] = {
    "aligned": aligned, "simota": simota, "dynamic": dynamic,
}  # fmt: skip


@torch.no_grad()
def assign(pairs: Pairs, assigner: str, *, single: int = 0) -> Assignment:
    """The points that each target takes: its best candidates by the assigner's order.

    A point that several want goes to the largest IoU (`aligned`) or the best quality, then to the
    first target.  Of the last `single` targets each looks at `SINGLE` points at most and in the end
    keeps the best (YOLOv10's one-to-one branch, arXiv:2405.14458, section 3.1).  A target without
    area, which pads a batch, takes none.
    """
    ranking, image = ASSIGNERS[assigner](pairs), pairs.targets.image_index
    number, (batch, count) = len(image), pairs.logits.shape[:2]
    best, point = ranking.quality.topk(min(ranking.most, count), 1)  # (M, K)
    if ranking.number is not None:
        best[torch.arange(best.shape[1], device=best.device) >= ranking.number] = -1
    if single:
        best[number - single :, SINGLE:] = -1
    overlap = pairs.overlap.gather(1, point)

    # floats over 0 are ordered like the integers of their bits; the first target breaks a tie
    order = torch.arange(number, 0, -1, device=best.device)[:, None]
    claim = (overlap if ranking.scaled else best).view(torch.int32).long() * 2**32 + order
    claim.masked_fill_(best < 0, -2)
    cell = image[:, None] * count + point
    held = claim.new_full((batch * count,), -1)
    held = held.scatter_reduce(0, cell.flatten(), claim.flatten(), "amax")
    taken = held[cell] == claim
    if single:
        own = taken[number - single :]  # a view
        first = (best[number - single :] * own).argmax(1, keepdim=True)
        own &= torch.zeros_like(own).scatter_(1, first, True)

    overlap = overlap * taken
    if not ranking.scaled:
        return Assignment(point, cell, overlap)
    best = best * taken
    scale = overlap.amax(1, keepdim=True) / best.amax(1, keepdim=True).clamp_(min=TINY)
    return Assignment(point, cell, best * scale)
