"""Assignment and loss by hand, and against a plain loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import complete_box_iou_loss

from models.builder import build_detector
from models.losses.anchor import AnchorLoss, Assignment, Grid, assign
from models.yaml.parser import parse_spec
from utils.boxes import Targets
from utils.hyp import Hyperparameters

ROWS = {
    "anchors": [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]],
    "backbone": [[-1, 3, "Conv", [8, 3, 2]], *[[-1, 1, "Conv", [8, 3, 2]]] * 2],
    "head": [[[0, 1, 2], 1, "Detect", ["nc", "anchors"]]],
}
Row = tuple[int, int, float, float, float, float]  # image, label, box


def targets(device: torch.device, *rows: Row) -> Targets:
    table = torch.tensor(rows, dtype=torch.float32, device=device).view(-1, 6)
    return Targets(table[:, 0].long(), table[:, 1].long(), table[:, 2:])


def make_loss(
    device: torch.device, classes: int, image_size: int, smoothing: float = 0
) -> AnchorLoss:
    model = build_detector(parse_spec(ROWS, "t"), classes=classes).to(device)
    return AnchorLoss(model, Hyperparameters(), image_size=image_size, label_smoothing=smoothing)


def random_maps(loss: AnchorLoss, batch: int, size: int) -> list[Tensor]:
    torch.manual_seed(1)
    shape = [
        (batch, 3, size // stride, size // stride, 5 + loss.classes) for stride in loss.head.stride
    ]
    return [torch.randn(item).to(loss.head.anchors.device).requires_grad_() for item in shape]


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
def test_cells_of_a_target(
    device: torch.device, centre: tuple[float, float], expected: set[tuple[int, int]]
) -> None:
    x, y = centre[0] * 8, centre[1] * 8
    truth = targets(device, (0, 0, x - 8, y - 8, x + 8, y + 8), (0, 0, 0, 0, 0, 0))  # one pads
    found = assigned(truth, [[2.0, 2.0]], ratio=4.0)
    valid = found.valid[0, :, 0]  # (5, M)
    assert not valid[:, 1].any()
    cells = found.cells[0, :, 0][valid].cpu()
    assert {(column, row) for column, row in cells.tolist()} == expected
    for position in (found.centre[0, :, 0][valid].cpu() + cells).tolist():
        assert position == pytest.approx(centre, abs=1e-5)
    assert found.size[0, 0, 0, 0].tolist() == pytest.approx([2.0] * 2, rel=1e-5)


def assigned(truth: Targets, anchors: list[list[float]], ratio: float) -> Assignment:
    """On one level of 8 x 8 cells of 8 px."""
    device = truth.boxes.device
    grid = Grid.of(((1, len(anchors), 8, 8),), (8,), (1.0,), device)
    return assign(truth, torch.tensor([anchors], device=device), grid, ratio=ratio)


def test_anchors_are_assigned_by_side_ratio_under_the_limit(device: torch.device) -> None:
    anchors = [[1.0, 1.0], [2.0, 8.0], [4.0, 4.0], [8.0, 2.0]]
    # 32 x 8 px at stride 8 is 4 x 1 cells: ratios (4, 1), (2, 8), (1, 4), (2, 2)
    truth = targets(device, (0, 0, 20, 20, 52, 28))
    for ratio, expected in ((4.0, {3}), (4.01, {0, 2, 3})):
        valid = assigned(truth, anchors, ratio).valid[0]
        assert set(valid.nonzero()[:, 1].tolist()) == expected


def loss_by_loop(raw: list[Tensor], truth: Targets, loss: AnchorLoss) -> Tensor:
    """The same formulas, written as loops over targets, anchors and cells; for one image size."""
    box, obj, cls = 0.0, 0.0, 0.0
    for level, y in enumerate(raw):
        stride, anchors = loss.head.stride[level], loss.head.anchors[level]
        _, _, height, width, _ = y.shape
        best = torch.zeros(y.shape[:4], device=y.device)
        box_terms, cls_terms = [], []
        for i in range(len(truth)):
            b, c = int(truth.image_index[i]), int(truth.labels[i])
            x1, y1, x2, y2 = (truth.boxes[i] / stride).tolist()
            cx, cy, w, h = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
            column, row = int(cx), int(cy)
            cells = [(column, row)]
            cells += [(column - 1, row)] if cx % 1 < 0.5 and cx > 1 else []
            cells += [(column, row - 1)] if cy % 1 < 0.5 and cy > 1 else []
            cells += [(column + 1, row)] if (width - cx) % 1 < 0.5 and width - cx > 1 else []
            cells += [(column, row + 1)] if (height - cy) % 1 < 0.5 and height - cy > 1 else []
            for a, (aw, ah) in enumerate(anchors.tolist()):
                if max(w / aw, aw / w, h / ah, ah / h) >= 4:
                    continue
                for px, py in cells:
                    p = y[b, a, py, px]
                    s = p[:4].sigmoid()
                    mx, my = s[0] * 2 - 0.5 + px, s[1] * 2 - 0.5 + py
                    mw, mh = (s[2] * 2) ** 2 * aw, (s[3] * 2) ** 2 * ah
                    ours = torch.stack((mx - mw / 2, my - mh / 2, mx + mw / 2, my + mh / 2))
                    theirs = truth.boxes[i] / stride
                    box_terms.append(complete_box_iou_loss(ours[None], theirs[None])[0])
                    overlap = (1 - box_terms[-1]).detach().clamp(min=0)
                    best[b, a, py, px] = torch.max(best[b, a, py, px], overlap)
                    one_hot = F.one_hot(torch.tensor(c), loss.classes).float().to(y.device)
                    cls_terms.append(F.binary_cross_entropy_with_logits(p[5:], one_hot))
        if box_terms:
            box = box + torch.stack(box_terms).mean()
            cls = cls + torch.stack(cls_terms).mean()
        bce = F.binary_cross_entropy_with_logits(y[..., 4], best)
        obj = obj + bce * (4, 1, 0.4)[level]
    nc = loss.classes
    return (0.05 * box + (96 / 640) ** 2 * obj + 0.5 * nc / 80 * cls) * raw[0].shape[0]


def test_loss_equals_a_plain_loop_value_and_gradient(device: torch.device) -> None:
    loss = make_loss(device, 3, 96)
    truth = targets(
        device,
        (0, 2, 10.2, 5.7, 40.1, 60.9), (0, 1, 12.0, 5.0, 41.0, 61.0), (1, 0, 2.5, 3.5, 90.0, 80.0),
        (1, 1, 50.3, 50.9, 58.0, 59.5), (1, 2, 30.0, 20.0, 62.0, 90.0),
    )  # fmt: skip
    raw = random_maps(loss, 2, 96)
    ours, reference = loss(raw, truth)[0], loss_by_loop(raw, truth, loss)
    assert ours.item() == pytest.approx(reference.item(), rel=1e-5)
    for a, b in zip(
        torch.autograd.grad(ours, raw), torch.autograd.grad(reference, raw), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-6)


def test_no_targets_leaves_only_objectness(device: torch.device) -> None:
    loss = make_loss(device, 2, 640)
    raw = [torch.zeros_like(y, requires_grad=True) for y in random_maps(loss, 2, 64)]
    total, parts = loss(raw, targets(device))
    assert parts.tolist() == pytest.approx([0, math.log(2) * (4 + 1 + 0.4), 0], rel=1e-6)
    total.backward()
    assert all(torch.isfinite(y.grad).all() for y in raw)


def test_one_class_has_no_class_loss_and_smoothing_moves_the_truth(device: torch.device) -> None:
    one = make_loss(device, 1, 64)
    truth = targets(device, (0, 0, 8, 8, 24, 40))
    assert one(random_maps(one, 1, 64), truth)[1][2] == 0
    smooth = make_loss(device, 2, 64, smoothing=0.2)
    raw = [torch.zeros_like(y) for y in random_maps(smooth, 1, 64)]
    for y in raw:
        y[..., 5:] = torch.tensor([math.log(0.9 / 0.1), math.log(0.1 / 0.9)])
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))  # the minimum at these truths
    # two of three levels have an anchor for 16 x 32 px
    assert smooth(raw, truth)[1][2].item() == pytest.approx(2 * entropy * 0.5 * 2 / 80, rel=1e-5)


def test_split_over_ranks_the_gradient_is_that_of_one_process(device: torch.device) -> None:
    """Two ranks with 3 and 0 boxes: average of their gradients = gradient of the whole batch."""
    loss = make_loss(device, 3, 64)
    truth = targets(
        device, (0, 2, 10, 5, 40, 60), (0, 1, 12, 5, 41, 61), (1, 0, 2, 3, 60, 60)
    )  # fmt: skip
    whole = random_maps(loss, 4, 64)
    loss(whole, truth)[0].backward()
    halves = [
        [y.detach()[part].requires_grad_() for y in whole] for part in (slice(2), slice(2, 4))
    ]
    counts: list[Tensor] = []
    loss(halves[0], truth, reduce=lambda c: counts.append(c) or c)
    for part, own in zip(halves, (truth, targets(device)), strict=True):
        loss(part, own, reduce=lambda c: counts[0], world_size=2)[0].backward()
    for level, y in enumerate(whole):
        averaged = torch.cat([part[level].grad / 2 for part in halves])
        assert torch.allclose(averaged, y.grad, rtol=1e-5, atol=1e-8)


def test_boxes_without_area_that_pad_change_no_loss_and_no_gradient(device: torch.device) -> None:
    loss = make_loss(device, 3, 64)
    found = []
    for truth in (
        own := targets(device, (0, 2, 10, 5, 40, 60), (1, 1, 0, 0, 24, 21)),
        own.padded(64),
    ):
        raw = random_maps(loss, 2, 64)
        total, parts = loss(raw, truth)
        found.append((total, parts, *torch.autograd.grad(total, raw)))
    for plain, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-6, atol=1e-7)
    assert len(own.padded(64)) == 64
