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
from models.losses.assign import Assignment, Pairs, Points, assign
from models.losses.build import build_loss
from models.losses.free import FreeLoss, distribution_loss
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
    for stride in head.stride * loss.branches:
        y = torch.randn(batch, size // stride, size // stride, 4 * head.reg_max + loss.classes)
        if head.reg_max == 1:
            y[..., :4] += 1.5
        maps.append(y.to(loss.gains.device).requires_grad_())
    return maps


CELLS = ((4, 4),)  # one level of 4 x 4 cells of 8 px; point n is at (4 + 8 (n % 4), 4 + 8 (n // 4))


def assigned(
    truth: Targets,
    scores: dict[int, float],
    boxes: dict[int, list[float]],
    small: bool = False,
    *,
    assigner: str = "aligned",
    single: int = 0,
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
    return assign(Pairs(truth, points, score.logit(), box, small), assigner, single=single)


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


def ranked(
    assigner: str, corners: Tensor, label: int, *, logits: Tensor, boxes: Tensor, points: Tensor
) -> list[tuple[int, float, float]]:
    """(point, quality, IoU) of those that a box would take, best first; points (N, 3): x y stride.

    One box and one point at a time, as the papers have it.
    """
    (x1, y1, x2, y2), found = corners.tolist(), []
    for n, (x, y, stride) in enumerate(points.tolist()):
        u = float(box_iou(corners[None], boxes[n][None]))
        scores = logits[n].sigmoid().double()
        p = float(scores[label])
        across, down = abs(x - (x1 + x2) / 2) / stride, abs(y - (y1 + y2) / 2) / stride
        candidate = x1 < x < x2 and y1 < y < y2
        truth = torch.zeros_like(scores)
        if assigner == "aligned":
            quality = p**0.5 * u**6
        elif assigner == "simota":
            candidate = max(across, down) < 1.5
            truth[label] = 1
            cost = F.binary_cross_entropy(scores, truth, reduction="sum") - 3 * math.log(u + 1e-7)
            quality = 1 / (1 + float(cost))
        else:
            truth[label] = u
            entropy = F.binary_cross_entropy(scores, truth, reduction="none")
            cost = (entropy * (truth - scores) ** 2).sum() - 3 * math.log(u + 1e-7)
            quality = 1 / (1 + float(cost) + 10 ** (math.hypot(across, down) - 3))
        if candidate:
            found.append((n, quality, u))
    number = 10
    if assigner != "aligned":
        most = 10 if assigner == "simota" else 13
        best = sorted((u for *_, u in found), reverse=True)[:most]
        number = max(math.floor(sum(best)), 1)
    return sorted(found, key=lambda item: -item[1])[:number]


def loss_by_loop(raw: list[Tensor], truth: Targets, loss: FreeLoss, single: bool) -> Tensor:
    """The same formulas as loops over images, targets and points; `single`: of the second branch."""
    head = loss.head
    cells = [
        (level, row, column)
        for level, y in enumerate(raw)
        for row in range(y.shape[1])
        for column in range(y.shape[2])
    ]
    strides = torch.tensor([head.stride[level] for level, *_ in cells])
    centres = torch.tensor([[c + 0.5, r + 0.5] for _, r, c in cells]) * strides[:, None]
    points = torch.cat((centres, strides[:, None]), 1)
    box = side = cls = torch.zeros(())
    positive = 0.0
    for image in range(len(raw[0])):
        y = torch.stack([raw[level][image, r, c].cpu() for level, r, c in cells])
        values, logits = y[:, : 4 * head.reg_max], y[:, 4 * head.reg_max :]
        sides = values
        if head.reg_max > 1:
            steps = torch.arange(float(head.reg_max))
            sides = (values.view(-1, 4, head.reg_max).softmax(-1) * steps).sum(-1)
        pixels = sides * strides[:, None]
        boxes = torch.cat((centres - pixels[:, :2], centres + pixels[:, 2:]), 1)
        found = {"logits": logits.detach(), "boxes": boxes.detach(), "points": points}
        chosen: dict[int, tuple[int, float, float]] = {}  # point: target, quality, IoU
        for i in range(len(truth)):
            if truth.image_index[i] == image:
                corners, label = truth.boxes[i].cpu(), int(truth.labels[i])
                for p, quality, u in ranked(head.assigner, corners, label, **found)[
                    : 7 if single else None
                ]:
                    by = 2 if head.assigner == "aligned" else 1
                    if p not in chosen or (i, quality, u)[by] > chosen[p][by]:
                        chosen[p] = (i, quality, u)
        if single:
            best = {i: max(t for n, t, _ in chosen.values() if n == i) for i, *_ in chosen.values()}
            chosen = {p: item for p, item in chosen.items() if item[1] == best[item[0]]}
        soft = torch.zeros_like(logits)
        for p, (i, quality, u) in chosen.items():
            own = [item for item in chosen.values() if item[0] == i]
            score = u
            if head.assigner == "aligned":
                score = quality / max(item[1] for item in own) * max(item[2] for item in own)
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
        weight = torch.ones_like(logits)
        if head.class_loss == "vfl":
            weight = torch.where(soft > 0, soft, 0.75 * logits.sigmoid() ** 2)
        elif head.class_loss == "qfl" or loss.gamma:
            weight = (soft - logits.sigmoid()).abs() ** 2
        bce = F.binary_cross_entropy_with_logits(logits, soft, reduction="none")
        cls = cls + (bce * weight).sum()
    side_gain = 6.0 if head.reg_max == 1 else 1.5
    return (7.5 * box + side_gain * side + 0.5 * cls) / max(positive, 1) * len(raw[0])


ROWS = (
    (0, 2, 10.2, 5.7, 40.1, 60.9), (0, 1, 12.0, 5.0, 41.0, 61.0), (1, 0, 2.5, 3.5, 60.0, 50.0),
    (1, 1, 50.3, 50.9, 58.0, 59.5), (1, 2, 30.0, 20.0, 62.0, 63.0), (2, 0, 0.0, 0.0, 64.0, 64.0),
)  # fmt: skip


VARIANTS = {
    "aligned": {}, "distribution": {"reg_max": 8}, "focal": {"gamma": 2.0},
    "simota": {"assigner": "simota"}, "dynamic": {"assigner": "dynamic", "class_loss": "qfl"},
    "two branches": {"end_to_end": True, "class_loss": "vfl"},
    "two branches, dynamic": {"end_to_end": True, "assigner": "dynamic"},
}  # fmt: skip


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_loss_equals_a_plain_loop_value_and_gradient(device: torch.device, options: dict) -> None:
    loss = make_loss(device, **options)
    truth, raw = targets(device, *ROWS), random_maps(loss, 4, 64)  # the last image is empty
    loss.start_epoch(2, 5)
    ours, reference = loss(raw, truth)[0], loss_by_loop(raw[:3], truth, loss, False)
    if loss.branches == 2:  # 0.8, 0.625, 0.45, 0.275, 0.1 on one-to-many
        reference = 0.45 * reference + 0.55 * loss_by_loop(raw[3:], truth, loss, True)
    assert ours.item() == pytest.approx(reference.item(), rel=1e-5)
    pairs = zip(*(torch.autograd.grad(value, raw) for value in (ours, reference)), strict=True)
    for mine, expected in pairs:
        assert torch.allclose(mine, expected, atol=1e-5)


def test_two_branches_begin_at_much_and_end_at_one(device: torch.device) -> None:
    loss = make_loss(device, end_to_end=True)
    found = []
    for epoch, epochs in ((0, 1), (0, 11), (5, 11), (10, 11), (11, 11)):
        loss.start_epoch(epoch, epochs)
        found.append(loss.shares[0].item())
    assert found == pytest.approx([0.8, 0.8, 0.45, 0.1, 0.1])


def test_of_one_to_one_a_box_keeps_its_best_point(device: torch.device) -> None:
    boxes = {5: [8.0, 8, 24, 24], 6: [8.0, 8, 24, 23]}
    same = targets(device, *[(0, 0, 8, 8, 24, 24)] * 3)  # the second and third look for one
    found = assigned(same, {}, boxes, single=2)
    assert set(taken(found, 0)) == {5, 6, 9, 10}
    assert taken(found, 1) == taken(found, 2) == {}  # the first target has all
    alone = assigned(targets(device, (0, 0, 8, 8, 24, 24)), {}, boxes, single=1)
    assert taken(alone, 0) == pytest.approx({5: 1.0})
    # of 16 points it looks at the best 7, all of which another box holds
    scores = {point: (1 + point) / 32 for point in range(16)}
    pair = targets(device, *[(0, 0, 0, 0, 32, 32)] * 2)
    found = assigned(pair, scores, {}, single=1)
    assert (set(taken(found, 0)), taken(found, 1)) == (set(range(6, 16)), {})


def test_simota_and_dynamic_by_hand(device: torch.device) -> None:
    """All points predict the whole image, so that IoU is 1/4: one point, or four of 16 x 0.25."""
    truth = targets(device, (0, 0, 8, 8, 24, 24), (0, 0, 0, 0, 0, 0))
    high = {**dict.fromkeys(range(16), 0.5), 9: 0.25}  # nearest to the IoU
    for assigner, scores in (("simota", {9: 0.5}), ("dynamic", high)):
        found = assigned(truth, scores, {}, assigner=assigner)
        assert taken(found, 0) == pytest.approx({9: 0.25})  # the sum of the IoUs is 1
        exact = {point: [8.0, 8, 24, 24] for point in range(16)}
        found = assigned(truth, {}, exact, assigner=assigner)
        assert taken(found, 0) == pytest.approx(dict.fromkeys((5, 6, 9, 10), 1.0))
        assert taken(found, 1) == {}  # the second one pads
    near = targets(device, (0, 0, 11, 11, 13, 13))  # a box of 2 px around point 5: 1.5 strides
    found = assigned(near, {}, {5: [11, 11, 13, 13]}, assigner="simota")
    assert taken(found, 0) == pytest.approx({5: 1.0})
    pixel = targets(device, (0, 0, 15, 15, 16, 16))  # no point inside, but SimOTA finds four
    assert len(taken(assigned(pixel, {}, {5: [15, 15, 16, 16]}, assigner="simota"), 0)) == 1
    assert taken(assigned(pixel, {}, {}, assigner="dynamic"), 0) == {}
    assert set(taken(assigned(pixel, {5: 0.01}, {}, True, assigner="dynamic"), 0)) == {5}


@pytest.mark.parametrize(
    "options",
    [
        {"small_objects": True},
        {"end_to_end": True},
        {"assigner": "simota"},
        {"assigner": "dynamic", "small_objects": True},
    ],
)
def test_the_order_of_images_does_not_matter(device: torch.device, options: dict) -> None:
    loss = make_loss(device, **options)
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


@pytest.mark.parametrize(
    "options", [{}, {"end_to_end": True}, {"assigner": "simota"}, {"assigner": "dynamic"}]
)
def test_no_targets_leaves_only_the_classes(device: torch.device, options: dict) -> None:
    loss = make_loss(device, 2, **options)
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


@pytest.mark.parametrize("end_to_end", [False, True])
def test_split_over_ranks_the_gradient_is_that_of_one_process(
    device: torch.device, end_to_end: bool
) -> None:
    """Two ranks with 3 and 0 boxes: average of their gradients = gradient of the whole batch."""
    loss = make_loss(device, end_to_end=end_to_end)
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
