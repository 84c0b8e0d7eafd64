"""The anchor-free head's assignment and loss by hand, and against a plain loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou, complete_box_iou_loss

from models.builder import build_detector
from models.heads.free import FreeDetect
from models.losses.build import build_loss
from models.losses.free import Assignment, FreeLoss, Points, assign, distribution_loss
from models.yaml.parser import parse_spec
from utils.boxes import Targets
from utils.errors import UserError
from utils.hyp import Hyperparameters

Row = tuple[int, int, float, float, float, float]  # image, label, box


def targets(device: torch.device, *rows: Row) -> Targets:
    table = torch.tensor(rows, dtype=torch.float32, device=device).view(-1, 6)
    return Targets(table[:, 0].long(), table[:, 1].long(), table[:, 2:])


def make_loss(device: torch.device, classes: int = 3, gamma: float = 0, **options) -> FreeLoss:
    rows = {
        "backbone": [[-1, 3, "Conv", [8, 3, 2]], *[[-1, 1, "Conv", [8, 3, 2]]] * 2],
        "head": [[[0, 1, 2], 1, "FreeDetect", options]],
    }
    model = build_detector(parse_spec(rows, "t"), classes=classes).to(device)
    loss = build_loss(model, Hyperparameters(fl_gamma=gamma), image_size=64)
    assert isinstance(loss, FreeLoss)
    return loss


def random_maps(loss: FreeLoss, batch: int, size: int) -> list[Tensor]:
    torch.manual_seed(1)
    head, maps = loss.head, []
    for stride in head.stride:
        y = torch.randn(batch, size // stride, size // stride, 4 * head.reg_max + loss.classes)
        if head.reg_max == 1:
            y[..., :4] += 1.5
        maps.append(y.to(loss.gains.device).requires_grad_())
    return maps


CELLS = ((4, 4),)  # one level of 4 x 4 cells of 8 px; point n is at (4 + 8 (n % 4), 4 + 8 (n // 4))


def assigned(
    truth: Targets, scores: dict[int, float], boxes: dict[int, list[float]], small: bool = False
) -> Assignment:
    """On one image of one class; points not given predict a score of 0.25 and the whole image."""
    device = truth.boxes.device
    score = torch.full((1, 16, 1), 0.25, device=device)
    box = torch.tensor([0.0, 0, 32, 32], device=device).repeat(1, 16, 1)
    for point, value in scores.items():
        score[0, point] = value
    for point, corners in boxes.items():
        box[0, point] = torch.tensor(corners)
    points = Points.of(CELLS, (8,), device)
    return assign(truth, points, score, box, small_objects=small)


def taken(item: Assignment, row: int) -> dict[int, float]:
    pairs = zip(item.point[row].tolist(), item.score[row].tolist(), strict=True)
    return {point: score for point, score in pairs if score > 0}


def test_points_inside_are_weighed_by_score_and_overlap(device: torch.device) -> None:
    truth = targets(device, (0, 0, 8, 8, 24, 24))  # points 5, 6, 9, 10 are inside
    found = assigned(truth, {6: 0.81}, {5: [8, 8, 24, 24], 6: [8, 8, 24, 16]})
    # t: 5: .25^.5 * 1; 6: .81^.5 / 2^6; 9 and 10: IoU 256 / 1024, .25^.5 / 4^6
    best = 0.5
    expected = {5: 1.0, 6: 0.9 / 2**6 / best, 9: 0.5 / 4**6 / best, 10: 0.5 / 4**6 / best}
    assert taken(found, 0) == pytest.approx(expected)
    low = assigned(truth, {}, {})  # all predict alike: max t is met by all, the target is max IoU
    assert taken(low, 0) == pytest.approx(dict.fromkeys((5, 6, 9, 10), 0.25))


def test_a_point_on_the_side_is_outside_and_at_most_ten_are_taken(device: torch.device) -> None:
    on_side = targets(device, (0, 0, 4, 4, 20, 20))  # of 0, 1, 4 and the like only 5 is inside
    assert set(taken(assigned(on_side, {}, {}), 0)) == {5}
    scores = {point: (1 + point) / 16 for point in range(16)}
    whole = targets(device, (0, 0, 0, 0, 32, 32))
    assert set(taken(assigned(whole, scores, {}), 0)) == set(range(6, 16))


def test_a_contested_point_goes_to_the_larger_overlap_then_to_the_first(
    device: torch.device,
) -> None:
    boxes = {5: [8.0, 8, 16, 24], 6: [16.0, 8, 24, 24]}
    truth = targets(device, (0, 0, 8, 8, 24, 24), (0, 0, 8, 8, 16, 24))  # 5 6 9 10, and 5 9
    found = assigned(truth, {}, boxes)
    assert set(taken(found, 0)) == {6, 9, 10}  # 9 overlaps the first by 1/4, the second by 1/8
    assert taken(found, 1) == pytest.approx({5: 1.0})
    assert taken(found, 0)[6] == pytest.approx(0.5)  # max t without 5 is its own: the target is u
    twice = targets(device, *[(0, 0, 8, 8, 24, 24)] * 2)
    found = assigned(twice, {}, boxes)
    assert set(taken(found, 0)) == {5, 6, 9, 10}
    assert taken(found, 1) == {}


def test_the_smallest_boxes_have_points_where_asked(device: torch.device) -> None:
    pixel = targets(device, (0, 0, 15, 15, 16, 16), (0, 0, 0, 0, 0, 0))  # the second one pads
    assert taken(assigned(pixel, {}, {}), 0) == {}
    found = assigned(pixel, {5: 0.8}, {5: [15, 15, 16, 16]}, small=True)
    # within 16 x 16 px around (15.5, 15.5) are 5 to 10, to whom it means 1/1024 of their box
    assert set(taken(found, 0)) == {5, 6, 9, 10}
    assert taken(found, 0)[5] == pytest.approx(1)
    assert taken(found, 0)[6] > 0  # 1/1024^6 is not rounded to nothing
    assert taken(found, 1) == {}
    wide = targets(device, (0, 0, 1, 14, 31, 15))  # only the low side is enlarged
    assert set(taken(assigned(wide, {}, {}, small=True), 0)) == set(range(4, 12))


def test_no_overlap_takes_nothing_and_stays_finite(device: torch.device) -> None:
    truth = targets(device, (0, 0, 8, 8, 24, 24))
    away = {point: [40.0, 40, 50, 50] for point in range(16)}
    found = assigned(truth, {}, away)
    assert taken(found, 0) == {}
    assert found.score.isfinite().all()
    inverted = {point: [24.0, 24, 8, 8] for point in range(16)}
    assert taken(assigned(truth, {}, inverted), 0) == {}


def loss_by_loop(raw: list[Tensor], truth: Targets, loss: FreeLoss) -> Tensor:
    """The same formulas as loops over images, targets and points."""
    head = loss.head
    points = [
        (level, row, column)
        for level, y in enumerate(raw)
        for row in range(y.shape[1])
        for column in range(y.shape[2])
    ]
    strides = torch.tensor([head.stride[level] for level, *_ in points])
    centres = torch.tensor([[c + 0.5, r + 0.5] for _, r, c in points]) * strides[:, None]
    box = side = cls = torch.zeros(())
    positive = 0.0
    for image in range(len(raw[0])):
        y = torch.stack([raw[level][image, r, c].cpu() for level, r, c in points])
        values, logits = y[:, : 4 * head.reg_max], y[:, 4 * head.reg_max :]
        sides = values
        if head.reg_max > 1:
            steps = torch.arange(float(head.reg_max))
            sides = (values.view(-1, 4, head.reg_max).softmax(-1) * steps).sum(-1)
        pixels = sides * strides[:, None]
        boxes = torch.cat((centres - pixels[:, :2], centres + pixels[:, 2:]), 1)
        rows = [i for i in range(len(truth)) if truth.image_index[i] == image]
        chosen: dict[int, tuple[int, float, float]] = {}  # point: target, t, IoU
        for i in rows:
            corners = truth.boxes[i].cpu()
            u = box_iou(corners[None], boxes.detach())[0]
            t = logits.detach()[:, truth.labels[i]].sigmoid().sqrt() * u**6
            x, y_ = centres.unbind(1)
            x1, y1, x2, y2 = corners.tolist()
            inside = [p for p in range(len(t)) if x1 < x[p] < x2 and y1 < y_[p] < y2]
            for p in sorted(inside, key=lambda p: -t[p])[:10]:
                if p not in chosen or u[p] > chosen[p][2]:
                    chosen[p] = (i, float(t[p]), float(u[p]))
        soft = torch.zeros_like(logits)
        for p, (i, t, _) in chosen.items():
            own = [item for item in chosen.values() if item[0] == i]
            score = t / max(item[1] for item in own) * max(item[2] for item in own)
            soft[p, truth.labels[i]] = score
            corners, s = truth.boxes[i].cpu(), strides[p]
            box = box + score * complete_box_iou_loss(boxes[p][None] / s, corners[None] / s)[0]
            true = torch.cat((centres[p] - corners[:2], corners[2:] - centres[p])) / s
            if head.reg_max == 1:
                error = (sides[p] - true).abs().mean()
            else:
                error = torch.zeros(())
                for value, end in zip(values[p].view(4, -1), true.tolist(), strict=True):
                    end = min(max(end, 0), head.reg_max - 1.01)
                    i, log = int(end), value.log_softmax(0)
                    error = error - ((i + 1 - end) * log[i] + (end - i) * log[i + 1]) / 4
            side = side + score * error
            positive += score
        bce = F.binary_cross_entropy_with_logits(logits, soft, reduction="none")
        focal = (soft - logits.sigmoid()).abs() ** loss.gamma if loss.gamma else 1
        cls = cls + (bce * focal).sum()
    side_gain = 6.0 if head.reg_max == 1 else 1.5
    return (7.5 * box + side_gain * side + 0.5 * cls) / max(positive, 1) * len(raw[0])


ROWS = (
    (0, 2, 10.2, 5.7, 40.1, 60.9), (0, 1, 12.0, 5.0, 41.0, 61.0), (1, 0, 2.5, 3.5, 60.0, 50.0),
    (1, 1, 50.3, 50.9, 58.0, 59.5), (1, 2, 30.0, 20.0, 62.0, 63.0), (2, 0, 0.0, 0.0, 64.0, 64.0),
)  # fmt: skip


@pytest.mark.parametrize(
    "options", [{}, {"reg_max": 8}, {"gamma": 2.0}], ids=["sides", "distribution", "focal"]
)
def test_loss_equals_a_plain_loop_value_and_gradient(device: torch.device, options: dict) -> None:
    loss = make_loss(device, **options)
    truth, raw = targets(device, *ROWS), random_maps(loss, 4, 64)  # the last image is empty
    ours, reference = loss(raw, truth)[0], loss_by_loop(raw, truth, loss)
    assert ours.item() == pytest.approx(reference.item(), rel=1e-5)
    pairs = zip(*(torch.autograd.grad(value, raw) for value in (ours, reference)), strict=True)
    for mine, expected in pairs:
        assert torch.allclose(mine, expected, atol=1e-5)


def test_the_order_of_images_does_not_matter(device: torch.device) -> None:
    loss = make_loss(device, small_objects=True)
    raw = random_maps(loss, 3, 64)
    total, parts = loss(raw, targets(device, *ROWS))
    backwards = [(2 - image, *rest) for image, *rest in reversed(ROWS)]
    turned, turned_parts = loss([y.flip(0) for y in raw], targets(device, *backwards))
    assert torch.allclose(parts, turned_parts, rtol=1e-5)
    padded, _ = loss(raw, targets(device, *ROWS, *[(0, 0, 0, 0, 0, 0)] * 3))
    assert torch.allclose(total, padded, rtol=1e-6)
    gradients = [torch.autograd.grad(value, raw) for value in (total, turned, padded)]
    for one, two, three in zip(*gradients, strict=True):
        assert torch.allclose(one, two, atol=1e-5)
        assert torch.allclose(one, three, atol=1e-5)


def test_no_targets_leaves_only_the_classes(device: torch.device) -> None:
    loss = make_loss(device, 2)
    raw = [torch.zeros_like(y, requires_grad=True) for y in random_maps(loss, 2, 64)]
    total, parts = loss(raw, targets(device))
    points = 2 * (8 * 8 + 4 * 4 + 2 * 2)
    assert parts.tolist() == pytest.approx([0, 0, 0.5 * math.log(2) * 2 * points], rel=1e-6)
    total.backward()
    assert all(torch.isfinite(y.grad).all() for y in raw)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_and_autocast_are_finite(
    device: torch.device, dtype: torch.dtype
) -> None:
    loss = make_loss(device)
    raw = [y.detach().to(dtype).requires_grad_() for y in random_maps(loss, 3, 64)]
    exact, _ = loss([y.detach().float() for y in raw], targets(device, *ROWS))
    with torch.autocast(device.type, dtype):
        total, _ = loss(raw, targets(device, *ROWS))
    assert total.dtype == torch.float32
    assert total.item() == exact.item()  # nothing is computed in half precision
    total.backward()
    assert all(y.grad.isfinite().all() for y in raw)


def test_distribution_loss_by_hand(device: torch.device) -> None:
    outputs = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4], device=device)).repeat(4)
    sides = torch.tensor([1.25, -1.0, 2.0, 9.0], device=device)
    found = distribution_loss(outputs, sides, 4).tolist()
    last = -(0.01 * math.log(0.3) + 0.99 * math.log(0.4))  # beyond the last distance
    expected = [
        -(0.75 * math.log(0.2) + 0.25 * math.log(0.3)),
        -math.log(0.1),
        -math.log(0.3),
        last,
    ]
    assert found == pytest.approx(expected, rel=1e-4)


def test_split_over_ranks_the_gradient_is_that_of_one_process(device: torch.device) -> None:
    """Two ranks with 3 and 0 boxes: average of their gradients = gradient of the whole batch."""
    loss = make_loss(device)
    truth = targets(device, *ROWS[:3])
    whole = random_maps(loss, 4, 64)
    loss(whole, truth)[0].backward()
    halves = [
        [y.detach()[part].requires_grad_() for y in whole] for part in (slice(2), slice(2, 4))
    ]
    totals: list[Tensor] = []
    loss(halves[0], truth, reduce=lambda c: totals.append(c) or c)
    for part, own in zip(halves, (truth, targets(device)), strict=True):
        loss(part, own, reduce=lambda c: totals[0], world_size=2)[0].backward()
    for level, y in enumerate(whole):
        averaged = torch.cat([part[level].grad / 2 for part in halves])
        assert torch.allclose(averaged, y.grad, rtol=1e-5, atol=1e-7)


def test_label_smoothing_is_refused(device: torch.device) -> None:
    model = make_loss(device).head
    detector = torch.nn.Module()
    detector.head = model
    assert isinstance(model, FreeDetect)
    with pytest.raises(UserError, match="soft already"):
        FreeLoss(detector, Hyperparameters(), image_size=64, label_smoothing=0.1)
