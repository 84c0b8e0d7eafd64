"""Assignment and loss by hand, and against a plain loop."""

from __future__ import annotations

import math

import pytest
import torch

from models.builder import build_detector
from models.losses.anchor import AnchorLoss, assign
from models.yaml.parser import parse_spec
from utils.hyp import Hyperparameters
from utils.structures import Targets

ROWS = {
    "anchors": [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]],
    "backbone": [
        [-1, 3, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [8, 3, 2]],
    ],
    "head": [[[0, 1, 2], 1, "Detect", ["nc", "anchors"]]],
}


def targets(*rows: tuple[int, int, float, float, float, float]) -> Targets:
    table = torch.tensor(rows, dtype=torch.float32).view(-1, 6)
    return Targets(table[:, 0].long(), table[:, 1].long(), table[:, 2:])


def cells(found, anchor: int) -> set[tuple[int, int]]:
    chosen = found.valid & (found.anchor == anchor)
    return set(zip(found.column[chosen].tolist(), found.row[chosen].tolist(), strict=True))


@pytest.mark.parametrize(
    ("centre", "expected"),
    [
        ((2.3, 3.3), {(2, 3), (1, 3), (2, 2)}),  # left and above
        ((2.7, 3.3), {(2, 3), (3, 3), (2, 2)}),  # right and above
        ((2.7, 3.8), {(2, 3), (3, 3), (2, 4)}),
        ((0.3, 0.3), {(0, 0)}),  # no neighbour beyond the border, and the centre is not over 1
        ((7.8, 7.8), {(7, 7)}),
        ((0.7, 7.2), {(0, 7), (1, 7), (0, 6)}),
        ((2.5, 2.5), {(2, 2)}),  # exactly the middle: neither half
        ((3.0, 3.0), {(3, 3), (2, 3), (3, 2)}),  # on a border: the cell and two neighbours
    ],
)
def test_cells_of_a_target(centre: tuple[float, float], expected: set[tuple[int, int]]) -> None:
    x, y = centre[0] * 8, centre[1] * 8
    anchors = torch.tensor([[2.0, 2.0]])
    found = assign(
        targets((0, 0, x - 8, y - 8, x + 8, y + 8)), anchors, size=(8, 8), stride=8, ratio=4.0
    )
    assert cells(found, 0) == expected
    kept = found.boxes[found.valid]
    for (cx, cy, w, h), column, row in zip(
        kept.tolist(),
        found.column[found.valid].tolist(),
        found.row[found.valid].tolist(),
        strict=True,
    ):
        assert (cx + column, cy + row) == pytest.approx(centre, abs=1e-5)
        assert (w, h) == pytest.approx((2.0, 2.0), rel=1e-5)


def test_anchors_are_assigned_by_side_ratio_under_the_limit() -> None:
    anchors = torch.tensor([[1.0, 1.0], [2.0, 8.0], [4.0, 4.0], [8.0, 2.0]])
    # 32 x 8 px at stride 8 is 4 x 1 cells: ratios (4, 1), (2, 8), (1, 4), (2, 2)
    found = assign(targets((0, 0, 20, 20, 52, 28)), anchors, size=(8, 8), stride=8, ratio=4.0)
    assert sorted(set(found.anchor[found.valid].tolist())) == [3]
    found = assign(targets((0, 0, 20, 20, 52, 28)), anchors, size=(8, 8), stride=8, ratio=4.01)
    assert sorted(set(found.anchor[found.valid].tolist())) == [0, 2, 3]


def _loss_by_loop(raw, truth: Targets, loss: AnchorLoss) -> torch.Tensor:
    """The same formulas, written as loops over targets, anchors and cells."""
    box, obj, cls = 0.0, 0.0, 0.0
    for level, y in enumerate(raw):
        stride, anchors = loss.head.stride[level], loss.head.anchors[level]
        _, _, height, width, _ = y.shape
        best = torch.zeros(y.shape[:4])
        box_terms, cls_terms = [], []
        for i in range(len(truth)):
            b, c = int(truth.image_index[i]), int(truth.labels[i])
            x1, y1, x2, y2 = (truth.boxes[i] / stride).tolist()
            cx, cy, w, h = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
            column, row = int(cx), int(cy)
            places = [(column, row)]
            if cx % 1 < 0.5 and cx > 1:
                places.append((column - 1, row))
            if cy % 1 < 0.5 and cy > 1:
                places.append((column, row - 1))
            if (width - cx) % 1 < 0.5 and width - cx > 1:
                places.append((column + 1, row))
            if (height - cy) % 1 < 0.5 and height - cy > 1:
                places.append((column, row + 1))
            for a, (aw, ah) in enumerate(anchors.tolist()):
                if max(w / aw, aw / w, h / ah, ah / h) >= 4:
                    continue
                for px, py in places:
                    p = y[b, a, py, px]
                    s = p[:4].sigmoid()
                    mx, my = s[0] * 2 - 0.5, s[1] * 2 - 0.5
                    mw, mh = (s[2] * 2) ** 2 * aw, (s[3] * 2) ** 2 * ah
                    tx, ty = cx - px, cy - py
                    ix = (
                        torch.min(mx + mw / 2, torch.tensor(tx + w / 2))
                        - torch.max(mx - mw / 2, torch.tensor(tx - w / 2))
                    ).clamp(min=0)
                    iy = (
                        torch.min(my + mh / 2, torch.tensor(ty + h / 2))
                        - torch.max(my - mh / 2, torch.tensor(ty - h / 2))
                    ).clamp(min=0)
                    iou = ix * iy / (mw * mh + w * h - ix * iy)
                    hx = torch.max(mx + mw / 2, torch.tensor(tx + w / 2)) - torch.min(
                        mx - mw / 2, torch.tensor(tx - w / 2)
                    )
                    hy = torch.max(my + mh / 2, torch.tensor(ty + h / 2)) - torch.min(
                        my - mh / 2, torch.tensor(ty - h / 2)
                    )
                    v = 4 / math.pi**2 * (math.atan(w / h) - torch.atan(mw / mh)) ** 2
                    alpha = (v / (v - iou + 1)).detach()
                    ciou = iou - ((mx - tx) ** 2 + (my - ty) ** 2) / (hx**2 + hy**2) - v * alpha
                    box_terms.append(1 - ciou)
                    best[b, a, py, px] = torch.max(best[b, a, py, px], ciou.detach().clamp(min=0))
                    one_hot = torch.zeros(loss.classes)
                    one_hot[c] = 1
                    cls_terms.append(
                        torch.nn.functional.binary_cross_entropy_with_logits(p[5:], one_hot)
                    )
        if box_terms:
            box = box + torch.stack(box_terms).mean()
            cls = cls + torch.stack(cls_terms).mean()
        obj = (
            obj
            + torch.nn.functional.binary_cross_entropy_with_logits(y[..., 4], best)
            * (4, 1, 0.4)[level]
        )
    nc = loss.classes
    return (0.05 * box + (96 / 640) ** 2 * obj + 0.5 * nc / 80 * cls) * raw[0].shape[0]


def test_loss_equals_a_plain_loop_value_and_gradient() -> None:
    torch.manual_seed(1)
    model = build_detector(parse_spec(ROWS, "t"), classes=3)
    loss = AnchorLoss(model, Hyperparameters(), image_size=96)
    truth = targets(
        (0, 2, 10.2, 5.7, 40.1, 60.9), (0, 1, 12.0, 5.0, 41.0, 61.0), (1, 0, 2.5, 3.5, 90.0, 80.0),
        (1, 1, 50.3, 50.9, 58.0, 59.5), (1, 2, 30.0, 20.0, 62.0, 90.0),
    )  # fmt: skip
    raw = [torch.randn(2, 3, 96 // s, 96 // s, 8, requires_grad=True) for s in model.stride]
    ours = loss(raw, truth)
    reference = _loss_by_loop(raw, truth, loss)
    assert ours.total.item() == pytest.approx(reference.item(), rel=1e-5)
    grads = torch.autograd.grad(ours.total, raw)
    for a, b in zip(grads, torch.autograd.grad(reference, raw), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_no_targets_leaves_only_objectness() -> None:
    model = build_detector(parse_spec(ROWS, "t"), classes=2)
    loss = AnchorLoss(model, Hyperparameters(), image_size=640)
    raw = [torch.zeros(2, 3, 64 // s, 64 // s, 7, requires_grad=True) for s in model.stride]
    result = loss(raw, targets())
    assert result.box.item() == 0
    assert result.cls.item() == 0
    assert result.obj.item() == pytest.approx(math.log(2) * (4 + 1 + 0.4), rel=1e-6)
    result.total.backward()
    assert all(torch.isfinite(y.grad).all() for y in raw)


def test_one_class_has_no_class_loss_and_smoothing_moves_the_truth() -> None:
    truth = targets((0, 0, 8, 8, 24, 40))
    one = AnchorLoss(
        build_detector(parse_spec(ROWS, "t"), classes=1), Hyperparameters(), image_size=64
    )
    raw = [torch.randn(1, 3, 64 // s, 64 // s, 6) for s in one.head.stride]
    assert one(raw, truth).cls.item() == 0
    two = build_detector(parse_spec(ROWS, "t"), classes=2)
    smooth = AnchorLoss(two, Hyperparameters(), image_size=64, label_smoothing=0.2)
    logits = torch.tensor([[math.log(0.9 / 0.1), math.log(0.1 / 0.9)]])
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))  # the minimum at these truths
    assert smooth._classes(logits, torch.tensor([0])).item() == pytest.approx(entropy, rel=1e-5)


def test_split_over_ranks_the_gradient_is_that_of_one_process() -> None:
    """Two ranks with 3 and 0 boxes: average of their gradients = gradient of the whole batch."""
    torch.manual_seed(2)
    model = build_detector(parse_spec(ROWS, "t"), classes=3)
    loss = AnchorLoss(model, Hyperparameters(), image_size=64)
    truth = targets((0, 2, 10, 5, 40, 60), (0, 1, 12, 5, 41, 61), (1, 0, 2, 3, 60, 60))
    raw = [torch.randn(4, 3, 64 // s, 64 // s, 8) for s in model.stride]
    whole = [y.clone().requires_grad_() for y in raw]
    loss(whole, truth).total.backward()
    halves = [
        [y[:2].clone().requires_grad_() for y in raw],
        [y[2:].clone().requires_grad_() for y in raw],
    ]
    counts: list[torch.Tensor] = []
    loss(halves[0], truth, reduce=lambda c: counts.append(c) or c)
    for part, own in zip(halves, (truth, targets()), strict=True):
        for y in part:
            y.grad = None
        loss(part, own, reduce=lambda c: counts[0], world_size=2).total.backward()
    for level in range(3):
        averaged = torch.cat([part[level].grad / 2 for part in halves])
        assert torch.allclose(averaged, whole[level].grad, rtol=1e-5, atol=1e-8)
